"""Sweeps: which runs they make, that a failure stops no other, that they go on where they stopped, and the table."""

import json
import re
import statistics

import pytest

from experiments import quickstart, sweep
from rlhf_jax.errors import ConfigError

SMALL = ('sft.steps=2', 'sft.optimizer.warmup_steps=0', 'reward.steps=2', 'reward.optimizer.warmup_steps=0',
         'sft.batch_size=8', 'reward.batch_size=8', 'ppo.iterations=1', 'ppo.batch_size=8',
         'ppo.epochs=1', 'world.demonstrations=32', 'world.ranked_prompts=16', 'world.answers_per_prompt=2',
         'data.limits.prompt_tokens=48', 'data.limits.response_tokens=6', 'data.limits.too_long=truncate',
         'tensorboard=False', 'mesh.runner=single', 'mesh.cpu_devices=None')


def flags(*args, **fields):
  return sweep.Sweep('quickstart', *args, **fields)


def names(**fields):
  return [point.directory.name for point in sweep.make_points(flags(**fields), quickstart.EXPERIMENT)]


# ---- which runs

def test_a_grid_is_every_combination_and_seeds_come_fastest():
  assert names(grid=('ppo.kl_weight=1e-2,0.03', 'sft.steps=5,7'), seeds=(0, 3)) == [
    f'ppo.kl_weight={kl},sft.steps={steps},seed={seed}' for kl in (0.01, 0.03) for steps in (5, 7) for seed in (0, 3)]


def test_a_list_is_every_entry_from_a_file_or_the_command_line(tmp_path):
  entries = [{'ppo.kl_weight': 0.01, 'sft.steps': 5}, {'ppo.loss.value-clip': None}]
  expected = ['ppo.kl_weight=0.01,sft.steps=5,seed=0', 'ppo.loss.value_clip=None,seed=0']
  (tmp_path / 'points.json').write_text(json.dumps(entries))
  assert names(list=str(tmp_path / 'points.json')) == names(list=json.dumps(entries)) == expected


def test_a_list_and_a_grid_multiply():
  assert names(list='[{"sft.steps": 5}, {"sft.steps": 7}]', grid=('ppo.epochs=1,2',)) == [
    f'sft.steps={steps},ppo.epochs={epochs},seed=0' for steps in (5, 7) for epochs in (1, 2)]


def test_the_configs_have_the_overrides_and_what_is_set_for_all():
  points = sweep.make_points(flags(grid=('ppo.kl_weight=0.01,0.03',), set=('sft.steps=5',), seeds=(2,)),
                             quickstart.EXPERIMENT)
  assert [(p.experiment.ppo.kl_weight, p.experiment.sft.steps, p.experiment.seed) for p in points] == [
    (0.01, 5, 2), (0.03, 5, 2)]


def test_names_are_fit_for_a_file_system_and_stay_apart():
  paths = names(grid=('pretrained=a/b,a:b',)) + names(grid=(f'pretrained={"x" * 300}1,{"x" * 300}2',))
  assert len(set(paths)) == 4
  assert all(len(path) < 255 and re.fullmatch(r'[\w.,=+-]+', path) for path in paths)


@pytest.mark.parametrize('fields, match', [
  ({'grid': ('ppo.kl_wieght=0.1',)}, r"no setting 'ppo.kl_wieght'. Did you mean ppo.kl_weight"),
  ({'set': ('sft.step=5',)}, r"no setting 'sft.step'. Did you mean sft.steps"),
  ({'grid': ('sft.steps=many',)}, r"sft.steps='many' is not a int"),
  ({'grid': ('sft.steps',)}, r"'sft.steps' is not SETTING=VALUE"),
  ({'grid': ('ppo.kl_weight=0.01,1e-2',)}, r'has ppo.kl_weight=0.01,seed=0 twice'),
  ({'seeds': (1, 1)}, r'has seed=1 twice'),
  ({'seeds': ()}, r'the sweep has no runs'),
  ({'grid': ('seed=1,2',)}, r'the seed is no setting of a sweep.*--seeds 0 1 2'),
  ({'grid': ('sft.steps=1,2',), 'set': ('sft.steps=3',)}, r'sft.steps is varied and in --set too'),
  ({'list': 'absent.json'}, r'--list absent.json: .*No such file'),
  ({'list': '[{"sft.steps": 5}'}, r'--list .* Needed is a JSON file'),
  ({'list': '[5]'}, r'is not a list of objects'),
])
def test_what_cannot_be_a_sweep_is_said_before_any_run(fields, match):
  with pytest.raises(ConfigError, match=match):
    names(**fields)


def test_the_nearest_experiment_is_named():
  with pytest.raises(ConfigError, match=r"no experiment 'quikstart'. Did you mean quickstart\?"):
    sweep.load_experiment('quikstart')
  with pytest.raises(ConfigError, match=r'experiments.sweep is no experiment'):
    sweep.load_experiment('sweep')
  assert sweep.load_experiment('experiments.quickstart') is quickstart


# ---- from the command line

def test_count_prints_how_many_tasks_an_array_job_needs(capsys, tmp_path):
  sweep.main(['quickstart', '--grid', 'sft.steps=1,2', 'ppo.epochs=1,2', '--seeds', '0', '1', '2', '--count',
              '--run-dir', str(tmp_path)])
  assert capsys.readouterr().out == '12\n'


def test_an_index_outside_is_an_error_and_exits_with_2(capsys, tmp_path):
  with pytest.raises(SystemExit, match='2'):
    sweep.main(['quickstart', '--index', '1', '--run-dir', str(tmp_path)])
  assert '--index 1, but the sweep has 1 runs. Needed is 0 to 0.' in capsys.readouterr().err


def test_a_process_cannot_sweep_over_its_devices(capsys, tmp_path):
  with pytest.raises(SystemExit, match='2'):
    sweep.main(['quickstart', '--grid', 'mesh.cpu_devices=1,2', '--run-dir', str(tmp_path)])
  said = capsys.readouterr().err
  assert 'ConfigError: the sweep has runs with mesh.cpu_devices 1 and 2, but' in said and '--index 0 to 1, then' in said
  assert not list(tmp_path.iterdir())


def test_one_run_that_fails_is_reported_and_the_other_goes_on(capsys, tmp_path):
  args = ['quickstart', '--grid', 'sft.batch_size=1000,8', '--set', *(s for s in SMALL if 'sft.batch' not in s),
          '--stages', 'sft', '--no-export', '--run-dir', str(tmp_path)]
  with pytest.raises(SystemExit, match='1'):
    sweep.main(args)
  said = capsys.readouterr()
  assert re.search(r'failed, DataError: \d+ examples do not fill one batch of 1000', said.err)
  assert '1 of 2 runs failed: sft.batch_size=1000,seed=0' in said.err
  failed, finished = json.loads((tmp_path / 'table.json').read_text())
  assert (failed['runs'], finished['runs']) == (0, 1) and finished['mean']['sft.loss'] > 0
  assert (tmp_path / 'sweep.png').stat().st_size > 0


def test_runs_one_by_one_by_index_then_the_table_then_nothing_left_to_do(capsys, tmp_path):
  args = ['quickstart', '--grid', 'sft.steps=3', '--seeds', '0', '4', '--set', *(s for s in SMALL if 'sft.steps' not in s),
          '--stages', 'sft', '--no-export', '--run-dir', str(tmp_path)]
  sweep.main([*args, '--table'])
  assert 'No run in' in capsys.readouterr().out and not (tmp_path / 'table.json').exists()
  sweep.main([*args, '--index', '1'])
  assert [path.name for path in tmp_path.iterdir()] == ['sft.steps=3,seed=4']
  sweep.main([*args, '--table'])
  row, = json.loads((tmp_path / 'table.json').read_text())
  assert (row['runs'], row['of'], row['seeds'], row['std']) == (1, 2, [4], {})

  capsys.readouterr()
  sweep.main(args)
  said = capsys.readouterr().out
  assert said.count('finished before, skipped') == 1 and 'steps=3' in said and '2/2' in said
  row, = json.loads((tmp_path / 'table.json').read_text())
  losses = [json.loads((tmp_path / f'sft.steps=3,seed={seed}' / 'results.json').read_text())['sft']['loss']
            for seed in (0, 4)]
  assert row['settings'] == {'sft.steps': 3} and row['values']['sft.loss'] == losses
  assert row['mean']['sft.loss'] == pytest.approx(sum(losses) / 2)
  assert row['std']['sft.loss'] == pytest.approx(statistics.stdev(losses))

  sweep.main(args)
  assert capsys.readouterr().out.count('finished before, skipped') == 2


def test_a_point_is_labelled_by_as_much_of_its_names_as_is_needed():
  settings = {'sft.steps': 5, 'reward.steps': 7, 'ppo.kl_weight': 0.1}
  assert sweep._label({'settings': settings}) == 'sft.steps=5, reward.steps=7, kl_weight=0.1'


def test_numbers_of_another_config_are_not_taken(tmp_path):
  point, = sweep.make_points(flags(run_dir=str(tmp_path)), quickstart.EXPERIMENT)
  other, = sweep.make_points(flags(run_dir=str(tmp_path), set=('sft.steps=5',)), quickstart.EXPERIMENT)
  point.directory.mkdir(parents=True)
  (point.directory / 'results.json').write_text('{"sft": {"loss": 1.5}}')
  (point.directory / 'experiment.json').write_text(json.dumps(sweep.config.to_json(point.experiment)))
  assert sweep.results(point, ['sft']) == {'sft.loss': 1.5}
  assert sweep.results(other, ['sft']) is None and sweep.results(point, ['sft', 'reward']) is None
  (point.directory / 'results.json').write_text('{"ppo": {"score": 2.5}, "table": {"PPO": {"score": 3}}}')
  assert sweep.results(point, ['ppo']) == {'ppo.score': 2.5, 'PPO.score': 3}
