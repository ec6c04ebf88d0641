"""How fast this machine runs each stage of a model: SFT, reward model, generation, PPO, a queue; as a table and as JSON.
Also the memory of an SFT step with a large vocabulary, and what bfloat16 changes in a log-probability.

    python -m experiments.bench
    python -m experiments.bench --preset medium --dtype bfloat16 --mesh.runner sharded --mesh.fsdp 8 --json bench.json
    python -m experiments.bench --only sft ppo --batch.sft-rows 64 --batch.tokens 128

Tokens are random and every sequence is full. No response stops early, except in `queue` and `waves`, whose lengths follow
from a fixed key: every round does the same work. The programs
are those that the stages run, under the same runners, with their donated states chained from round to round. Times are
medians (and least to most) over --repeats rounds after one that warms up, with the devices drained after every program;
generation includes the prefill. Compile seconds are tracing, lowering and compiling, from no persistent cache.

Memory of a program is what a device holds while it runs: arguments + outputs + temporaries - outputs that reuse
arguments. The peaks at the end are of the whole process (resident, everything that ran) and of the fullest device.

The ceiling is the speed of a chain of square matrix products on all devices, each with about as many FLOPs as one
feed-forward product of the SFT batch. The FLOPs of an SFT step are those that the model needs, recomputation not
counted (Chowdhery et al. 2022, 2204.02311, appendix B; causal attention counted in full):

    6 * tokens * (weights in matrix products) + 12 * tokens * layers * query_heads * head_width * T

The bytes of generation are those that each token has to read: the weights in matrix products and the cache as far as it is
written. Their ceiling is the speed at which all devices read a large array; the prefill's time is not taken out.

Absent on purpose: peers (other libraries: `bench_peers.py`), compile times for devices that are not here
(`bench_compile.py`), reading data, writing checkpoints. Read next: `benchmarks/`, for how time is taken and ceilings are.
"""

import dataclasses
import functools
import json
import os
import pathlib
import platform
import sys
import types
import typing
from typing import Literal

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import rich.console
import tyro

from experiments.benchmarks import ceilings
from experiments.benchmarks.measuring import Workload, compiled, measure, program_bytes
from experiments.benchmarks.running import AttentionName, Remat, Scan, changes, chosen
from rlhf_jax import report
from rlhf_jax.cli import make_runner, runner_name
from rlhf_jax.config import Experiment, MeshConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_jax.errors import ConfigError, RlhfJaxError
from rlhf_jax.generate import generate
from rlhf_jax.losses.language import cross_entropy
from rlhf_jax.losses.preference import ranking
from rlhf_jax.maths.sampling import Sampling
from rlhf_jax.model import running
from rlhf_jax.model.config import preset
from rlhf_jax.model.forward import check_length, next_logprobs
from rlhf_jax.model.heads import LanguageModel, ScalarModel, initial_params
from rlhf_jax.optimizer import decays, make_optimizer
from rlhf_jax.records import Comparisons, Demonstrations, Prompts
from rlhf_jax.runners import Runner
from rlhf_jax.stages import ppo
from rlhf_jax.stages.task import Run
from rlhf_jax.startup import prepare_process
from rlhf_jax.step import init_state, make_train_step

Name = Literal['sft', 'reward', 'generate', 'ppo', 'queue', 'waves', 'memory', 'rounding']


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """Sizes of the work. Rows are of the global batch, over all devices."""
  sft_rows: int = 16  # sequences of an SFT update
  reward_pairs: int = 16  # pairs of a reward-model update
  tokens: int = 256  # of every sequence of SFT
  reward_tokens: int | None = None  # of each response (with its prompt) of the reward model; None: as many as of SFT
  generate_prompts: int = 32  # answered at once
  ppo_prompts: int = 32  # answered and learned from in an iteration
  prompt_tokens: int = 64  # of every prompt
  new_tokens: int = 64  # of every response
  ppo_prompt_tokens: int | None = None  # of every prompt of a PPO iteration; None: prompt_tokens
  ppo_new_tokens: int | None = None  # of every response of a PPO iteration; None: new_tokens
  epochs: int = 4  # of a PPO iteration
  minibatches: int = 1  # updates of an epoch
  queue_prompts: int = 512  # answered one after another on the slots of the queue
  slots: int = 64  # answers written at a time: of the queue, and of the waves beside it
  queue_new_tokens: int = 128  # most of a response in queue and waves, which end after queue_mean_tokens in the mean
  queue_mean_tokens: int = 32
  memory_rows: int = 8  # sequences of the SFT step whose memory is compared
  memory_tokens: int = 1024  # of each of them
  memory_vocabulary: int = 131072

  @property
  def of_reward(self):
    """Tokens of each response (with its prompt) of the reward model."""
    return self.tokens if self.reward_tokens is None else self.reward_tokens

  @property
  def of_ppo(self):
    """Tokens of a prompt and of a response of a PPO iteration."""
    prompt = self.prompt_tokens if self.ppo_prompt_tokens is None else self.ppo_prompt_tokens
    new = self.new_tokens if self.ppo_new_tokens is None else self.ppo_new_tokens
    return prompt, new


@dataclasses.dataclass(frozen=True)
class Bench:
  """What is measured, on what, and how often."""
  preset: str = 'small'  # model, by name (rlhf_jax.model.config.PRESETS); value and reward model have its size too
  dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and products
  attention: AttentionName = 'auto'  # xla: anywhere; cudnn: NVIDIA GPUs, in bfloat16; splash: TPUs
  remat: Remat = 'auto'  # what the backward pass recomputes: nothing, all but matrix products, whole blocks
  scan: Scan = 'auto'  # one compiled block for all layers
  mesh: MeshConfig = MeshConfig()
  batch: BatchConfig = BatchConfig()
  repeats: int = 5  # rounds that count, after one that warms up
  only: tuple[Name, ...] = typing.get_args(Name)  # workloads
  json: str = ''  # file that gets the same numbers as the table


@dataclasses.dataclass(frozen=True)
class Setting:
  """What the workloads of a run share."""
  runner: Runner
  policy: LanguageModel
  scalar: ScalarModel
  batch: BatchConfig


# ---- the workloads

def sft(setting):
  """SFT updates. Unit: tokens, B * T; the first of a row is read but not predicted."""
  B, T = setting.batch.sft_rows, setting.batch.tokens
  full_BT = np.ones((B, T), bool)
  batch = Demonstrations(tokens_BT=_tokens(setting, B, T), valid_BT=full_BT, mask_BT=full_BT)
  return _updates(setting, setting.policy, cross_entropy(setting.policy), batch, SFTConfig().optimizer,
                  title=f'SFT {B} x {T}', unit='tokens', units=B * T)


def reward(setting):
  """Reward-model updates. Unit: pairs, each of two sequences of T tokens."""
  B, T = setting.batch.reward_pairs, setting.batch.of_reward
  batch = Comparisons(tokens_BCT=_tokens(setting, B, 2, T), valid_BCT=np.ones((B, 2, T), bool),
                      rank_BC=np.tile(np.arange(2, dtype=np.int32), (B, 1)))
  return _updates(setting, setting.scalar, ranking(setting.scalar), batch, RewardConfig().optimizer,
                  title=f'reward {B} pairs x {T}', unit='pairs', units=B)


def generation(setting):
  """Answers to prompts. Unit: new tokens, B * R."""
  B, P, R = setting.batch.generate_prompts, setting.batch.prompt_tokens, setting.batch.new_tokens
  params, prompts, key = _params(setting, setting.policy), _prompts(setting, B, P), jax.random.key(1)
  program = compiled(_answering(setting, R), params, prompts, key)

  def turn(call, state):
    call('generate', params, prompts, key)
    return state
  return Workload(f'generate {B} x ({P} + {R})', 'tokens', B * R, {'generate': program}, turn)


def ppo_iteration(setting):
  """Whole PPO iterations with a policy, value, reference and reward model of one size. Unit: prompts."""
  sizes, runner = setting.batch, setting.runner
  B, (P, R) = sizes.ppo_prompts, sizes.of_ppo
  config = PPOConfig(batch_size=B, epochs=sizes.epochs, minibatches=sizes.minibatches)
  optimizer = _constant(config.optimizer)
  programs = _ppo_programs(setting, config, optimizer)
  params = {'policy': _params(setting, setting.policy), 'value': _params(setting, setting.scalar, 1)}
  frozen = {'reference': runner.copy(params['policy']), 'reward': _params(setting, setting.scalar, 2)}
  state = runner.place(init_state(params, optimizer), 'params')
  prompts, keys = _prompts(setting, B, P), jax.random.split(jax.random.key(1))
  scoring = jnp.float32(config.kl_weight), {'score_B': np.zeros(B, np.float32)}

  answer = compiled(programs.answer, state.params['policy'], prompts, keys[0])
  rollout = answer.call(state.params['policy'], prompts, keys[0])
  score = compiled(programs.look_back, state.params, frozen, rollout, *scoring)
  lessons, _ = score.call(state.params, frozen, rollout, *scoring)
  update = compiled(programs.learn, state, lessons, keys[1])

  def turn(call, state):
    rollout = call('generate', state.params['policy'], prompts, keys[0])
    lessons, _ = call('score', state.params, frozen, rollout, *scoring)
    return call('update', state, lessons, keys[1])[0]
  return Workload(f'PPO {B} x ({P} + {R}), {sizes.epochs} x {sizes.minibatches} updates', 'prompts', B,
                  {'generate': answer, 'score': score, 'update': update}, turn, state)


def queue(setting):
  """Answers of uneven length, in one call that gives a free slot the next prompt. Unit: new tokens."""
  return _uneven(setting, 'queue', setting.batch.queue_prompts)


def waves(setting):
  """The same answers in batches as large as there are slots, each as long as its longest answer. Unit: new tokens."""
  return _uneven(setting, 'waves', setting.batch.slots)


WORKLOADS = {'sft': sft, 'reward': reward, 'generate': generation, 'ppo': ppo_iteration, 'queue': queue, 'waves': waves}


def _updates(setting, model, loss_fn, batch, optimizer_config, *, title, unit, units):
  """The workload of one train step after another on the same batch."""
  runner, optimizer, key = setting.runner, _constant(optimizer_config), jax.random.key(1)
  step = runner.compile(make_train_step(loss_fn, optimizer, axis_name=runner.axis_name),
                        inputs=('params', 'batch', 'same'), outputs=('params', 'same'), donate=(0,))
  state = runner.place(init_state(_params(setting, model), optimizer), 'params')
  batch = runner.place(batch, 'batch')
  turn = lambda call, state: call('update', state, batch, key)[0]
  return Workload(title, unit, units, {'update': compiled(step, state, batch, key)}, turn, state)


def _uneven(setting, name, at_once):
  """The workload of answering all queue_prompts, `at_once` in a call. The weights are fresh, so that about one token in
  queue_mean_tokens is one of as large a share of the vocabulary: lengths are nearly geometric."""
  sizes, config, runner = setting.batch, setting.policy.config, setting.runner
  N, P, R, Q = sizes.queue_prompts, sizes.prompt_tokens, sizes.queue_new_tokens, sizes.slots
  ends = tuple(range(0, config.vocab_size, sizes.queue_mean_tokens))
  slots = -(-Q // runner.mesh.size) if runner.axis_name else Q
  answer = runner.compile(functools.partial(generate, setting.policy, slots=slots,
                                            sampling=Sampling(new_tokens=R, end_tokens=ends)),
                          inputs=('params', 'batch', 'same'), outputs='batch')
  params, key, whole = _params(setting, setting.policy), jax.random.key(1), _prompts(setting, N, P)
  pieces = [runner.place(jax.tree.map(lambda x, i=i: x[i:i + at_once], whole), 'batch') for i in range(0, N, at_once)]
  program = compiled(answer, params, pieces[0], key)
  tokens = sum(int(program.call(params, piece, key).mask_BR.sum()) for piece in pieces)

  def turn(call, state):
    for piece in pieces:
      call(name, params, piece, key)
    return state
  return Workload(f'{name} {N} x ({P} + up to {R}) on {Q}', 'tokens', tokens, {name: program}, turn)


def _ppo_programs(setting, config, optimizer):
  """Those of the stage, except that no token ends an answer."""
  # The stage asks only for its end tokens and its pad token.
  no_chat = types.SimpleNamespace(end_tokens=(0,), pad_token=0)
  run = Run(Experiment(ppo=config), None, no_chat, setting.runner, None, setting.policy,
            setting.scalar)
  return dataclasses.replace(ppo.compile_programs(run, optimizer), answer=_answering(setting, setting.batch.of_ppo[1]))


def _answering(setting, R):
  sampling = Sampling(new_tokens=R, end_tokens=())
  return setting.runner.compile(functools.partial(generate, setting.policy, sampling=sampling),
                                inputs=('params', 'batch', 'same'), outputs='batch')


def _constant(optimizer_config):
  return make_optimizer(dataclasses.replace(optimizer_config, schedule='constant', warmup_steps=0))


def _params(setting, model, seed=0):
  return setting.runner.initialise(functools.partial(initial_params, model), jax.random.key(seed))


def _tokens(setting, *shape):
  return np.random.default_rng(0).integers(0, setting.policy.config.vocab_size, shape, dtype=np.int32)


def _prompts(setting, B, P):
  prompts = Prompts(tokens_BP=_tokens(setting, B, P), valid_BP=np.ones((B, P), bool), sample_B=np.arange(B, dtype=np.int32))
  return setting.runner.place(prompts, 'batch')


# ---- what else is measured

def memory(setting):
  """{'in chunks', 'at once'}: bytes of an SFT step of a large vocabulary on one device, where logits exist a chunk of tokens
  at a time, and where all exist at once. Compiled and not run."""
  sizes, found = setting.batch, {}
  B, T = sizes.memory_rows, sizes.memory_tokens
  config = dataclasses.replace(setting.policy.config, vocab_size=sizes.memory_vocabulary, context_length=T)
  batch = Demonstrations(*(jax.ShapeDtypeStruct((B, T), dtype) for dtype in ('int32', 'bool', 'bool')))
  for name, chunk in (('in chunks', running.tokens_per_chunk(config)), ('at once', B * T)):
    model, optimizer = LanguageModel(dataclasses.replace(config, tokens_per_chunk=chunk)), _constant(SFTConfig().optimizer)
    state = jax.eval_shape(lambda key, m=model, o=optimizer: init_state(initial_params(m, key), o), jax.random.key(0))
    step = jax.jit(make_train_step(cross_entropy(model), optimizer), donate_argnums=0)
    found[name] = program_bytes(step.lower(state, batch, jax.random.key(0)).compile())
  return found


def rounding(setting):
  """{'mean', 'max'} of the nats by which log-probabilities in bfloat16 differ from float32: fresh weights, random tokens."""
  B, T = setting.batch.sft_rows, setting.batch.tokens
  params, tokens_BT, valid_BT = _params(setting, setting.policy), _tokens(setting, B, T), np.ones((B, T), bool)
  models = [LanguageModel(dataclasses.replace(setting.policy.config, dtype=dtype)) for dtype in ('float32', 'bfloat16')]
  read = jax.jit(lambda params, model: next_logprobs(model, params, tokens_BT, valid_BT)[0], static_argnums=1)
  exact_BT, rounded_BT = (np.asarray(read(params, model)) for model in models)
  gap_BT = np.abs(exact_BT - rounded_BT)
  return {'mean': float(gap_BT.mean()), 'max': float(gap_BT.max())}


_FACTS = {'memory': memory, 'rounding': rounding}


def decode_bytes(config, B, P, R):
  """Bytes that R tokens each of B sequences have to read: weights in products, and keys and values written before."""
  a_number = jnp.dtype(config.dtype).itemsize
  cached = 2 * config.layers * config.kv_heads * config.head_width * B * sum(P + t for t in range(R))
  return a_number * (R * _product_weights(config) + cached)


def _product_weights(config):
  """How many weights of a language model take part in matrix products."""
  params = jax.eval_shape(functools.partial(initial_params, LanguageModel(config)), jax.random.key(0))
  multiplied = [leaf.size for leaf, counts in zip(jax.tree.leaves(params), jax.tree.leaves(decays(params))) if counts]
  return sum(multiplied) + (config.vocab_size * config.width if config.tied else 0)


def sft_flops(config, B, T):
  """FLOPs of an SFT step on B sequences of T tokens: 6 a weight and token, and 12 L N H T a token of attention."""
  attention = 12 * config.layers * config.query_heads * config.head_width * T
  return B * T * (6 * _product_weights(config) + attention)


def peak_memory(mesh):
  """Bytes: the most that this process had resident, and the most that a device held; None where nobody counts."""
  stats = [device.memory_stats() for device in mesh.devices.flat if device.process_index == jax.process_index()]
  held = [each['peak_bytes_in_use'] for each in stats if each and 'peak_bytes_in_use' in each]
  return {'process_bytes': _resident_peak(), 'device_bytes': max(held, default=None)}


def _resident_peak():
  try:
    import resource
  except ImportError:                                                            # on Windows
    return None
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


# ---- the run

def run(bench):
  """All numbers, as plain JSON values; raises ConfigError or ShardingError before anything is measured."""
  config = preset(bench.preset, dtype=bench.dtype,
                  **changes(bench.attention, bench.remat, bench.scan))
  policy, scalar = LanguageModel(config), ScalarModel(config)
  runner = make_runner(bench.mesh, models=(policy, scalar))
  setting = Setting(runner, policy, scalar, bench.batch)
  check(bench, setting)
  top, sizes = ceilings.products(setting, bench.repeats), bench.batch
  results = describe(bench, setting) | {'ceiling': top, 'workloads': {}}
  for name in bench.only:
    print(f'{name} ...', file=sys.stderr, flush=True)
    if name in _FACTS:
      results[name] = _FACTS[name](setting)
    else:
      results['workloads'][name] = measure(WORKLOADS[name](setting), bench.repeats)
  results['peak_memory'] = peak_memory(setting.runner.mesh)
  top |= ceilings.reading(setting.runner.mesh, bench.repeats)                    # which holds a large array
  if 'sft' in bench.only:
    found = results['workloads']['sft']
    found['gflops'] = sft_flops(config, sizes.sft_rows, sizes.tokens) / found['seconds']['median'] / 1e9
    found['ceiling_share'] = found['gflops'] / top['gflops']['median']
  if 'generate' in bench.only:
    found = results['workloads']['generate']
    moved = decode_bytes(config, sizes.generate_prompts, sizes.prompt_tokens, sizes.new_tokens)
    found['gigabytes'] = moved / found['seconds']['median'] / 1e9
    found['ceiling_share'] = found['gigabytes'] / top['gigabytes']['median']
  return results


def check(bench, setting):
  """Raises ConfigError for what cannot be measured, ShardingError for a model that the mesh does not divide."""
  if not bench.only:
    raise ConfigError(f'--only names no workload, so nothing is measured. Name some of: {", ".join(typing.get_args(Name))}.')
  counts = {f'batch.{name}': count for name, count in dataclasses.asdict(bench.batch).items()}
  for name, count in ({'repeats': bench.repeats} | counts).items():
    if count is not None and count < 1:
      raise ConfigError(f'{_flag(name)} is {count}. It must be at least 1.')
  sizes, parts = bench.batch, setting.runner.batch_parts
  for name, field, divisor in (('sft', 'sft_rows', parts), ('reward', 'reward_pairs', parts),
                               ('generate', 'generate_prompts', parts), ('ppo', 'ppo_prompts', parts * sizes.minibatches),
                               ('queue', 'queue_prompts', parts), ('queue', 'slots', parts), ('waves', 'slots', parts),
                               ('waves', 'queue_prompts', sizes.slots)):
    if name in bench.only and getattr(sizes, field) % divisor:
      over = {'ppo': f'{parts} parts of the mesh, each cut into {sizes.minibatches} minibatches',
              'waves': f'waves of {divisor}' if field == 'queue_prompts' else None}.get(name) or f'{parts} parts of the mesh'
      raise ConfigError(f'{_flag(f"batch.{field}")} is {getattr(sizes, field)}, which does not divide over {over}. Pass a '
                        f'multiple of {divisor}.')
  if 'sft' in bench.only and sizes.tokens < 2:
    raise ConfigError('--batch.tokens is 1: a single token has none before it to be predicted from. Pass 2 or more.')
  queued = sizes.prompt_tokens + sizes.queue_new_tokens
  lengths = {'sft': sizes.tokens, 'reward': sizes.of_reward, 'ppo': sum(sizes.of_ppo),
             'generate': sizes.prompt_tokens + sizes.new_tokens, 'queue': queued, 'waves': queued}
  for name in bench.only:
    if name in lengths:
      check_length(setting.policy.config, lengths[name])
  setting.runner.abstract(functools.partial(initial_params, setting.policy), jax.random.key(0))
  if bench.json:
    _write(bench.json, '', 'a')                                                  # minutes of measuring are not to be lost


def _flag(name):
  return f'--{name.replace("_", "-")}'


def describe(bench, setting):
  """What was measured and on what: versions, machine, model, mesh and sizes."""
  config, mesh = setting.policy.config, setting.runner.mesh
  device = mesh.devices.flat[0]
  params = jax.eval_shape(functools.partial(initial_params, setting.policy), jax.random.key(0))
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return {
    'versions': {'python': platform.python_version(), 'jax': jax.__version__, 'jaxlib': jaxlib.__version__},
    'machine': {'platform': device.platform, 'device_kind': device.device_kind, 'devices': mesh.size, 'cores': cores},
    'model': {'preset': bench.preset, 'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
              **dataclasses.asdict(config)},
    'running': chosen(config, bench.batch.sft_rows * bench.batch.tokens // mesh.size),
    'mesh': {'runner': runner_name(bench.mesh, jax.devices()), **dict(mesh.shape)},
    'batch': dataclasses.asdict(bench.batch), 'repeats': bench.repeats}


# ---- what is shown

_OF = 'rate, of ceiling'


def show(results, console=None):
  """Prints the results as a table: a row a workload, and one for each of its programs where there are several."""
  model, machine, peaks = results['model'], results['machine'], results['peak_memory']
  square = f'matrix product, {results["ceiling"]["side"]} square'
  rows = {square: {_OF: f'{_span(results["ceiling"]["gflops"])} GFLOP/s'},
          f'reading memory, {results["ceiling"]["form"]}': {
            _OF: f'{_span(results["ceiling"]["gigabytes"])} GB/s'}}
  for found in results['workloads'].values():
    rows |= _rows(found)
  for name, size in results.get('memory', {}).items():
    sizes = results['batch']
    rows[f'{sizes["memory_rows"]} x {sizes["memory_tokens"]}, V {sizes["memory_vocabulary"]}: {name}'] = {'MiB': _mib(size)}
  columns = ('per second', 'seconds', 'compile s', 'MiB', _OF)
  console = console or rich.console.Console()
  console = console if console.width >= 144 else rich.console.Console(file=console.file, width=144)
  mesh = ' x '.join(f'{axis} {size}' for axis, size in results['mesh'].items() if axis != 'runner')
  runs = ', '.join(f'{name} {choice}' for name, choice in results['running'].items())
  report.print_table(
    {column: {row: values.get(column) for row, values in rows.items()} for column in columns},
    f'{model["preset"]} ({model["parameters"] / 1e6:.3g} M parameters, {model["dtype"]}) on {machine["device_kind"]}, '
    f'{machine["cores"]} cores, {results["mesh"]["runner"]} ({mesh}), jax {results["versions"]["jax"]}; {runs}; '
    f'median (least to most) of {results["repeats"]}', console)
  known = {'process': peaks['process_bytes'], 'fullest device': peaks['device_bytes']}
  if 'rounding' in results:
    gap = results['rounding']
    console.print(f'bfloat16 moves a log-probability by {gap["mean"]:.2g} nats in the mean, {gap["max"]:.2g} at most')
  console.print('peak memory: ' + (', '.join(f'{name} {_mib(size)} MiB' for name, size in known.items() if size) or '-'))


def _rows(found):
  """{row: {column: text}} of a workload: MiB is of its largest program, compile seconds are of all."""
  parts = found['parts'].values()
  sizes = [part['memory_bytes'] for part in parts if part['memory_bytes'] is not None]
  whole = {'per second': f'{_span(found["units_per_second"])} {found["unit"]}', 'seconds': _span(found['seconds']),
           'compile s': f'{sum(part["compile_seconds"] for part in parts):.1f}', 'MiB': _mib(max(sizes, default=None))}
  for name, unit in (('gflops', 'GFLOP/s'), ('gigabytes', 'GB/s')):
    if name in found:
      whole[_OF] = f'{found[name]:.3g} {unit}, {found["ceiling_share"]:.0%}'
  rows = {found['title']: whole}
  if len(found['parts']) > 1:
    rows |= {f'  {name}': {'seconds': _span(part['seconds']), 'compile s': f'{part["compile_seconds"]:.1f}',
                           'MiB': _mib(part['memory_bytes'])} for name, part in found['parts'].items()}
  return rows


def _span(numbers):
  say = lambda x: f'{x:.3g}' if x < 1000 else f'{x:.0f}'
  return f'{say(numbers["median"])} ({say(numbers["min"])}-{say(numbers["max"])})'


def _mib(size):
  return '-' if size is None else f'{size / 2 ** 20:.0f}'


def main(args=None):
  """The command line; exits with 2 and one clear line on an error that the user can mend. Returns the results."""
  bench = tyro.cli(Bench, description=__doc__, args=args)
  try:
    prepare_process(bench.mesh.cpu_devices)
    results = run(bench)
    show(results)
    if bench.json:
      _write(bench.json, json.dumps(results, indent=2) + '\n', 'w')
  except RlhfJaxError as error:
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    sys.exit(2)
  return results


def _write(path, text, mode):
  try:
    with pathlib.Path(path).open(mode) as file:
      file.write(text)
  except OSError as error:
    raise ConfigError(f'--json {path}: {error.strerror}. Needed is a file that can be written.') from error


if __name__ == '__main__':
  jax.config.update('jax_enable_compilation_cache', False)                       # or compile seconds would be of loading
  main()
