"""The workloads of `bench` through other libraries: PyTorch, and `transformers`, with ours beside them.

    python -m experiments.bench_peers
    python -m experiments.bench_peers --only sft generate --preset medium --repeats 3
    python -m experiments.bench_peers --device gpu --json peers.json

On the CPU everything is float32 with random weights, and runs through `torch.compile`. Each side has a process of its own,
and the rounds alternate, so that a noisy machine is noisy for all; what counts is the ratio. Our side makes a device of
each of two cores (--mesh.runner pmap --mesh.cpu-devices 2); PyTorch's threads share them. The PyTorch side is what a
careful person writes by hand (`peers/by_hand.py`), for the Llama family. Of `transformers`, SFT and `generate` with a
static cache.

On a GPU (--device gpu) products are in bfloat16, parameters and moments in float32, and the models on PyTorch's side are
those of `transformers` (`peers/on_device.py`), of any family. Sides run one after another, each with the whole device,
in a process of its own that is killed after --limit-s seconds; no side begins once --budget-s seconds are over. Results
are printed, and written to --json, as they come: seconds are medians of rounds after the first; the first result counts
from when a side has imported its libraries, with everything compiled anew; memory is the most that was allocated at a
time; TFLOP/s are counted as in `bench`. PyTorch's steps are compiled for the workloads that --compiled names: not PPO's by
default, for compiling two networks takes longer than a side has.

Needs the extra `test`, which brings torch, and for a GPU a CUDA build of it. Absent on purpose: PPO of libraries that no
longer have it.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Literal

import jax
import transformers
import tyro

try:
  import torch
except ImportError:
  sys.exit("bench_peers compares with PyTorch, which is not installed. Install it: pip install -e '.[test]'")

from experiments import bench
from experiments.benchmarks.running import AttentionName, Remat, Scan, changes
from experiments.peers import gpus, sides
from experiments.peers.in_turns import SIDES, compare
from experiments.peers.work import DONE_BY as ON_GPU
from experiments.peers.work import Work, Workload
from rlhf_jax import report
from rlhf_jax.config import MeshConfig
from rlhf_jax.errors import ConfigError, RlhfJaxError
from rlhf_jax.model.config import preset
from rlhf_jax.model.forward import check_length


@dataclasses.dataclass(frozen=True)
class BenchPeers:
  """What is compared, and how often."""
  device: Literal['cpu', 'gpu'] = 'cpu'  # where
  preset: str | None = None  # model, by name; None: small on CPUs, llama3.2-1b on GPUs, with pythia-1b for PPO
  batch: bench.BatchConfig = bench.BatchConfig()
  mesh: MeshConfig = MeshConfig(runner='pmap', cpu_devices=2)  # our devices where these are CPUs; a GPU is one
  repeats: int = 5  # rounds that count, after two that compile and warm up; on GPUs after one, and while time is left
  only: tuple[Workload, ...] = ('sft', 'reward', 'generate', 'ppo')  # workloads
  json: str = ''  # file that gets the results
  limit_s: float = 75  # GPUs: of each side
  budget_s: float = 290  # GPUs: of all sides together
  compiled: tuple[Workload, ...] = ('sft', 'reward', 'generate')  # GPUs: workloads that PyTorch compiles
  attention: AttentionName = 'auto'  # GPUs: of our side
  remat: Remat = 'auto'  # GPUs: of our side
  scan: Scan = 'auto'  # GPUs: of our side


ON_A_GPU = BenchPeers(device='gpu', batch=gpus.BATCH, only=tuple(ON_GPU))


# ---- in turns, on the CPU

def on_cpu(asked):
  """The comparison in turns, shown as a table; returns what `compare` found."""
  name = asked.preset or 'small'
  config = preset(name)
  if config.family != 'llama':
    raise ConfigError(f'--preset {name} is of the family {config.family}; on CPUs the peers are written for llama. Take '
                      'one of llama, or --device gpu.')
  found = compare(config, asked.batch, asked.mesh, asked.only, asked.repeats)
  whole = {f'{who}, s': {name: seconds.get(who) for name, seconds in found.items()} for who in SIDES}
  ratio = {f'rlhf_jax as fast as {who}': {name: seconds[who] / seconds['rlhf_jax'] for name, seconds in found.items()
                                          if who in seconds} for who in SIDES if who != 'rlhf_jax'}
  report.print_table(whole | ratio, f'{name}, float32, medians of {asked.repeats} rounds in turns; {_versions()}')
  if asked.json:
    _write(asked.json, {'versions': _versions(), 'seconds': found})
  return found


def _versions():
  return f'torch {torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}'


# ---- one after another, on a GPU

def works(asked, device='gpu', dtype='bfloat16'):
  """The Work of every side, by workload in the order of importance."""
  runs = changes(asked.attention, asked.remat, asked.scan)
  return [Work(side, workload, asked.preset or gpus.PRESETS[workload], asked.batch, device, dtype,
               workload in asked.compiled, runs if side == 'rlhf_jax' else {}, asked.repeats)
          for workload, who in ON_GPU.items() if workload in asked.only for side in who]


def check(asked):
  """Raises ConfigError for what cannot be measured, before any side begins."""
  for name, count in {'limit-s': asked.limit_s, 'budget-s': asked.budget_s}.items():
    if not count > 0:
      raise ConfigError(f'--{name} {count:g}. It must be above 0 seconds.')
  for work in works(asked):
    sizes, config = work.batch, preset(work.preset, dtype=work.dtype, **work.running)
    length = {'sft': sizes.tokens, 'reward': sizes.of_reward, 'ppo': sum(sizes.of_ppo),
              'generate': sizes.prompt_tokens + sizes.new_tokens}[work.workload]
    check_length(config, length)
  if asked.json:
    _write(asked.json, {'finished': False, 'results': []})


def on_gpu(asked, device='gpu', dtype='bfloat16'):
  """The comparison one side after another; returns the rows as plain JSON values.

  With device 'cpu' and a small preset the same code runs where there is no GPU.
  """
  head = {'versions': _versions(), 'limit_s': asked.limit_s, 'budget_s': asked.budget_s,
          'batch': dataclasses.asdict(asked.batch)}
  rows = []

  def say(row):
    rows.append(row)
    print(line(row), flush=True)
    if asked.json:
      _write(asked.json, head | {'finished': False, 'results': [each.to_json() for each in rows]})

  print(f'{dtype}, one side after another on one device; {_versions()}', flush=True)
  sides.compare(works(asked, device, dtype), asked.limit_s, asked.budget_s, say)
  devices = sorted({row.found['device'] for row in rows if 'device' in row.found})
  print(f'on {", ".join(devices) or "no device: nothing was measured"}', flush=True)
  for text in ratios(rows):
    print(text, flush=True)
  found = head | {'finished': True, 'results': [each.to_json() for each in rows]}
  if asked.json:
    _write(asked.json, found)
  return found


def line(row):
  """One line on one workload of one side."""
  work, found = row.work, row.found
  how = ', compiled' if work.compiled else ', eager'
  who = work.side + ('' if work.side == 'rlhf_jax' else how)
  if row.seconds is None:
    return f'{work.title} | {who} | {found.get("error", "nothing measured")}'
  seconds = found['seconds']
  said = [f'{seconds["median"]:.4g} s ({seconds["min"]:.4g} to {seconds["max"]:.4g}, '
          f'{found["rounds"]} rounds)', f'{found["tokens_per_second"]:,.0f} tokens/s']
  if 'tflops' in found:
    said.append(f'{found["tflops"]:.3g} TFLOP/s')
  if len(found['parts']) > 1:
    said.append(', '.join(f'{name} {part:.3g}' for name, part in found['parts'].items()))
  if found['peak_bytes'] is not None:
    said.append(f'{found["peak_bytes"] / 2 ** 30:.1f} GiB')
  said.append(f'first result after {found["first_s"]:.1f} s')
  return f'{work.title} | {who} | ' + ' | '.join(said) + _failed_later(found)


def _failed_later(found):
  return f' | then {found["error"]}' if 'error' in found else ''


def ratios(rows):
  """A sentence for each peer that measured what we measured."""
  ours = {row.work.workload: row.seconds for row in rows if row.work.side == 'rlhf_jax'}
  for row in rows:
    mine = ours.get(row.work.workload)
    if row.work.side != 'rlhf_jax' and row.seconds and mine:
      yield (f'{row.work.title}: rlhf_jax is {row.seconds / mine:.2f} times as fast as '
             f'{row.work.side}')


# ---- the command

def main(args=None):
  """The command line; returns what was found."""
  asked = tyro.cli(BenchPeers, description=__doc__, args=args)
  if asked.device == 'gpu':                                      # whose sizes are others
    asked = tyro.cli(BenchPeers, description=__doc__, args=args, default=ON_A_GPU)
  try:
    if asked.repeats < 1 or not asked.only:
      raise ConfigError('nothing is measured: --repeats must be at least 1, and --only name some workload.')
    if asked.device == 'cpu':
      return on_cpu(asked)
    check(asked)
    gpus.check()
    return on_gpu(asked)
  except RlhfJaxError as error:
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    sys.exit(2)


def _write(path, values):
  """The file with these values, or as it was: never half of it."""
  path = pathlib.Path(path)
  unfinished = path.with_name(path.name + '.unfinished')
  try:
    unfinished.write_text(json.dumps(values, indent=2) + '\n')
    unfinished.rename(path)
  except OSError as error:
    raise ConfigError(f'--json {path}: {error.strerror}. Needed is a file that can be written.') from error


if __name__ == '__main__':
  main()
