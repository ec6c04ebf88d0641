"""An experiment as data: frozen dataclasses whose fields are the flags of the command line.

A field's trailing comment is its help text. `to_json` writes a run's config down, `differences` says what a later command
changed, `override` applies dotted settings as the command line would.
"""

import dataclasses
import difflib
import io
import json
import math
import re
import sys
import typing
from contextlib import redirect_stderr, redirect_stdout
from typing import Annotated, Literal

import tyro

from rlhf_jax.data.encode import Limits
from rlhf_jax.errors import ConfigError, check_fields
from rlhf_jax.experience import ExperienceConfig
from rlhf_jax.losses.ppo import PPOLossConfig
from rlhf_jax.model.config import REMAT_SWITCH
from rlhf_jax.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Which devices the run uses, and how."""
  runner: Literal['auto', 'single', 'pmap', 'sharded'] = 'auto'  # auto: sharded on several accelerators, else single
  data: int | None = None  # sharded: ways to split the batch; None takes what fsdp and tensor leave
  fsdp: int | None = None  # sharded: ways to cut parameters along the model width, the batch too; None: as many as divide it
  tensor: int = 1  # sharded: ways to cut heads, feed-forward and vocabulary
  cpu_devices: int | None = None  # without an accelerator: how many devices share its cores; None: 1, or as XLA_FLAGS says

  def __post_init__(self):
    if self.cpu_devices is not None:
      _positive(self, 'cpu_devices')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where examples come from, and which are used."""
  path: str = ''  # jsonl, parquet, a folder, tfds:NAME or a hub id; experiments with data of their own ignore it
  split: str = 'train'  # to train on, as it is named at the path: train, train_sft, train_prefs
  held_out_split: str | None = None  # to evaluate on; None: test, or test_sft for train_sft, if any
  skip_bad_rows: bool = False  # count and skip rows that cannot be used, instead of stopping at the first
  held_out_share: float = 0.05  # of the prompts, to evaluate on where there is no such split
  max_examples: int | None = None  # use only the first so many
  limits: Limits = Limits()  # lengths in tokens

  def __post_init__(self):
    if not 0 < self.held_out_share < 1:
      raise ConfigError(f'data held_out_share={self.held_out_share}. It must lie between 0 and 1, for example 0.05.')
    held_out = self.held_out_split or ''
    whole = (self.split.partition('[')[0] == held_out.partition('[')[0]
             and not ('[' in self.split and '[' in held_out))
    if self.split == held_out or whole:  # train, or train and train[:5%]
      raise ConfigError(f'data split is {self.split!r} and held_out_split {held_out!r}. What is '
                        'trained on is not held out: name two splits, two parts of one, or leave '
                        'held_out_split out.')


_HOW_IT_IS_COMPUTED = re.compile(
  r'mesh\..*|attention|remat|scan_layers|ppo\.gather|ppo\.slots|(sft|reward|ppo)\.microbatches')


def _positive(config, *names):
  for name in names:
    if getattr(config, name) < 1:
      raise ConfigError(f'{type(config).__name__} {name}={getattr(config, name)}. It must be at least 1.')


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Supervised fine-tuning."""
  steps: int = 300  # updates
  batch_size: int = 32  # sequences an update
  microbatches: int = 1  # pieces that a batch is computed in: same update, less memory
  packed: bool = False  # several short demonstrations to a row
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, schedule='cosine', warmup_steps=20)
  evaluate_every: int = 100  # updates between held-out evaluations
  checkpoint_every: int = 100  # updates between checkpoints

  def __post_init__(self):
    _positive(self, 'steps', 'batch_size', 'microbatches', 'evaluate_every', 'checkpoint_every')


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Reward-model training."""
  steps: int = 300  # updates
  batch_size: int = 32  # prompts an update, with all their ranked responses
  microbatches: int = 1  # pieces that a batch is computed in
  centring_weight: float = 0.0  # of the squared score in the loss, keeps scores near 0
  normalise: bool = True  # after training: mean 0 and standard deviation 1 over the training responses, in the parameters
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4, schedule='cosine', warmup_steps=20)
  evaluate_every: int = 100  # updates between held-out evaluations
  checkpoint_every: int = 100  # updates between checkpoints

  def __post_init__(self):
    _positive(self, 'steps', 'batch_size', 'microbatches', 'evaluate_every', 'checkpoint_every')
    check_fields('reward', self, (
      'centring_weight', 0 <= self.centring_weight < math.inf, 'finite and not below 0',
      'Pass 0 to leave scores where they are, or for example 0.01'))


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """Proximal policy optimisation against the reward model."""
  iterations: int = 60  # rounds of answering and learning
  batch_size: int = 64  # prompts answered in an iteration
  slots: int | None = None  # answers written at a time, from a queue of the prompts; None: all at once
  gather: bool = True  # sharded: join what fsdp cuts once for all answers, not at every token; a chip holds more meanwhile
  lengths: int = 1  # to how many different lengths prompts and answers are padded: more compute less, and compile more
  epochs: int = 4  # passes over an iteration's answers
  minibatches: int = 1  # updates in a pass
  microbatches: int = 1  # pieces that a minibatch is computed in
  temperature: float = 1.0  # of sampling; log-probabilities are taken at it everywhere
  value_from: Literal['reward', 'policy'] = 'reward'  # what the value starts as: the reward model, or SFT with a head of 0
  shared_trunk: bool = False  # value as a second head on the policy, instead of a network of its own
  kl_weight: float = 0.05  # reward lost for each nat that the policy moves from the SFT model
  kl_target_nats_per_sequence: float | None = None  # adapts kl_weight to hold this KL (OpenAI 2019: 6); None: fixed
  kl_horizon_episodes: int = 10000  # adaptive: a larger horizon changes kl_weight more slowly
  kl_stop_nats_per_sequence: float | None = None  # ends training before an update that starts beyond this KL
  reward_model_weight: float = 1.0  # of the reward model beside Python reward functions
  loss: PPOLossConfig = PPOLossConfig()
  frozen_dtype: Literal['float32', 'bfloat16'] = 'float32'  # of reference and reward model; bfloat16 only with that --dtype
  experience: ExperienceConfig = ExperienceConfig()
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, schedule='linear', epsilon=1e-5)
  held_out_answers: int = 1  # answers of each policy to every held-out prompt, for the table at the end
  samples_every: int = 10  # iterations between samples of text
  checkpoint_every: int = 10  # iterations between checkpoints

  def __post_init__(self):
    _positive(self, 'iterations', 'batch_size', 'lengths', 'epochs', 'minibatches', 'microbatches', 'held_out_answers',
              'samples_every', 'checkpoint_every', *(('slots',) if self.slots is not None else ()))
    target, stop = self.kl_target_nats_per_sequence, self.kl_stop_nats_per_sequence
    check_fields(
      'PPO', self,
      ('temperature', 0 < self.temperature < math.inf,
       'positive: greedy answers have no probability; and finite', 'Pass 1, or for example 0.7'),
      ('kl_weight', 0 <= self.kl_weight < math.inf, 'finite and not below 0',
       'Pass 0 for no leash, or for example 0.05'),
      ('kl_target_nats_per_sequence', target is None or 0 < target < math.inf, 'positive, or None',
       'Pass None for a kl_weight that stays, or for example 6'),
      ('kl_horizon_episodes', 0 < self.kl_horizon_episodes < math.inf, 'positive and finite',
       'Pass for example 10000'),
      ('kl_stop_nats_per_sequence', stop is None or stop > 0, 'positive, or None',
       'Pass None to train to the end'),
      ('reward_model_weight', abs(self.reward_model_weight) < math.inf, 'finite',
       'Pass 1, or 0 to score by reward functions alone'))


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run: SFT, reward model and PPO, in that order."""
  seed: int = 0  # all chance and all data order follow from it
  preset: str = 'nano'  # model from scratch, by name (rlhf_jax.model.config.PRESETS)
  pretrained: str | None = None  # Hugging Face directory or hub id to start from, instead of the preset
  reward_preset: str | None = None  # a reward model of another size, from scratch; None: on the SFT model's backbone
  dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and products
  attention: Literal['auto', 'xla', 'cudnn', 'splash'] = 'auto'  # auto: splash on TPUs, cudnn on GPUs in bfloat16, else xla
  remat: Literal['auto', 'none', 'dots', 'block'] = 'auto'  # computed again in the backward pass; dots: all but products
  scan_layers: bool | None = None  # one compiled block for all layers; None: on accelerators, and for deep models
  mesh: MeshConfig = MeshConfig()
  data: DataConfig = DataConfig()
  sft: SFTConfig = SFTConfig()
  reward: RewardConfig = RewardConfig()
  ppo: PPOConfig = PPOConfig()
  tensorboard: bool = True  # write event files beside metrics.jsonl
  wandb: str | None = None  # Weights & Biases project to log to; needs the extra `wandb`

  def __post_init__(self):
    object.__setattr__(self, 'remat', REMAT_SWITCH.get(self.remat, self.remat))
    check_fields('experiment', self, (
      'seed', 0 <= self.seed < 2 ** 31,
      'from 0 to 2147483647: a key of JAX has 32 bits, and larger seeds repeat it',
      'Pass a smaller number, for example 0'))
    if self.ppo.frozen_dtype == 'bfloat16' and self.dtype != 'bfloat16':
      raise ConfigError(f'--ppo.frozen-dtype bfloat16 with --dtype {self.dtype}: the reference would be '
                        'another model than the one that is trained. Pass --dtype bfloat16 too.')


def to_json(config):
  """The config as plain JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def changes(written, experiment):
  """Differences between a run's config, as JSON, and an experiment.

  How it is computed is none: it goes on from any checkpoint, up to rounding, on other devices or in
  less memory.
  """
  written = _with_defaults(to_json(type(experiment)()), written)
  return [change for change in differences(written, to_json(experiment))
          if not _HOW_IT_IS_COMPUTED.fullmatch(change.partition(':')[0])]


def _with_defaults(defaults, written):
  """A config as JSON with the defaults of fields that came after it was written."""
  return defaults | {
    name: _with_defaults(defaults[name], value) if isinstance(value, dict)
    and isinstance(defaults.get(name), dict) else value for name, value in written.items()}


def differences(old, new, prefix=''):
  """Dotted names of the fields in which two JSON configs differ, with both values: ['ppo.kl_weight: 0.05 -> 0.1']."""
  found = []
  for name in sorted(set(old) | set(new)):
    a, b = old.get(name, '(absent)'), new.get(name, '(absent)')
    if isinstance(a, dict) and isinstance(b, dict):
      found += differences(a, b, f'{prefix}{name}.')
    elif a != b:
      found.append(f'{prefix}{name}: {a} -> {b}')
  return found


def fields(config, prefix=''):
  """Dotted names of all settings of a config."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from fields(value, f'{prefix}{field.name}.')
    else:
      yield f'{prefix}{field.name}'


def override(config, settings):
  """The config with dotted settings applied ({'ppo.kl_weight': '0.1'}), each read as its flag would be.

  Raises ConfigError that names the setting, and the nearest name for an unknown one.
  """
  known = list(fields(config))
  for name, value in settings.items():
    if name.replace('-', '_') not in known:
      near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
      raise ConfigError(f'there is no setting {name!r}.' + (f' Did you mean {" or ".join(near)}?' if near else
                        f' Known: {", ".join(known)}.'))
    config = _set(config, name.replace('-', '_'), str(value), name)
  return config


# Settings that were switches once, and are still set like them: --remat, --no-scan-layers.
_SWITCHES = {'remat': {'true': REMAT_SWITCH[True], 'false': REMAT_SWITCH[False]},
             'scan_layers': {'true': 'True', 'false': 'False'}}


def _as_values(args):
  """Arguments with a value behind every flag that was a switch."""
  found = []
  for i, arg in enumerate(args):
    no = arg.startswith('--no-')
    name = arg.removeprefix('--no-' if no else '--').replace('-', '_')
    alone = i + 1 == len(args) or args[i + 1].startswith('--')
    if arg.startswith('--') and name in _SWITCHES and (no or alone):
      found += [f'--{name.replace("_", "-")}', _SWITCHES[name]['false' if no else 'true']]
    else:
      found.append(arg)
  return found


def _set(config, name, value, whole):
  head, _, rest = name.partition('.')
  if rest:
    return dataclasses.replace(config, **{head: _set(getattr(config, head), rest, value, whole)})
  value = _SWITCHES.get(head, {}).get(value.lower(), value)
  said, kind = io.StringIO(), typing.get_type_hints(type(config))[head]
  if kind is bool:
    if value not in ('True', 'False', 'true', 'false'):
      raise ConfigError(f'{whole}={value!r} is not a truth value. Write True or False.')
    return dataclasses.replace(config, **{head: value.lower() == 'true'})
  try:
    with redirect_stdout(said), redirect_stderr(said):
      parsed = tyro.cli(dataclasses.make_dataclass('Setting', [(head, kind)]), args=[f'--{head}={value}'])
  except SystemExit:
    raise ConfigError(f'{whole}={value!r} is not a {kind if typing.get_args(kind) else kind.__name__}.') from None
  return dataclasses.replace(config, **{head: getattr(parsed, head)})           # outside tyro, so that its checks are heard


def parse(default, command, description, args=None):
  """(experiment, command) from command-line flags, where every field is `--a.b value`; prints help and exits as CLIs do.

  `default` is an Experiment or a subclass of it, `command` a dataclass whose fields are flags that do not belong to the
  experiment's identity, such as where to write.
  """
  unprefixed = lambda value: (Annotated[type(value), tyro.conf.arg(name='')], dataclasses.field(default=value))
  both = dataclasses.make_dataclass('Flags', [('command', *unprefixed(command)), ('experiment', *unprefixed(default))],
                                    frozen=True)
  args = _as_values(sys.argv[1:] if args is None else args)
  parsed = tyro.cli(both, description=description, args=args)
  return parsed.experiment, parsed.command
