"""Settings by dotted name and by flag, what differs between two runs, and what is refused."""

import copy
import dataclasses
import json
import math

import pytest

from rlhf_jax import config
from rlhf_jax.config import (
  DataConfig,
  Experiment,
  MeshConfig,
  PPOConfig,
  RewardConfig,
  SFTConfig,
  differences,
  fields,
  override,
  parse,
  to_json,
)
from rlhf_jax.errors import ConfigError
from rlhf_jax.experience import ExperienceConfig
from rlhf_jax.losses.ppo import PPOLossConfig

INF, NAN = math.inf, math.nan


def setting(config, name):
  for part in name.replace('-', '_').split('.'):
    config = getattr(config, part)
  return config


@pytest.mark.parametrize('name, said, value', [
  ('seed', '3', 3),
  ('seed', 3, 3),
  ('preset', 'micro', 'micro'),
  ('pretrained', 'None', None),
  ('pretrained', '../models/a', '../models/a'),
  ('mesh.data', '4', 4),
  ('mesh.runner', 'pmap', 'pmap'),
  ('data.limits.prompt_tokens', '17', 17),
  ('data.limits.too-long', 'truncate', 'truncate'),
  ('ppo.kl_weight', '1e-3', 1e-3),
  ('ppo.kl-weight', 0.2, 0.2),
  ('ppo.kl_target_nats_per_sequence', '6', 6.0),
  ('ppo.loss.value_clip', None, None),
  ('ppo.loss.value_clip', '0.3', 0.3),
  ('ppo.shared_trunk', True, True),
  ('ppo.shared_trunk', 'true', True),
  ('ppo.experience.bessel', 'False', False),
  ('ppo.experience.missing_end_score', '-1.5', -1.5),
  ('sft.optimizer.schedule', 'constant', 'constant'),
  ('remat', 'dots', 'dots'),
  ('remat', 'True', 'block'),
  ('remat', True, 'block'),
  ('remat', 'false', 'none'),
  ('scan_layers', 'True', True),
  ('scan_layers', 'false', False),
  ('attention', 'cudnn', 'cudnn'),
])
def test_a_setting_is_read_as_its_flag_would_be(name, said, value):
  changed = override(Experiment(), {name: said})
  got = setting(changed, name)
  assert (got, type(got)) == (value, type(value))
  others = [other for other in fields(Experiment()) if other != name.replace('-', '_')]
  assert [setting(changed, other) for other in others] == [setting(Experiment(), other) for other in others]


@pytest.mark.parametrize('said', ['two words', '', '--dashes', "it's"])
def test_text_is_taken_as_it_is(said):
  assert override(Experiment(), {'data.path': said}).data.path == said


def test_several_settings_and_none():
  changed = override(Experiment(), {'ppo.loss.clip': '0.1', 'ppo.epochs': '2', 'ppo.loss.value_weight': '0.5'})
  assert (changed.ppo.loss.clip, changed.ppo.epochs, changed.ppo.loss.value_weight) == (0.1, 2, 0.5)
  assert override(Experiment(), {}) == Experiment()


def test_an_experiment_with_fields_of_its_own():
  @dataclasses.dataclass(frozen=True)
  class Mine(Experiment):
    """One more setting."""
    length_weight: float = 0.5  # of a reward of my own

  changed = override(Mine(), {'length_weight': '0.25', 'ppo.epochs': '1'})
  assert (type(changed), changed.length_weight, changed.ppo.epochs) == (Mine, 0.25, 1)


@pytest.mark.parametrize('name, says', [
  ('ppo.kl_wieght', "there is no setting 'ppo.kl_wieght'. Did you mean ppo.kl_weight"),
  ('ppo.loss.cilp', 'Did you mean ppo.loss.clip'),
  ('kl_weight', 'Did you mean .*ppo.kl_weight'),
  ('ppo', "there is no setting 'ppo'"),
  ('zzzzzz', 'Known: seed, preset, .*ppo.optimizer.learning_rate, .*wandb'),
])
def test_an_unknown_setting_names_the_nearest(name, says):
  with pytest.raises(ConfigError, match=says):
    override(Experiment(), {name: '1'})


@pytest.mark.parametrize('name, value, says', [
  ('sft.steps', 'many', "steps='many' is not a .*int"),
  ('sft.steps', '1.5', "steps='1.5' is not a .*int"),
  ('ppo.kl_weight', 'small', "kl_weight='small' is not a .*float"),
  ('ppo.shared_trunk', 'yes', "shared_trunk='yes' is not a truth value. Write True or False"),
  ('mesh.runner', 'mpi', "runner='mpi' is not .*'single', 'pmap', 'sharded'"),
  ('ppo.loss.value_clip', 'off', r"value_clip='off' is not a float \| None"),
  ('remat', 'all', "remat='all' is not .*'auto', 'none', 'dots', 'block'"),
  ('scan_layers', 'often', r"scan_layers='often' is not a bool \| None"),
])
def test_a_value_that_cannot_be_read(name, value, says, capsys):
  with pytest.raises(ConfigError, match=says):
    override(Experiment(), {name: value})
  assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('name, value, says', [
  ('ppo.temperature', '-1', 'PPO temperature=-1.0. It must be positive'),
  ('ppo.loss.clip', '0', 'PPO clip=0.0'),
  ('sft.steps', '0', 'SFTConfig steps=0. It must be at least 1'),
  ('ppo.experience.score_limit', '-3', 'score_limit=-3.0. It must be positive, or None'),
])
def test_a_value_that_the_config_refuses_says_why(name, value, says):
  with pytest.raises(ConfigError, match=says):
    override(Experiment(), {name: value})


def test_a_bad_value_names_the_whole_setting():
  with pytest.raises(ConfigError, match=r"sft.steps='many' is not an? int"):
    override(Experiment(), {'sft.steps': 'many'})


def test_differences_are_dotted_and_say_both_values():
  old = to_json(Experiment())
  assert differences(old, to_json(Experiment())) == []
  new = to_json(override(Experiment(), {'ppo.kl_weight': '0.1', 'seed': '4', 'ppo.loss.value_clip': 'None'}))
  assert differences(old, new) == ['ppo.kl_weight: 0.05 -> 0.1', 'ppo.loss.value_clip: 0.2 -> None', 'seed: 0 -> 4']
  del new['seed']
  assert 'seed: 0 -> (absent)' in differences(old, new)
  assert 'seed: (absent) -> 0' in differences(new, old)


def test_json_survives_being_written():
  config = override(Experiment(), {'ppo.kl_weight': 0.1 + 0.2, 'mesh.data': '2'})
  written = to_json(config)
  assert json.loads(json.dumps(written)) == written
  assert (written['ppo']['kl_weight'], written['mesh']['data'], written['pretrained']) == (0.1 + 0.2, 2, None)
  assert written['data']['limits'] == {'prompt_tokens': 128, 'response_tokens': 128, 'too_long': 'skip'}


def test_fields_are_the_leaves():
  names = list(fields(Experiment()))
  assert len(names) == len(set(names))
  assert {'seed', 'data.limits.too_long', 'ppo.experience.trace', 'sft.optimizer.learning_rate'} <= set(names)
  assert not {'ppo', 'data.limits'} & set(names)


@dataclasses.dataclass(frozen=True)
class Where:
  """What is no part of the experiment."""
  out: str = 'runs'  # where to write


def parsed(*args):
  return parse(Experiment(), Where(), 'An experiment.', list(args))


def test_flags():
  experiment, where = parsed('--ppo.kl-weight', '0.2', '--out', 'here', '--ppo.shared-trunk', '--ppo.experience.no-bessel',
                             '--ppo.loss.value-clip', 'None', '--data.limits.too-long', 'truncate')
  assert where == Where('here')
  assert experiment == override(Experiment(), {
    'ppo.kl_weight': '0.2', 'ppo.shared_trunk': True, 'ppo.experience.bessel': False, 'ppo.loss.value_clip': None,
    'data.limits.too_long': 'truncate'})
  assert parsed() == (Experiment(), Where())
  assert parsed('--ppo.kl_weight', '0.2')[0].ppo.kl_weight == 0.2


@pytest.mark.parametrize('flags, remat, scan_layers', [
  ([], 'auto', None),
  (['--remat'], 'block', None),
  (['--no-remat'], 'none', None),
  (['--remat', 'dots'], 'dots', None),
  (['--remat=none'], 'none', None),
  (['--remat', '--scan-layers'], 'block', True),
  (['--scan-layers', '--no-remat'], 'none', True),
  (['--no-scan-layers', '--remat'], 'block', False),
  (['--scan_layers', '--seed', '3'], 'auto', True),
  (['--scan-layers', 'False'], 'auto', False),
])
def test_settings_that_were_switches_are_still_set_like_them(flags, remat, scan_layers):
  experiment, where = parsed(*flags, '--out', 'here')
  assert (experiment.remat, experiment.scan_layers, where) == (remat, scan_layers, Where('here'))
  turned = override(Experiment(), {'remat': 'block', 'scan_layers': True})       # what the command line goes over
  again, _ = parse(turned, Where(), '', flags)
  assert again.remat == ('block' if remat == 'auto' else remat)
  assert again.scan_layers == (True if scan_layers is None else scan_layers)


def test_a_switch_can_be_left_to_the_device():
  turned = override(Experiment(), {'remat': True, 'scan_layers': True})
  back, _ = parse(turned, Where(), '', ['--scan-layers', 'None', '--remat', 'auto'])
  assert back == Experiment()
  assert override(turned, {'scan_layers': None, 'remat': 'auto'}) == Experiment()


def test_code_may_say_remat_as_it_did():
  assert [Experiment(remat=said).remat for said in (True, False, 'dots')] == ['block', 'none', 'dots']
  assert to_json(Experiment(remat=True))['remat'] == 'block'


def test_other_flags_are_handed_on_as_they_are():
  """A value that looks like a switch, and a flag that begins like one."""
  assert parsed('--out', 'remat')[1] == Where('remat')
  assert parsed('--preset', 'no-remat')[0].preset == 'no-remat'
  for flag in ('--rematerialise', '--no-attention'):
    with pytest.raises(SystemExit):
      parsed(flag)


def test_the_default_is_that_of_the_experiment():
  mine = override(Experiment(), {'sft.steps': '7'})
  assert parse(mine, Where(), '', ['--seed', '1'])[0] == override(mine, {'seed': 1})


@pytest.mark.parametrize('args, says', [
  (['--ppo.kl-wieght', '0.2'], '--ppo.kl-wieght'), (['--sft.steps', 'many'], 'many'),
  (['--ppo.temperature', '-1'], 'It must be positive'), (['--mesh.runner', 'mpi'], 'mpi')])
def test_a_flag_that_cannot_be_used_exits_with_2(args, says, capsys):
  with pytest.raises(SystemExit) as stopped:
    parsed(*args)
  assert stopped.value.code == 2
  said = capsys.readouterr()
  assert says in said.out + said.err


def test_help_has_the_comments(capsys):
  with pytest.raises(SystemExit) as stopped:
    parsed('--help')
  assert stopped.value.code == 0
  said = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
  assert 'all chance and all data order follow from it' in said
  assert 'reward lost for each nat that the policy moves from the SFT model' in said
  assert 'where to write' in said


@pytest.mark.parametrize('make, says', [
  (lambda: DataConfig(held_out_share=0.0), 'data held_out_share=0.0. It must lie between 0 and 1'),
  (lambda: DataConfig(held_out_share=1.0), 'data held_out_share=1.0'),
  (lambda: DataConfig(split='train_sft', held_out_split='train_sft'),
   "split is 'train_sft' and held_out_split 'train_sft'. What is trained on is not held out"),
  (lambda: DataConfig(held_out_split='train[:5%]'),
   r"split is 'train' and held_out_split 'train\[:5%\]'"),
  (lambda: DataConfig(split='train[5%:]', held_out_split='train'),
   r"split is 'train\[5%:\]' and held_out_split 'train'"),
  (lambda: SFTConfig(steps=0), 'SFTConfig steps=0. It must be at least 1'),
  (lambda: SFTConfig(microbatches=0), 'SFTConfig microbatches=0'),
  (lambda: RewardConfig(batch_size=-1), 'RewardConfig batch_size=-1'),
  (lambda: RewardConfig(evaluate_every=0), 'RewardConfig evaluate_every=0'),
  (lambda: PPOConfig(iterations=0), 'PPOConfig iterations=0'),
  (lambda: PPOConfig(minibatches=0), 'PPOConfig minibatches=0'),
  (lambda: PPOConfig(samples_every=0), 'PPOConfig samples_every=0'),
  (lambda: PPOConfig(temperature=0.0), 'PPO temperature=0.0. It must be positive: greedy answers have no probability'),
  (lambda: PPOConfig(temperature=INF), 'PPO temperature=inf. .* and finite'),
  (lambda: PPOConfig(kl_weight=-0.1),
   'PPO kl_weight=-0.1. It must be finite and not below 0. Pass 0 for no leash'),
  (lambda: PPOConfig(kl_weight=NAN), 'PPO kl_weight=nan'),
  (lambda: PPOConfig(kl_target_nats_per_sequence=0.0),
   'kl_target_nats_per_sequence=0.0. It must be positive, or None'),
  (lambda: PPOConfig(kl_target_nats_per_sequence=INF), 'kl_target_nats_per_sequence=inf'),
  (lambda: PPOConfig(kl_horizon_episodes=0),
   'kl_horizon_episodes=0. It must be positive and finite. Pass'),
  (lambda: PPOConfig(kl_stop_nats_per_sequence=0.0),
   'kl_stop_nats_per_sequence=0.0. It must be positive, or None'),
  (lambda: PPOConfig(kl_stop_nats_per_sequence=NAN), 'kl_stop_nats_per_sequence=nan'),
  (lambda: PPOConfig(reward_model_weight=NAN), 'PPO reward_model_weight=nan. It must be finite'),
  (lambda: PPOLossConfig(value_weight=-0.1),
   'PPO value_weight=-0.1. It must be finite and not below 0'),
  (lambda: PPOLossConfig(value_weight=INF), 'PPO value_weight=inf'),
  (lambda: PPOLossConfig(entropy_weight=NAN),
   'PPO entropy_weight=nan. It must be finite. Pass 0 for no bonus'),
  (lambda: PPOLossConfig(clip=INF), 'PPO clip=inf'),
  (lambda: PPOLossConfig(value_clip=NAN),
   'PPO value_clip=nan. It must be positive, or None for no clip'),
  (lambda: PPOLossConfig(dual_clip=INF), 'PPO dual_clip=inf. It must be above 1, or None'),
  (lambda: PPOLossConfig(log_ratio_limit=NAN), 'PPO log_ratio_limit=nan'),
  (lambda: ExperienceConfig(missing_end_score=NAN),
   'experience missing_end_score=nan. It must be finite'),
  (lambda: ExperienceConfig(kl_limit=NAN),
   'experience kl_limit=nan. It must be positive, or None for no limit'),
  (lambda: RewardConfig(centring_weight=-0.1),
   'reward centring_weight=-0.1. It must be finite and not below 0'),
  (lambda: Experiment(ppo=PPOConfig(frozen_dtype='bfloat16')),
   '--ppo.frozen-dtype bfloat16 with --dtype float32: the reference would be another model than the '
   'one that is trained. Pass --dtype bfloat16 too'),
  (lambda: Experiment(seed=-1), 'experiment seed=-1. It must be from 0 to 2147483647'),
  (lambda: Experiment(seed=2 ** 31),
   'experiment seed=2147483648. .* and larger seeds repeat it. Pass a smaller number'),
])
def test_what_cannot_work_is_refused(make, says):
  with pytest.raises(ConfigError, match=says):
    make()


def test_what_lies_on_the_edge_is_taken():
  Experiment(seed=0), Experiment(seed=2 ** 31 - 1)
  PPOConfig(kl_weight=0.0, reward_model_weight=-1.0, kl_stop_nats_per_sequence=INF)
  PPOLossConfig(value_weight=0.0, entropy_weight=-0.01), ExperienceConfig(missing_end_score=-1.5)
  Experiment(dtype='bfloat16', ppo=PPOConfig(frozen_dtype='bfloat16')), Experiment(dtype='bfloat16')


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    MeshConfig().fsdp = 2


def test_how_a_run_is_computed_may_change_and_nothing_else():
  written, computed = to_json(Experiment()), {
    'mesh.runner': 'pmap', 'attention': 'splash', 'remat': True, 'scan_layers': True,
    'sft.microbatches': 2, 'ppo.microbatches': 2, 'ppo.slots': 8, 'ppo.gather': False}
  assert config.changes(written, override(Experiment(), computed)) == []
  for more in ({'remat': 'dots', 'attention': 'cudnn', 'scan_layers': False}, {'remat': 'none', 'attention': 'xla'}):
    assert config.changes(written, override(Experiment(), more)) == []
  before = copy.deepcopy(written)  # as an older version wrote it
  before |= {'remat': False, 'scan_layers': False, 'attention': 'xla'}
  assert config.changes(before, override(Experiment(), computed)) == []
  del before['ppo']['frozen_dtype']  # as one wrote it that had no such field
  assert config.changes(before, Experiment()) == []
  assert config.changes(before, override(Experiment(), {'dtype': 'bfloat16', 'ppo.frozen_dtype': 'bfloat16'})) == [
    'dtype: float32 -> bfloat16', 'ppo.frozen_dtype: float32 -> bfloat16']
  others = override(Experiment(), {
    'dtype': 'bfloat16', 'ppo.minibatches': 2, 'sft.optimizer.moment_dtype': 'bfloat16'})
  assert [change.partition(':')[0] for change in config.changes(written, others)] == [
    'dtype', 'ppo.minibatches', 'sft.optimizer.moment_dtype']
