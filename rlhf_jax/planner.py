"""Whether an experiment fits on devices that are not here, and how fast it could be there at best.

The five programs in which a run spends its time (SFT step, reward step, generate, experience, PPO update) are made by the
functions that the stages call, on shapes instead of arrays, and compiled for the devices asked for: nothing is allocated,
and no data, tokenizer or weights are needed. Batches have their full length, a prompt two ranked responses, and every
answer runs to its limit. Evaluations and the answers that labellers rank are not planned: they are smaller, or alike.

What a chip holds while a program runs is all that its stage keeps there, arguments or not, and the program's own
temporaries. Beside it, while a stage saves, Orbax copies arrays to the host, not on the chip. The estimate of time is a
roofline: the longest of computing, HBM and each interconnect, at their published peaks and all at once. Read next:
`compiled.py`, which reads a program; `chips.py`, `gpus.py`, `remedies.py`.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import time
import types
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import compiled, gpus
from rlhf_jax.chips import Chip, chip_of
from rlhf_jax.data import batches
from rlhf_jax.data.encode import RankedRows, Row
from rlhf_jax.errors import ConfigError
from rlhf_jax.generate import loop_trips
from rlhf_jax.model.cache import empty_cache
from rlhf_jax.model.heads import initial_params
from rlhf_jax.stages import ppo, reward, sft
from rlhf_jax.stages.descent import compile_step
from rlhf_jax.step import init_state

STAGES = sft.NAME, reward.NAME, ppo.NAME
_COMPILERS = 'jax', 'jaxlib', 'libtpu', 'jax_cuda13_plugin', 'jax_cuda12_plugin'
# Stands for any chat: shapes do not depend on the ids.
CHAT = types.SimpleNamespace(end_tokens=(0,), pad_token=0)


# ---- the programs of a run

@dataclasses.dataclass(frozen=True)
class Program:
  """One program, traced, and what its stage keeps on the devices while it runs, by kind: arguments and others."""
  name: str
  stage: str
  traced: Any
  args: tuple
  holds: dict[str, Any]
  trips: tuple[float, ...] = ()  # of its loops whose count depends on the answers
  cache: float = 0.0  # bytes of keys and values on a chip, among the temporaries


def programs(run, stages=STAGES):
  """The programs of a run's stages, one after another: each is traced when it is asked for."""
  if sft.NAME in stages:
    yield _descent(run, 'SFT step', sft, run.experiment.sft, run.policy, _demonstrations(run))
  if reward.NAME in stages:
    yield _descent(run, 'reward step', reward, run.experiment.reward, run.reward, _comparisons(run))
  if ppo.NAME in stages:
    yield from _iteration(run, _has_reward_model(run, stages))


def _key():
  return jax.eval_shape(lambda: jax.random.key(0))


def _shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _row(length):
  return Row([0] * length, [True] * length)


def _demonstrations(run):
  length, config = run.experiment.data.limits.tokens, run.experiment.sft
  return batches.demonstration_batches([_row(length)] * config.batch_size, batch_size=config.batch_size, length=length,
                                       seed=0, packed=config.packed)[0]


def _comparisons(run):
  length, B = run.experiment.data.limits.tokens, run.experiment.reward.batch_size
  count = 2 if run.task is None else run.task.candidates
  rows = [RankedRows([_row(length)] * count, list(range(count)))] * B
  return batches.comparison_batches(rows, batch_size=B, length=length, seed=0)[0]


def _has_reward_model(run, stages):
  """Whether PPO will find one: of a plan always; of a run where it is there or will be trained."""
  if run.directory is None or reward.NAME in stages:
    return True
  return run.checkpoints(reward.NAME).exists()


def _prompts(run):
  length, B = run.experiment.data.limits.prompt_tokens, run.experiment.ppo.batch_size
  return batches.prompt_batches([_row(length)] * B, batch_size=B, length=length, seed=0)[0]


def _descent(run, name, stage, config, model, batch):
  optimizer, step = compile_step(run.runner, stage.loss(run), config)
  state = run.runner.abstract(lambda: init_state(initial_params(model, jax.random.key(0)), optimizer))
  batch = run.runner.place(_shapes(batch), 'batch')
  args = state, batch, _key()
  return Program(name, stage.NAME, step.trace(*args), args,
                 {'parameters': state.params, 'optimizer': state.opt_state, 'batch': batch})


def _iteration(run, has_reward_model=True):
  """generate, experience and PPO update: each is given the shapes of what the one before it returns."""
  runner, optimizer = run.runner, ppo.optimizer_of(run)
  made = ppo.compile_programs(run, optimizer)
  state = runner.abstract(functools.partial(ppo.abstract_state, run, optimizer))
  models = {'reference': run.policy} | ({'reward': run.reward} if has_reward_model else {})
  frozen = runner.abstract(lambda: {
    name: ppo.as_frozen(run, initial_params(model, jax.random.key(0)))
    for name, model in models.items()})
  holds = {'parameters': state.params, 'optimizer': state.opt_state, 'frozen': frozen}
  prompts = runner.place(_shapes(_prompts(run)), 'batch')

  args = state.params['policy'], prompts, _key()
  answer = made.answer.trace(*args)
  config, limits = run.experiment.ppo, run.experiment.data.limits
  yield Program('generate', ppo.NAME, answer, args, holds | {'batch': prompts},
                loop_trips(run.policy.config, config.batch_size, limits.prompt_tokens, limits.response_tokens, config.slots,
                           runner.batch_parts), _cache(run))
  rollout = runner.place(_shapes(answer.out_info), 'batch')
  score = runner.place({'score_B': jax.ShapeDtypeStruct((config.batch_size,), jnp.float32)}, 'batch')
  args = state.params, frozen, rollout, jax.ShapeDtypeStruct((), jnp.float32), score
  look_back = made.look_back.trace(*args)
  yield Program('experience', ppo.NAME, look_back, args, holds | {'batch': (rollout, score)})
  lessons = runner.place(_shapes(look_back.out_info[0]), 'batch')
  args = state, lessons, _key()
  yield Program('PPO update', ppo.NAME, made.learn.trace(*args), args, holds | {'batch': (rollout, lessons)})


def _cache(run):
  """Bytes of the longest cache on one chip: sequences cut over the batch, heads over `tensor`."""
  config = run.experiment.ppo
  cache = jax.eval_shape(lambda: empty_cache(run.policy.config, config.slots or config.batch_size,
                                             run.experiment.data.limits.tokens))
  return _bytes(cache) / run.runner.batch_parts / run.runner.mesh.shape.get('tensor', 1)


def _bytes(tree):
  """Bytes that a tree takes on one device: of what has a sharding its shard, of what has none the whole."""
  shard = lambda x: x.shape if getattr(x, 'sharding', None) is None else x.sharding.shard_shape(x.shape)
  return sum(math.prod(shard(x)) * jnp.dtype(x.dtype).itemsize if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else 8
             for x in jax.tree.leaves(tree))


# ---- what each costs

@dataclasses.dataclass(frozen=True)
class Cost:
  """What a program costs: memory and traffic of one chip, operations of all."""
  name: str
  stage: str
  memory: dict[str, float]  # bytes of one chip, by kind
  flops: float
  repeated_flops: float  # of them those of recomputation
  hbm: float | None  # bytes from and to a chip's HBM; None where the compiler refused the program
  sent: dict[str, float]  # bytes that a chip sends, by collective
  collectives: dict[str, float]  # how many run, by kind
  compile_seconds: float
  kept: bool  # whether that was in an earlier process, whose reading was kept
  refused: str = ''  # what the compiler said where the program does not fit
  network: float = 0.0  # of the bytes sent, those that leave a host with a network of its own

  @property
  def total(self):
    """Bytes of one chip."""
    return sum(self.memory.values())


def cost(program, topology, hosts=()):
  """The Cost of a Program, which is compiled for it unless that has been done before.

  `hosts` is that of `compiled.traffic`.
  """
  every, repeated = compiled.flops(program.traced.jaxpr.jaxpr, program.trips)
  lowered, arguments = program.traced.lower(), _bytes(program.args)
  path = _path_of(lowered, topology, program.trips)
  kept = path is not None and path.exists()
  if kept:
    read = json.loads(path.read_text())
  else:
    read = _compiled(lowered, arguments, program.trips, hosts)
  if path is not None and not kept:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f'.{os.getpid()}')
    unfinished.write_text(json.dumps(read))
    unfinished.rename(path)
  memory = {kind: _bytes(tree) for kind, tree in program.holds.items()}
  memory |= {'cache': program.cache, 'temporaries': read.pop('own') - program.cache}
  return Cost(program.name, program.stage, memory, every, repeated, kept=kept, **read)


def _compiled(lowered, arguments, trips, hosts=()):
  """What a compilation tells: bytes of a program beside its arguments (`own`), traffic, seconds; or why it was refused."""
  began = time.monotonic()
  try:
    executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r'HLO temporaries \(([\d.]+)([MGT])\) exceeds available HBM', str(error))
    if found is None:
      raise
    needed = float(found.group(1)) * 2.0 ** {'M': 20, 'G': 30, 'T': 40}[found.group(2)]
    return {'own': needed, 'hbm': None, 'sent': {}, 'network': 0.0, 'collectives': {},
            'refused': found.group(0), 'compile_seconds': time.monotonic() - began}
  seconds, stats = time.monotonic() - began, executable.memory_analysis()
  # Arrays in HBM are padded to tiles: what arguments take beyond their sizes is counted as the program's own.
  own = (stats.temp_size_in_bytes + stats.generated_code_size_in_bytes + stats.argument_size_in_bytes - arguments
         + max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes))
  try:
    text = executable.as_text()
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f'jaxlib {importlib.metadata.version("jaxlib")} cannot read what this compiler makes '
                      f'({str(error).splitlines()[0][:200]}). Install the compiler that belongs to it: pip install -e '
                      "'.[tpu]' or '.[cuda]'.") from error
  moved = compiled.traffic(text, trips, hosts)
  return {'own': own, 'hbm': moved.hbm, 'sent': moved.sent, 'network': moved.network,
          'collectives': moved.count, 'compile_seconds': seconds}


def _path_of(lowered, topology, trips):
  """Where the reading of a program is kept: JAX writes what it compiled for absent devices, but cannot read it back."""
  if jax.config.jax_compilation_cache_dir is None:
    return None
  compiler = [importlib.metadata.version(name) for name in _COMPILERS if importlib.util.find_spec(name)]
  what = [lowered.as_text(), topology, repr(trips), *compiler, pathlib.Path(compiled.__file__).read_text(),
          pathlib.Path(gpus.__file__).read_text(), pathlib.Path(__file__).read_text(),
          *(os.environ.get(name, '') for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS'))]
  digest = hashlib.sha256('\0'.join(what).encode()).hexdigest()
  return pathlib.Path(jax.config.jax_compilation_cache_dir) / 'plans' / f'{digest}.json'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the programs of a run cost on the chips of a topology."""
  topology: str
  mesh: dict[str, int]
  capacity: float  # bytes that a program may use of one chip's memory
  chip: Chip | None  # None for CPUs: no estimate of time
  costs: list[Cost]
  parameters: dict[str, int]  # how many each model has

  def fits(self, cost):
    """Whether a program and what lies beside it fit on a chip."""
    return not cost.refused and cost.total <= self.capacity

  @property
  def too_large(self):
    """The costs of programs that do not fit."""
    return [cost for cost in self.costs if not self.fits(cost)]

  def seconds(self, cost):
    """What computing, HBM and interconnect each take at their peak, in seconds; {} where one of them is not known."""
    if self.chip is None or cost.hbm is None:
      return {}
    chips = math.prod(self.mesh.values())
    over_link = sum(cost.sent.values()) - cost.network
    seconds = {'compute': cost.flops / chips / self.chip.flops,
               'hbm': cost.hbm / self.chip.hbm_speed,
               self.chip.link.lower(): over_link / self.chip.link_speed}
    if self.chip.network_speed is not None:
      seconds['network'] = cost.network / self.chip.network_speed
    return seconds

  def mfu(self, cost):
    """Model FLOPs utilisation at the roofline: operations, not the repeated ones, of what the chips could do meanwhile."""
    seconds = self.seconds(cost)
    return (cost.flops - cost.repeated_flops) / math.prod(self.mesh.values()) / self.chip.flops / max(seconds.values())


def plan(run, topology, stages=STAGES, only=None, say=lambda text: None):
  """The Plan of a run's stages on its runner's devices; `only` names the programs to compile, `say` hears of each."""
  chip, costs = chip_of(topology), []
  hosts = _hosts(run.runner.mesh) if chip and chip.network_speed else ()
  capacity = chip.hbm if chip else os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / run.runner.mesh.size
  for program in programs(run, stages):
    if only is None or program.name in only:
      say(f'{program.name}: compiling for {topology}')
      costs.append(cost(program, topology, hosts))
      say(f'{program.name}: ' + ('known' if costs[-1].kept else f'{costs[-1].compile_seconds:.0f} s'))
  return Plan(topology, dict(run.runner.mesh.shape), capacity, chip, costs, _parameters(run))


def _hosts(mesh):
  """The host of each device, in the order in which a compiled program numbers them."""
  return tuple(device.process_index for device in mesh.devices.flat)


def _parameters(run):
  count = lambda model: sum(math.prod(x.shape) for x in jax.tree.leaves(
    jax.eval_shape(functools.partial(initial_params, model), _key())))
  return {name: count(getattr(run, name)) for name in ('policy', 'value', 'reward')}


# ---- what is said

def to_json(made, suggestion=None):
  """A Plan as plain JSON values."""
  rows = [{'program': cost.name, 'fits': made.fits(cost), 'bytes_per_chip': cost.memory, 'total_bytes_per_chip': cost.total,
           'flops': cost.flops, 'repeated_flops': cost.repeated_flops, 'hbm_bytes_per_chip': cost.hbm,
           'sent_bytes_per_chip': cost.sent, 'sent_to_other_hosts_bytes_per_chip': cost.network,
           'collectives': cost.collectives, 'seconds': made.seconds(cost),
           'mfu': made.mfu(cost) if made.seconds(cost) else None, 'compile_seconds': cost.compile_seconds,
           'refused': cost.refused} for cost in made.costs]
  return {'topology': made.topology, 'mesh': made.mesh, 'parameters': made.parameters,
          'capacity_bytes_per_chip': made.capacity,
          'chip': made.chip and dataclasses.asdict(made.chip), 'fits': not made.too_large, 'suggestion': suggestion,
          'programs': rows, 'assumptions': assumptions(made)}


def assumptions(made):
  """What the figures take for granted, a sentence each."""
  found = ['every sequence has its full length, a comparison two responses, every answer runs to its limit',
           'memory: all that the stage keeps on a chip while the program runs, and the temporaries of the program',
           'FLOPs: all matrix products on all chips; bytes: each instruction of one chip reads and writes HBM once']
  if made.chip:
    chip = made.chip
    network = ''
    if chip.network_speed:
      network = f', {chip.network_speed / 1e9:.0f} GB/s to other hosts'
    found += [f'{made.topology}: {chip.flops / 1e12:.0f} TFLOP/s in bfloat16, {_gib(chip.hbm)} GiB at '
              f'{chip.hbm_speed / 1e9:.0f} GB/s, {chip.link_speed / 1e9:.0f} GB/s over {chip.link}{network} '
              f'({chip.source})',
              f'step: the longest of {_listed(["compute", *_ways(chip)])}, each at that peak and '
              'all at once, so a real step is slower',
              'MFU: of that step, without the products that a backward pass repeats']
    if chip.note:
      found.append(f'{_gib(chip.hbm)} GiB: {chip.note}')
    if chip.network_speed:
      found += ['network: a ring leaves a host through as many adapters as the host has chips in it',
                'kernels: those that XLA takes untimed; on a GPU it times some against each other']
  return found


def _ways(chip):
  """How bytes move, in the order of the table: the memory and the interconnects of a Chip."""
  return ['HBM', chip.link] + ['network'] * (chip.network_speed is not None)


def _listed(names):
  return f'{", ".join(names[:-1])} and {names[-1]}'


def markdown(made):
  """Two tables, of memory and of time, and what they assume."""
  kinds = ('parameters', 'optimizer', 'frozen', 'batch', 'cache', 'temporaries')
  mesh = ' x '.join(f'{axis} {size}' for axis, size in made.mesh.items())
  memory = [['GiB a chip', *kinds, 'total', f'left of {_gib(made.capacity)}']]
  ways = ['compute', *(_ways(made.chip) if made.chip else ['HBM', 'ICI'])]
  moved = [['once', 'TFLOP, all chips', 'repeated', 'HBM GB, a chip', 'sent GB, a chip',
            *(f'{way} s' for way in ways), 'MFU', 'compiled in s']]
  for cost in made.costs:
    seconds, left = made.seconds(cost), _gib(made.capacity - cost.total)
    memory.append([cost.name, *(_gib(cost.memory.get(kind, 0)) for kind in kinds), _gib(cost.total),
                   left if made.fits(cost) else f'{left}: does not fit'])
    sent = ', '.join([f'{sum(cost.sent.values()) / 1e9:.3g}'] + [
      f'{kind} {size / 1e9:.3g} in {cost.collectives[kind]:.0f}' for kind, size in cost.sent.items() if size > 1e6])
    moved.append([cost.name, f'{cost.flops / 1e12:.4g}', f'{cost.repeated_flops / cost.flops:.0%}',
                  '-' if cost.hbm is None else f'{cost.hbm / 1e9:.4g}', sent,
                  *(f'{seconds[way.lower()]:.3g}' if seconds else '-' for way in ways),
                  f'{made.mfu(cost):.0%}' if seconds else '-', f'{cost.compile_seconds:.0f}' + ' before' * cost.kept])
  models = ', '.join(f'{name} {count / 1e9:.3g}' for name, count in made.parameters.items())
  return '\n\n'.join([f'{made.topology}, {mesh}; billions of parameters: {models}', _table(memory), _table(moved),
                      '\n'.join(f'- {sentence}' for sentence in assumptions(made))])


def _table(rows):
  width = [max(map(len, column)) for column in zip(*rows)]
  lines = ['| ' + ' | '.join(cell.rjust(width[i]) if i else cell.ljust(width[i]) for i, cell in enumerate(row)) + ' |'
           for row in rows]
  rule = '|' + '|'.join('-' * (n + 1) + ':' if i else '-' * (n + 2) for i, n in enumerate(width)) + '|'
  return '\n'.join([lines[0], rule, *lines[1:]])


def _gib(size):
  return f'{size / 2**30:.3g}'
