"""Many runs of one experiment: a grid or a list of dotted overrides, times several seeds, with a table and a plot.

    python -m experiments.sweep quickstart --grid ppo.kl_weight=0.01,0.03,0.1 sft.steps=200,400 --seeds 0 1 2
    python -m experiments.sweep quickstart --list points.json --seeds 0 1 2       [{"ppo.kl_weight": 0.01}, ...]

Every run has a directory of its own under the sweep's, named by its overrides and seed. The same command goes on where it
stopped. A run that fails is reported, the others go on, and the exit status is 1.

On a cluster, one run per task of an array job, with the number of tasks from --count and the table when all are done:

    python -m experiments.sweep quickstart --grid ppo.kl_weight=0.01,0.03 --seeds 0 1 --count
    python -m experiments.sweep quickstart --grid ppo.kl_weight=0.01,0.03 --seeds 0 1 --index $SLURM_ARRAY_TASK_ID
    python -m experiments.sweep quickstart --grid ppo.kl_weight=0.01,0.03 --seeds 0 1 --table
"""

import dataclasses
import difflib
import hashlib
import importlib
import itertools
import json
import pathlib
import re
import statistics
import sys

import matplotlib.pyplot as plt
import tyro

from rlhf_jax import cli, config, processes, report
from rlhf_jax.errors import ConfigError, RlhfJaxError
from rlhf_jax.processes import ProcessesConfig
from rlhf_jax.startup import prepare_process

_LONGEST_NAME = 180  # of a directory, in characters; most file systems take 255
_KL = 'PPO.KL, nats per answer'
_SHOWN = ('sft.loss', 'reward.accuracy', 'SFT.gold score', 'PPO.gold score', 'SFT.score', 'PPO.score',
          _KL)  # table.json has every number


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Which runs, of what, and what to do with them."""
  name: tyro.conf.Positional[str]  # experiment: a module of experiments/, such as quickstart, or any by its dotted name
  grid: tuple[str, ...] = ()  # SETTING=VALUE,VALUE ...: every combination of their values
  list: str | None = None  # JSON file of a list of {setting: value}, or that list itself; with a grid, each times each
  seeds: tuple[int, ...] = (0,)  # every point is run with each of them
  set: tuple[str, ...] = ()  # SETTING=VALUE ...: for all runs, not part of their names
  stages: tuple[cli.Stage, ...] = ('sft', 'reward', 'ppo')  # which to run
  run_dir: str = ''  # of the sweep; empty: runs/sweep-NAME
  index: int | None = None  # run this one only, from 0
  count: bool = False  # print how many runs there are, and run none
  table: bool = False  # make table and plot of the runs that are finished, and run none
  export: bool = True  # write the finished models of every run as Hugging Face directories
  processes: ProcessesConfig = ProcessesConfig()


@dataclasses.dataclass(frozen=True)
class Point:
  """One run: its overrides as they ended up in the config, and where it is written."""
  settings: dict[str, object]
  experiment: config.Experiment
  directory: pathlib.Path


def main(args=None):
  """The command line; exits with 1 if a run failed, else as `cli.clear_exits` says."""
  with cli.clear_exits():
    sweep = tyro.cli(Sweep, description=__doc__, args=args)
    module = load_experiment(sweep.name)
    points = make_points(sweep, module.EXPERIMENT)
    if sweep.processes.coordinator is not None:                                 # to meet the others, JAX begins
      prepare_process(_chosen(points, sweep.index)[0].experiment.mesh.cpu_devices)
  with cli.clear_exits(_directory(sweep), sweep.processes.lost_s), processes.joined(sweep.processes):
    failed = run(sweep, module, points)
  if failed:
    processes.leave(1)


def run(sweep, module, points):
  """Does what the flags say with the points of an experiment; returns {directory name: message} of the runs that failed."""
  if sweep.count:
    print(len(points))
    return {}
  failed = {} if sweep.table else _run_points(_chosen(points, sweep.index), module.make_task, sweep)
  if sweep.index is None:
    processes.once('sweep', lambda: summarise(points, sweep.stages, _directory(sweep)))
  return failed


def load_experiment(name):
  """The module of an experiment; raises ConfigError that names the nearest."""
  path = name if '.' in name else f'experiments.{name}'
  try:
    module = importlib.import_module(path)
  except ModuleNotFoundError as error:
    if not f'{path}.'.startswith(f'{error.name}.'):
      raise                                                                     # it is there, but misses something itself
    known = sorted(path.stem for path in pathlib.Path(__file__).parent.glob('*.py') if not path.stem.startswith('_'))
    near = difflib.get_close_matches(name, known, n=1) or [', '.join(known)]
    raise ConfigError(f'there is no experiment {name!r}. Did you mean {near[0]}?') from error
  if not (hasattr(module, 'EXPERIMENT') and hasattr(module, 'make_task')):
    raise ConfigError(f'{module.__name__} is no experiment: it lacks EXPERIMENT or make_task. Name a module that has both.')
  return module


# ---- which runs

def make_points(sweep, experiment):
  """Every run of the sweep, checked: list times grid times seeds, the seeds fastest."""
  common = dict(_pair(text) for text in sweep.set)
  axes = [[(name, value) for value in values.split(',')] for name, values in map(_pair, sweep.grid)]
  listed = _listed(sweep.list)
  points = []
  for entry, chosen, seed in itertools.product(listed, itertools.product(*axes), sweep.seeds):
    settings = {name.replace('-', '_'): value for name, value in (entry | dict(chosen)).items()}
    _check_names(settings, common)
    made = config.override(dataclasses.replace(experiment, seed=seed), common | settings)
    known = {name: _value(made, name) for name in settings}
    points.append(Point(known, made, _directory(sweep) / directory_name(known, seed)))
  return _checked(points)


def _checked(points):
  if not points:
    raise ConfigError('the sweep has no runs: --seeds or --list is empty. Give at least one seed, and one entry.')
  seen = set()
  for point in points:
    if point.directory in seen:
      raise ConfigError(f'the sweep has {point.directory.name} twice. Give each value and each seed once.')
    seen.add(point.directory)
  return points


def _check_names(settings, common):
  if 'seed' in settings or 'seed' in common:
    raise ConfigError('the seed is no setting of a sweep: it names runs of one point. Pass --seeds 0 1 2.')
  twice = settings.keys() & {name.replace('-', '_') for name in common}
  if twice:
    raise ConfigError(f'{", ".join(sorted(twice))} is varied and in --set too. Give it in one of them.')


def _pair(text):
  name, equals, value = text.partition('=')
  if not equals or not name or not value:
    raise ConfigError(f'{text!r} is not SETTING=VALUE, such as ppo.kl_weight=0.03.')
  return name, value


def _listed(text):
  """The entries of --list, each a dict of settings; one without any where the flag is not given."""
  if text is None:
    return [{}]
  inline = text.lstrip().startswith('[')
  try:
    entries = json.loads(text if inline else pathlib.Path(text).read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(f'--list {text}: {error}. Needed is a JSON file, [{{"ppo.kl_weight": 0.01}}, ...], or that list '
                      'itself.') from error
  if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
    raise ConfigError(f'--list {text} is not a list of objects. Needed is [{{"ppo.kl_weight": 0.01}}, ...].')
  return entries


def _value(experiment, name):
  for part in name.split('.'):
    experiment = getattr(experiment, part)
  return experiment


def directory_name(settings, seed):
  """'ppo.kl_weight=0.01,seed=2': what the file system or its length forbids is replaced, and a digest keeps it unique."""
  name = ','.join([f'{key}={value}' for key, value in settings.items()] + [f'seed={seed}'])
  plain = re.sub(r'[^\w.,=+-]', '_', name)
  if plain == name and len(name) <= _LONGEST_NAME:
    return name
  digest = hashlib.sha256(name.encode()).hexdigest()[:8]
  return f'{plain[:_LONGEST_NAME]},{digest},seed={seed}'


def _directory(sweep):
  return pathlib.Path(sweep.run_dir or f'runs/sweep-{sweep.name}')


def _chosen(points, index):
  if index is None:
    return points
  if not 0 <= index < len(points):
    raise ConfigError(f'--index {index}, but the sweep has {len(points)} runs. Needed is 0 to {len(points) - 1}.')
  return [points[index]]


# ---- running

def _run_points(points, make_task, sweep):
  _check_devices(points)
  failed = {}
  for number, point in enumerate(points, 1):
    print(f'[{number}/{len(points)}] {point.directory.name}', flush=True)
    if processes.first_says(results(point, sweep.stages) is not None):
      print('finished before, skipped')
      continue
    try:
      command = cli.Command(stages=sweep.stages, export=sweep.export)
      cli.run_stages(point.experiment, make_task, point.directory, command)
    except RlhfJaxError as error:
      if processes.are_several():                                               # the others may not have failed
        raise
      failed[point.directory.name] = f'{type(error).__name__}: {error}'
      print(f'failed, {failed[point.directory.name]}', file=sys.stderr, flush=True)
  if failed:
    print(f'{len(failed)} of {len(points)} runs failed: {"; ".join(failed)}', file=sys.stderr)
  return failed


def _check_devices(points):
  counts = list(dict.fromkeys(point.experiment.mesh.cpu_devices for point in points))
  if len(counts) > 1:
    raise ConfigError(f'the sweep has runs with mesh.cpu_devices {" and ".join(map(str, counts))}, but a process keeps the '
                      f'devices that it begins with. Give each run a process: --index 0 to {len(points) - 1}, then --table.')


def results(point, stages):
  """The numbers of a run that finished these stages with this config, {'PPO.score': ...}; None of another."""
  try:
    written = json.loads((point.directory / 'experiment.json').read_text())
    found = json.loads((point.directory / 'results.json').read_text())
  except (OSError, ValueError):                                                 # not there, or half written by a kill
    return None
  needed = {*stages, 'table'} if 'ppo' in stages else set(stages)
  if config.changes(written, point.experiment) or not needed <= found.keys():
    return None
  parts = {name: values for name, values in found.items() if name != 'table'} | found.get('table', {})
  return {f'{part}.{name}': value for part, values in parts.items() for name, value in values.items()}


# ---- table and plot

def summarise(points, stages, directory):
  """Prints mean and standard deviation over seeds, and writes table.json and sweep.png; returns the rows of the table."""
  rows = table(points, stages)
  finished = [row for row in rows if row['runs']]
  if not finished:
    print(f'No run in {directory} is finished, so there is no table yet.')
    return rows
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'table.json').write_text(json.dumps(rows, indent=2) + '\n')
  shown = [name for name in _SHOWN if any(name in row['mean'] for row in finished)]
  columns = {name: {_label(row): _spread(row, name) for row in finished} for name in shown}
  columns |= {'runs': {_label(row): f'{row["runs"]}/{row["of"]}' for row in finished}}
  report.print_table(columns, 'Mean and standard deviation over seeds')
  draw(finished, directory / 'sweep.png')
  print(f'{directory}: table.json, sweep.png')
  return rows


def table(points, stages):
  """One row a point: its settings, how many of its runs are finished, and each number's mean, spread and values."""
  rows = []
  for _, group in itertools.groupby(points, key=lambda point: json.dumps(point.settings)):
    group = list(group)
    found = {point.experiment.seed: results(point, stages) for point in group}
    by_seed = {seed: numbers for seed, numbers in found.items() if numbers is not None}
    names = dict.fromkeys(name for numbers in by_seed.values() for name in numbers)
    values = {name: [numbers[name] for numbers in by_seed.values() if numbers.get(name) is not None] for name in names}
    rows.append({'settings': group[0].settings, 'runs': len(by_seed), 'of': len(group), 'seeds': list(by_seed),
                 'mean': {name: statistics.fmean(all_of) for name, all_of in values.items() if all_of},
                 'std': {name: statistics.stdev(all_of) for name, all_of in values.items() if len(all_of) > 1},
                 'values': values})
  return rows


def _label(row):
  """The settings by the last part of their names, or by all of it where that part is not enough."""
  ends = [name.rpartition('.')[2] for name in row['settings']]
  shown = [end if ends.count(end) == 1 else name for end, name in zip(ends, row['settings'])]
  return ', '.join(f'{name}={value}' for name, value in zip(shown, row['settings'].values())) or 'as it is'


def _spread(row, name):
  if name not in row['mean']:
    return '-'
  return f'{row["mean"][name]:.3g}' + (f' ± {row["std"][name]:.2g}' if name in row['std'] else '')


def draw(rows, path):
  """Score against KL, a dot a run and a cross a point's mean; or bars, where no run has an answer's score."""
  score = _first(rows, ('PPO.gold score', 'PPO.score'))
  figure, axis = plt.subplots(figsize=(8, 5), layout='constrained')
  if score:
    for number, row in enumerate(row for row in rows if score in row['mean']):
      colour = f'C{number % 10}'
      axis.scatter(row['values'][_KL], row['values'][score], color=colour, alpha=0.5, s=20)
      axis.errorbar(row['mean'][_KL], row['mean'][score], xerr=row['std'].get(_KL), yerr=row['std'].get(score), color=colour,
                    marker='x', capsize=3, label=_label(row))
    axis.set_xlabel('KL to the SFT model, nats per answer')
    axis.set_ylabel(score)
    axis.legend(fontsize='small')
  else:
    name = _first(rows, ('reward.accuracy', 'sft.loss'))
    some = [row for row in rows if name in row['mean']]
    axis.barh([_label(row) for row in some], [row['mean'][name] for row in some],
              xerr=[row['std'].get(name, 0.0) for row in some], capsize=3)
    axis.set_xlabel(name)
  axis.grid(alpha=0.3)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _first(rows, names):
  return next((name for name in names if any(name in row['mean'] for row in rows)), None)


if __name__ == '__main__':
  main()
