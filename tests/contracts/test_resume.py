"""Stop anywhere, start again: parameters, optimizer state and metrics are, to the bit, those of a run that never stopped."""

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small import assert_same_bits, copy, prepare, presets, timeless  # noqa: F401  presets: a fixture

from rlhf_jax import runners
from rlhf_jax.checkpoint import read_meta
from rlhf_jax.metrics import MetricsLog, read_samples
from rlhf_jax.stages import ppo, reward, sft
from rlhf_jax.stages.task import Run

pytestmark = pytest.mark.filterwarnings('ignore:Sharding info not provided')  # `saved` reads what is there, as it is
STAGES = {'sft': sft, 'reward': reward, 'ppo': ppo}
# The KL weight moves in every iteration, so that it is part of what has to come back.
SETTINGS = {'ppo__kl_target_nats_per_sequence': 0.01, 'ppo__kl_horizon_episodes': 40, 'sft__packed': True}


class StoppedError(Exception):
  pass


class _StoppingLog(MetricsLog):
  """Raises once the metrics of a step are written: later than its update, sooner than its checkpoint."""

  def write(self, step, values, **more):
    super().write(step, values, **more)
    if step == self.stops_at:
      raise StoppedError


@dataclasses.dataclass(frozen=True)
class StoppingRun(Run):
  stops_at: int = 0

  def log(self, name):
    log = _StoppingLog(self.stage(name), tensorboard=False)
    log.stops_at = self.stops_at
    return log


def stopped(run, name, step):
  """Runs the stage until the metrics of that step are written."""
  fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
  with pytest.raises(StoppedError):
    STAGES[name].train(StoppingRun(**fields, stops_at=step))


def saved(run, name):
  """(step, everything that the newest checkpoint holds)."""
  step = max(ocp.utils.checkpoint_steps(run.checkpoints(name)))
  return step, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(run.checkpoints(name) / str(step) / 'state')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run of the three stages that never stops."""
  run = prepare(tmp_path_factory.mktemp('whole'), settings=SETTINGS)
  for stage in STAGES.values():
    stage.train(run)
  return run


def before(name):
  """What a run directory needs for that stage to begin."""
  return ['tokenizer', *list(STAGES)[:list(STAGES).index(name)]]


@pytest.mark.parametrize('name, stops', [('sft', (1, 3, 5)), ('reward', (2, 3)), ('ppo', (1, 3))])
def test_stopped_and_started_again_is_the_same_to_the_bit(whole, tmp_path, name, stops):
  run = prepare(copy(whole.directory, tmp_path, *before(name)), settings=SETTINGS)
  for step in stops:
    stopped(run, name, step)
  again = STAGES[name].train(run)

  step, state = saved(run, name)
  expected_step, expected = saved(whole, name)
  assert step == expected_step
  assert {'params', 'opt_state', 'step'} <= set(state)
  assert_same_bits(state, expected)
  assert timeless(run.stage(name)) == timeless(whole.stage(name))
  assert read_samples(run.stage(name)) == read_samples(whole.stage(name))
  meta, expected_meta = read_meta(run.checkpoints(name)), read_meta(whole.checkpoints(name))
  untimed = lambda known: {key: x for key, x in known.items() if 'second' not in key}
  assert untimed(meta['evaluation']) == untimed(expected_meta['evaluation']) == untimed(again)
  assert meta.get('kl_weight') == expected_meta.get('kl_weight')


def test_the_kl_weight_that_comes_back_is_not_the_one_of_the_config(whole):
  weights = [row['kl_weight'] for row in timeless(whole.stage('ppo'))]
  assert weights[0] == whole.experiment.ppo.kl_weight and len(set(weights)) == len(weights)


def test_a_stop_loses_only_what_is_newer_than_the_checkpoint(whole, tmp_path):
  run = prepare(copy(whole.directory, tmp_path, 'tokenizer'), settings=SETTINGS)
  stopped(run, 'sft', 5)
  assert saved(run, 'sft')[0] == 4 and timeless(run.stage('sft'))[-1]['step'] == 5
  assert not run.finished('sft')


@pytest.mark.parametrize('name', list(STAGES))
def test_it_goes_on_upon_other_devices(whole, tmp_path, name):
  run = prepare(copy(whole.directory, tmp_path, *before(name)), settings=SETTINGS)
  stopped(run, name, 3)
  sharded = dataclasses.replace(run, runner=runners.sharded(fsdp=2, tensor=2))
  STAGES[name].train(sharded)
  assert len(jax.tree.leaves(STAGES[name].restore(sharded))[0].sharding.device_set) == 8
  params, expected = saved(run, name)[1]['params'], saved(whole, name)[1]['params']
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), params, expected)


def test_the_policy_is_asked_for_answers_to_rank_once(whole, tmp_path):
  """A reward stage that is stopped and goes on must not rank other answers."""
  asked = []

  def comparisons(ask):
    asked.append(ask(task.prompts[1], 2))
    return recorded(ask)
  run = prepare(copy(whole.directory, tmp_path, *before('reward')), settings=SETTINGS)
  task, recorded = run.task, run.task.comparisons
  run = dataclasses.replace(run, task=dataclasses.replace(task, comparisons=comparisons))
  stopped(run, 'reward', 3)
  reward.train(run)
  assert len(asked) == 1
  assert [len(texts) for texts in asked[0]] == [2, 2]
