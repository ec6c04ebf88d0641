"""How long the programs of a run take to compile, for devices that need not be here, and what is in them.

    python -m experiments.bench_compile --on h100:1 --preset llama3.2-1b
    python -m experiments.bench_compile --on h100:1 --experiment quickstart --json compile.json
    python -m experiments.bench_compile --on cpu:1

The five programs of a run (SFT step, reward step, generate, experience, PPO update) are compiled by the functions that the
stages call, from shapes alone: `--on` takes what `--plan` takes. Each is traced, lowered to StableHLO and compiled, each
timed; no cache is read or written. `--threads 2` compiles two at a time: the total is what a clock shows. Without
`--experiment` the sizes are 64 sequences of 512 + 53 tokens and PPO with 4 epochs of 4 minibatches; with it, they are those
of that experiment.

XLA compiles for an absent GPU by heuristics where it would measure kernels on a present one, so there it takes longer.
Temporaries are those of one device. Kernels are counted in the compiled program and in each trip of its loops
(`benchmarks/kernels.py`): where layers are scanned, the inner loop is a layer.
"""

import concurrent.futures
import dataclasses
import importlib
import json
import pathlib
import sys
import time
from typing import Literal

import jax
import tyro

from experiments.benchmarks import kernels
from experiments.benchmarks.running import AttentionName, Remat, Scan, changes
from rlhf_jax import chips, cli, planner, report
from rlhf_jax import config as configs
from rlhf_jax.config import DataConfig, Experiment, MeshConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_jax.data.encode import Limits
from rlhf_jax.errors import ConfigError, RlhfJaxError

DEFAULT = Experiment(
  preset='llama3.2-1b', dtype='bfloat16',
  data=DataConfig(limits=Limits(prompt_tokens=512, response_tokens=53)),
  sft=SFTConfig(batch_size=16), reward=RewardConfig(batch_size=16),
  ppo=PPOConfig(batch_size=64, epochs=4, minibatches=4))


@dataclasses.dataclass(frozen=True)
class BenchCompile:
  """What is compiled, and for what."""
  on: str = 'h100:1'  # devices, as --plan takes them: h100:1, v5p:4x4x4, cpu:1
  experiment: str = ''  # sizes of a module in experiments, e.g. quickstart; empty: those above
  preset: str | None = None  # model, by name; None: llama3.2-1b, or that of the experiment
  stages: tuple[Literal['sft', 'reward', 'ppo'], ...] = ('sft', 'reward', 'ppo')  # whose programs
  attention: AttentionName = 'auto'  # xla, cudnn or splash; auto: as the experiment has it
  remat: Remat = 'auto'  # none, dots or block; auto: as the experiment has it
  scan: Scan = 'auto'  # one compiled block for all layers; auto: as the experiment has it
  mesh: MeshConfig = MeshConfig()
  threads: int = 1  # programs compiled side by side, as a run does where cores are idle
  json: str = ''  # file that gets the results


def experiment_of(asked):
  """The Experiment whose programs are compiled."""
  base = DEFAULT
  if asked.experiment:
    try:
      base = importlib.import_module(f'experiments.{asked.experiment}').EXPERIMENT
    except (ImportError, AttributeError) as error:
      raise ConfigError(f'--experiment {asked.experiment}: {error}. Needed is the name of a module '
                        'in experiments that has an EXPERIMENT, for example quickstart.') from error
  given = {'attention': asked.attention != 'auto', 'remat': asked.remat != 'auto',
           'scan_layers': asked.scan != 'auto'}
  fields = changes(asked.attention, asked.remat, asked.scan)
  fields = {name: value for name, value in fields.items() if given[name]}
  preset = asked.preset or base.preset
  return dataclasses.replace(base, preset=preset, mesh=asked.mesh, pretrained=None, **fields)


def run(asked, say=lambda text: None):
  """All results, as plain JSON values; `say` hears of each program as it comes."""
  if asked.threads < 1:
    raise ConfigError(f'--threads {asked.threads}. It must be at least 1.')
  experiment = experiment_of(asked)
  prepared = cli.prepare_shapes(experiment, chips.devices(asked.on),
                                chips.memory_of(asked.on))
  config = prepared.policy.config
  results = {'on': asked.on, 'preset': experiment.preset, 'experiment': asked.experiment,
             'versions': {'jax': jax.__version__}, 'layers': config.layers,
             'config': configs.to_json(experiment), 'programs': []}
  began = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(asked.threads) as pool:
    compiling = []
    for program, trace_s in _timed(planner.programs(prepared, asked.stages)):
      compiling.append(pool.submit(compile_one, program, trace_s, config.layers))
      if asked.threads == 1:  # tracing the next beside it would be timed too
        compiling[-1].result()
    for each in compiling:
      results['programs'].append(each.result())
      say(line(results['programs'][-1]))
  results['seconds'] = time.perf_counter() - began
  return results


def _timed(programs):
  """Each program with the seconds that making it took."""
  began = time.perf_counter()
  for program in programs:
    yield program, time.perf_counter() - began
    began = time.perf_counter()


def compile_one(program, trace_s, layers):
  """Seconds and contents of one traced program."""
  began = time.perf_counter()
  lowered = program.traced.lower()
  lowered_at = time.perf_counter()
  executable = lowered.compile()
  compile_s = time.perf_counter() - lowered_at
  memory, text = executable.memory_analysis(), executable.as_text()
  sizes = kernels.weight_sizes(jax.tree.leaves(program.holds['parameters']), layers)
  found = kernels.parts(text, sizes)
  seconds = {'trace': trace_s, 'lower': lowered_at - began, 'compile': compile_s}
  return {'program': program.name, 'seconds_of': seconds, 'seconds': sum(seconds.values()),
          'temporary_bytes': memory.temp_size_in_bytes if memory else None,
          'parts': [dataclasses.asdict(part) for part in found]}


def line(found):
  """One program as a line, and its parts as one each."""
  spent = ', '.join(f'{name} {seconds:.1f}' for name, seconds in found['seconds_of'].items())
  lines = [f'{found["program"]}: {found["seconds"]:.1f} s ({spent}), '
           f'{_gib(found["temporary_bytes"])} GiB of temporaries']
  return '\n'.join(lines + [_part(part) for part in found['parts'] if part['kernels']])


def _part(part):
  trips = 'a loop' if part['trips'] is None else f'a loop of {part["trips"]}'
  where = f'each trip of {trips}' if part['depth'] else 'the program'
  kinds = ', '.join(f'{count} {kind}' for kind, count in part['kernels'].items())
  return f'  {"  " * part["depth"]}{where}: {sum(part["kernels"].values())} kernels ({kinds})'


def show(results):
  """Prints the table of seconds and temporaries."""
  rows = {each['program']: each for each in results['programs']}
  columns = {name: {row: f'{each["seconds_of"][name]:.1f}' for row, each in rows.items()}
             for name in ('trace', 'lower', 'compile')}
  columns['seconds'] = {row: f'{each["seconds"]:.1f}' for row, each in rows.items()}
  columns['temporary GiB'] = {row: _gib(each['temporary_bytes']) for row, each in rows.items()}
  columns['kernels'] = {
    row: str(sum(sum(part['kernels'].values()) for part in each['parts']))
    for row, each in rows.items()}
  for name in ('trace', 'lower', 'compile'):
    columns[name]['all'] = f'{sum(each["seconds_of"][name] for each in rows.values()):.1f}'
  columns['seconds']['all'] = f'{results["seconds"]:.1f}'
  report.print_table(columns, f'{results["preset"]} for {results["on"]}, '
                     f'jax {results["versions"]["jax"]}')


def _gib(size):
  return '-' if size is None else f'{size / 2 ** 30:.3g}'


def main(args=None):
  """The command line; exits with 2 and one line on an error that the user can mend."""
  asked = tyro.cli(BenchCompile, description=__doc__, args=args)
  try:
    if asked.json:
      _write(asked.json, '')
    results = run(asked, lambda text: print(text, flush=True))
    show(results)
    if asked.json:
      _write(asked.json, json.dumps(results, indent=2) + '\n')
  except RlhfJaxError as error:
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    sys.exit(2)
  return results


def _write(path, text):
  try:
    pathlib.Path(path).write_text(text)
  except OSError as error:
    raise ConfigError(f'--json {path}: {error.strerror}. Needed is a file that can be '
                      'written.') from error


if __name__ == '__main__':
  jax.config.update('jax_enable_compilation_cache', False)       # or seconds would be of loading
  main()
