"""A task of a few words and a model of 8,000 parameters: the three stages of a run in seconds, most of it compiling."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import cli, config
from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.metrics import read_metrics
from rlhf_jax.model import config as model_config
from rlhf_jax.model.config import ModelConfig
from rlhf_jax.stages import reward, sft
from rlhf_jax.stages.task import Task

# Every size divides by 2, for a mesh; 'smaller' differs from 'pico' in every size but the vocabulary, which follows.
PRESETS = {
  'pico': ModelConfig(vocab_size=300, width=16, layers=1, query_heads=4, kv_heads=2, head_width=4, feedforward_width=24,
                      context_length=32),
  'smaller': ModelConfig(vocab_size=290, width=8, layers=1, query_heads=2, kv_heads=2, head_width=6, feedforward_width=12,
                         context_length=40),
}
SETTINGS = {
  'preset': 'pico', 'tensorboard': False, 'data.limits.prompt_tokens': 14, 'data.limits.response_tokens': 10,
  'sft.steps': 6, 'sft.batch_size': 16, 'sft.optimizer.learning_rate': 0.05, 'sft.optimizer.warmup_steps': 2,
  'sft.evaluate_every': 2, 'sft.checkpoint_every': 2,
  'reward.steps': 4, 'reward.batch_size': 8, 'reward.optimizer.warmup_steps': 1, 'reward.evaluate_every': 2,
  'reward.checkpoint_every': 2,
  'ppo.iterations': 4, 'ppo.batch_size': 16, 'ppo.epochs': 2, 'ppo.minibatches': 2, 'ppo.samples_every': 2,
  'ppo.checkpoint_every': 2,
}
THINGS = ('tea', 'jam', 'ink', 'soup', 'glue', 'bread', 'a kite', 'a raft', 'a lamp', 'a drum', 'a sled', 'a tent')
ANSWERS = ('Yes.', 'No!', 'Ask me.', 'Why?')
UNTIMED = ('time', 'seconds_generate', 'seconds_score', 'seconds_update', 'response_tokens_per_second')  # no two runs alike


@pytest.fixture(scope='module', autouse=True)
def presets():
  """The models above, by name, while the tests of a module run. To be imported by it."""
  with pytest.MonkeyPatch.context() as patch:
    for name, sizes in PRESETS.items():
      patch.setitem(model_config.PRESETS, name, sizes)
    yield


def experiment(**settings):
  """The small Experiment with dotted settings changed, dots written as '__': ppo__epochs=1."""
  return config.override(config.Experiment(), SETTINGS | {name.replace('__', '.'): x for name, x in settings.items()})


def prompt(thing, **fields):
  return Example((Turn('user', f'Want {thing}?'),), **fields)


def task(experiment, **changes):
  """Demonstrations say any of the answers; of three, the labellers like yes most. The last two are held out."""
  del experiment
  demonstrations = [prompt(thing, responses=(answer,), ranks=(0,)) for thing in THINGS for answer in ANSWERS]
  comparisons = [prompt(thing, responses=('Yes.', 'No!', 'Ask me.'), ranks=(0, 1, 2))
                 for thing in THINGS]
  prompts = [prompt(thing) for thing in (*THINGS, 'rum', 'a hat', 'a cat', 'a bat', 'tar', 'tin')]
  judge = lambda prompts, responses: {'words': float(np.mean([len(response.split()) for response in responses]))}
  split = lambda examples, held_out: (examples[:-held_out], examples[-held_out:])
  return dataclasses.replace(Task(demonstrations=split(demonstrations, 8), comparisons=lambda ask: split(comparisons, 2),
                                  prompts=split(prompts, 2), judge=judge), **changes)


def prepare(directory, *, settings=None, **changes):
  """The Run of the small task in a directory; `changes` are those of the Task."""
  directory.mkdir(parents=True, exist_ok=True)
  return cli.prepare(experiment(**settings or {}), functools.partial(task, **changes), directory)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run directory with its first two stages finished. To be imported, and copied by `copy`."""
  directory = tmp_path_factory.mktemp('finished')
  run = prepare(directory)
  sft.train(run)
  reward.train(run)
  return directory


def copy(directory, target, *parts):
  """A directory like a finished one, with these parts of it; with all where none are named."""
  for part in parts or ('',):
    shutil.copytree(directory / part, target / part, dirs_exist_ok=True)
  return target


def timeless(stage_directory):
  """metrics.jsonl without what the clock says."""
  return [{name: x for name, x in row.items() if name not in UNTIMED} for row in read_metrics(stage_directory)]


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
