"""The workloads of `bench` through other libraries, in turns with ours: hand-written PyTorch, and `transformers`.

    python -m experiments.bench_peers
    python -m experiments.bench_peers --only sft generate --preset medium --repeats 3

Everything is float32 on the CPU with random weights, and runs through `torch.compile`. Each side has a process of its own,
and the rounds alternate, so that a noisy machine is noisy for all; what counts is the ratio. Our side makes a device of
each of two cores (--mesh.runner pmap --mesh.cpu-devices 2); PyTorch's threads share them. The PyTorch side is what a
careful person writes by hand: fused attention and AdamW, a static cache, sampling by one uniform number a row (faster
here than torch.multinomial). Of `transformers`, SFT and `generate` with a static cache.
Needs the extra `test`, which brings torch. Absent on purpose: PPO of libraries that no longer have it, and GPUs.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import statistics
import sys
import time
from typing import Literal

import jax
import rich.progress
import transformers
import tyro

try:
  import torch
  import torch.nn.functional as F
  from torch import nn
except ImportError:
  sys.exit("bench_peers compares with PyTorch, which is not installed. Install it: pip install -e '.[test]'")

from experiments import bench
from rlhf_jax import report
from rlhf_jax.cli import make_runner
from rlhf_jax.config import MeshConfig
from rlhf_jax.errors import ConfigError, RlhfJaxError
from rlhf_jax.model.config import preset
from rlhf_jax.model.heads import LanguageModel, ScalarModel
from rlhf_jax.startup import prepare_process

_WARMUPS = 2


@dataclasses.dataclass(frozen=True)
class BenchPeers:
  """What is compared, and how often."""
  preset: str = 'small'  # model of the Llama family, by name (rlhf_jax.model.config.PRESETS)
  batch: bench.BatchConfig = bench.BatchConfig()
  mesh: MeshConfig = MeshConfig(runner='pmap', cpu_devices=2)
  repeats: int = 5  # rounds that count, after two that compile and warm up
  only: tuple[Literal['sft', 'reward', 'generate', 'ppo'], ...] = ('sft', 'reward', 'generate', 'ppo')  # workloads


# ---- the model, by hand

class Attention(nn.Module):
  """Rotary attention, over the sequence or over a cache that it writes."""
  def __init__(self, config):
    super().__init__()
    D, self.N, self.K, self.H = config.width, config.query_heads, config.kv_heads, config.head_width
    self.query, self.key, self.value = (nn.Linear(D, heads * self.H, bias=False) for heads in (self.N, self.K, self.K))
    self.out = nn.Linear(self.N * self.H, D, bias=False)

  def forward(self, x, cos, sin, cache, place, mask):
    heads = lambda y, count: y.view(*x.shape[:2], count, self.H).transpose(1, 2)
    q, k, v = _turn(heads(self.query(x), self.N), cos, sin), _turn(heads(self.key(x), self.K), cos, sin), heads(
      self.value(x), self.K)
    if cache is not None:
      k, v = cache[0].index_copy_(2, place, k), cache[1].index_copy_(2, place, v)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.N != self.K)
    return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def _turn(x, cos, sin):
  first, second = x.chunk(2, -1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Backbone(nn.Module):
  """Tokens to the normalised stream, Llama's way."""
  def __init__(self, config):
    super().__init__()
    D, F_ = config.width, config.feedforward_width
    norm = lambda: nn.RMSNorm(D, eps=config.norm_epsilon)
    self.embedding, self.final = nn.Embedding(config.vocab_size, D), norm()
    self.blocks = nn.ModuleList(nn.ModuleDict({
      'before': norm(), 'attention': Attention(config), 'between': norm(), 'gate': nn.Linear(D, F_, bias=False),
      'up': nn.Linear(D, F_, bias=False), 'down': nn.Linear(F_, D, bias=False)}) for _ in range(config.layers))
    radians = config.rope_base ** (-torch.arange(0, config.head_width, 2) / config.head_width)
    angle = torch.arange(config.context_length)[:, None] * radians
    self.register_buffer('cos', angle.cos())
    self.register_buffer('sin', angle.sin())

  def forward(self, tokens, place, caches=None, mask=None):
    x, cos, sin = self.embedding(tokens), self.cos[place], self.sin[place]
    for i, block in enumerate(self.blocks):
      x = x + block['attention'](block['before'](x), cos, sin, None if caches is None else caches[i], place, mask)
      y = block['between'](x)
      x = x + block['down'](F.silu(block['gate'](y)) * block['up'](y))
    return self.final(x)


class Model(nn.Module):
  """Backbone and head: the vocabulary, or one number."""
  def __init__(self, config, outputs):
    super().__init__()
    self.backbone, self.head = Backbone(config), nn.Linear(config.width, outputs, bias=False)

  def forward(self, tokens, start=0):
    return self.head(self.backbone(tokens, torch.arange(tokens.shape[1]))[:, start:])


def _logprobs(model, tokens, start):
  """Of the tokens from `start` on, each given all before it."""
  logits = model(tokens, start - 1)[:, :-1]
  return -F.cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten(), reduction='none').view(len(tokens), -1)


class Torch:
  """The four workloads in hand-written PyTorch: `sft()`, `reward()`, `generate()` and `ppo()` each do one round."""
  def __init__(self, config, batch):
    torch.manual_seed(0)
    self.config, self.batch = config, batch
    draw = lambda *shape: torch.randint(0, config.vocab_size, shape)
    self.rows, self.pairs = draw(batch.sft_rows, batch.tokens), draw(2 * batch.reward_pairs, batch.tokens)
    self.prompts = draw(batch.generate_prompts, batch.prompt_tokens)
    self.asked = draw(batch.ppo_prompts, batch.prompt_tokens)
    self.policy, self.reference = Model(config, config.vocab_size), Model(config, config.vocab_size)
    self.scorer, self.value, self.judge = Model(config, 1), Model(config, 1), Model(config, 1)
    self.sft_loss, self.reward_loss = torch.compile(self._sft_loss), torch.compile(self._reward_loss)
    self.ppo_loss, self.look_back, self.step = map(torch.compile, (self._ppo_loss, self._look_back, self._step))
    self.optimizers = {name: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True) for name, parameters in (
      ('sft', self.policy.parameters()), ('reward', self.scorer.parameters()),
      ('ppo', [*self.policy.parameters(), *self.value.parameters()]))}

  def _update(self, name, loss):
    optimizer = self.optimizers[name]
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]['params'], 1.0)
    optimizer.step()

  def _sft_loss(self, rows):
    return -_logprobs(self.policy, rows, 1).mean()

  def _reward_loss(self, pairs):
    score = self.scorer(pairs)[:, -1, 0].view(-1, 2)
    return -F.logsigmoid(score[:, 0] - score[:, 1]).mean()

  def sft(self):
    self._update('sft', self.sft_loss(self.rows))

  def reward(self):
    self._update('reward', self.reward_loss(self.pairs))

  def generate(self):
    return self._answer(self.prompts, self.batch.new_tokens)

  @torch.no_grad()
  def _answer(self, prompts, new_tokens):
    (B, P), c = prompts.shape, self.config
    caches = [tuple(torch.zeros(B, c.kv_heads, P + new_tokens, c.head_width) for _ in range(2)) for _ in range(c.layers)]
    slot = torch.arange(P + new_tokens)
    said = [self._step(prompts, torch.arange(P), caches, slot <= torch.arange(P)[:, None])]
    for t in range(P, P + new_tokens - 1):
      said.append(self.step(said[-1], torch.tensor([t]), caches, (slot <= t)[None]))
    return torch.cat([prompts, *said], 1)

  def _step(self, tokens, place, caches, mask):
    logits = self.policy.head(self.policy.backbone(tokens, place, caches, mask)[:, -1])
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
    return (cumulative <= torch.rand(len(tokens), 1) * cumulative[:, -1:]).sum(-1, keepdim=True)

  @torch.no_grad()
  def _look_back(self, tokens):
    """What PPO needs of every response token: log-probability, value, advantage, return."""
    P = self.batch.prompt_tokens
    old, reference = _logprobs(self.policy, tokens, P), _logprobs(self.reference, tokens, P)
    values, score = self.value(tokens, P - 1)[:, :-1, 0], self.judge(tokens)[:, -1, 0]
    reward = -0.05 * (old - reference)
    reward[:, -1] += score
    after = torch.zeros_like(score)
    advantages, following = [], after
    for t in reversed(range(reward.shape[1])):
      after = reward[:, t] + following - values[:, t] + 0.95 * after
      following = values[:, t]
      advantages.append(after)
    advantage = torch.stack(advantages[::-1], 1)
    return old, values, (advantage - advantage.mean()) / (advantage.std() + 1e-8), advantage + values

  def _ppo_loss(self, tokens, old, old_values, advantage, returns):
    P = self.batch.prompt_tokens
    ratio = (_logprobs(self.policy, tokens, P) - old).exp()
    values = self.value(tokens, P - 1)[:, :-1, 0]
    near = old_values + (values - old_values).clamp(-0.2, 0.2)
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
    return policy + 0.05 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()

  def ppo(self):
    tokens = self._answer(self.asked, self.batch.new_tokens)
    lessons = (tokens, *self.look_back(tokens))
    for _ in range(self.batch.epochs):
      for some in zip(*(x.chunk(self.batch.minibatches) for x in lessons)):
        self._update('ppo', self.ppo_loss(*some))


class Transformers:
  """SFT and generation of `transformers`, compiled."""
  def __init__(self, config, batch):
    torch.manual_seed(0)
    self.batch = batch
    self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.feedforward_width,
      num_hidden_layers=config.layers, num_attention_heads=config.query_heads, num_key_value_heads=config.kv_heads,
      head_dim=config.head_width, max_position_embeddings=config.context_length, tie_word_embeddings=config.tied,
      bos_token_id=None, eos_token_id=None, pad_token_id=0))
    self.rows = torch.randint(0, config.vocab_size, (batch.sft_rows, batch.tokens))
    self.prompts = torch.randint(0, config.vocab_size, (batch.generate_prompts, batch.prompt_tokens))
    self.loss = torch.compile(lambda rows: self.model(input_ids=rows, labels=rows, use_cache=False).loss)
    self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    self.eager = self.model.forward

  def sft(self):
    self.model.forward = self.eager
    self.optimizer.zero_grad()
    self.loss(self.rows).backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()

  @torch.no_grad()
  def generate(self):
    if not hasattr(self, 'compiled'):
      self.compiled = torch.compile(self.eager)
    self.model.forward = self.compiled
    return self.model.generate(self.prompts, attention_mask=torch.ones_like(self.prompts), do_sample=True, top_k=0,
                               max_new_tokens=self.batch.new_tokens, min_new_tokens=self.batch.new_tokens,
                               cache_implementation='static')


# ---- side by side

class Ours:
  """The workloads of `bench`, each round going on from the state of the last; the first says what cannot be measured."""
  def __init__(self, config, batch, mesh):
    self.config, self.batch, self.mesh = config, batch, mesh
    self.workloads, self.states = {}, {}

  def __getattr__(self, name):
    if name not in bench.WORKLOADS:
      raise AttributeError(name)
    def one_round():
      if name not in self.workloads:
        policy, scalar = LanguageModel(self.config), ScalarModel(self.config)
        runner = make_runner(self.mesh, models=(policy, scalar))
        setting = bench.Setting(runner, policy, scalar, self.batch)
        bench.check(bench.Bench(mesh=self.mesh, batch=self.batch, only=(name,)), setting)
        self.workloads[name] = bench.WORKLOADS[name](setting)
        self.states[name] = self.workloads[name].state
      programs = self.workloads[name].programs
      call = lambda program, *args: jax.block_until_ready(programs[program].call(*args))
      self.states[name] = self.workloads[name].turn(call, self.states[name])
    return one_round


SIDES = 'rlhf_jax', 'PyTorch', 'transformers'
DONE_BY = {'sft': SIDES, 'reward': ('rlhf_jax', 'PyTorch'), 'generate': SIDES, 'ppo': ('rlhf_jax', 'PyTorch')}


def _begin(make, mesh, config, batch):
  """Makes this process one side."""
  global _side
  prepare_process(mesh.cpu_devices)                                              # freed memory stays, for every side
  _side = make(config, batch)


def _round(name):
  """Seconds of one round of a workload of this process's side."""
  began = time.perf_counter()
  getattr(_side, name)()
  return time.perf_counter() - began


def compare(config, batch, mesh, only, repeats):
  """{workload: {who: median seconds of a round}}. A side's memory and threads do not meddle with another's."""
  found, spawn = {}, multiprocessing.get_context('spawn')
  with contextlib.ExitStack() as stack:
    makers = functools.partial(Ours, mesh=mesh), Torch, Transformers
    sides = {who: stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, spawn, _begin, (make, mesh, config, batch)))
             for who, make in zip(SIDES, makers, strict=True)}
    progress = stack.enter_context(rich.progress.Progress(transient=True))
    task = progress.add_task('', total=len(only) * (_WARMUPS + repeats))
    for name in only:
      progress.update(task, description=name)
      seconds = {who: [] for who in DONE_BY[name]}
      for _ in range(_WARMUPS + repeats):
        for who, times in seconds.items():
          times.append(sides[who].submit(_round, name).result())
        progress.advance(task)
      found[name] = {who: statistics.median(times[_WARMUPS:]) for who, times in seconds.items()}
  return found


def main(args=None):
  """The command line; returns what `compare` found."""
  asked = tyro.cli(BenchPeers, description=__doc__, args=args)
  try:
    config = preset(asked.preset)
    if config.family != 'llama':
      raise ConfigError(f'--preset {asked.preset} is of the family {config.family}; the peers are written for llama.')
    if asked.repeats < 1 or not asked.only:
      raise ConfigError('nothing is measured: --repeats must be at least 1, and --only name some workload.')
    found = compare(config, asked.batch, asked.mesh, asked.only, asked.repeats)
  except RlhfJaxError as error:
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    sys.exit(2)
  whole = {f'{who}, s': {name: seconds.get(who) for name, seconds in found.items()} for who in SIDES}
  ratio = {f'rlhf_jax as fast as {who}': {name: seconds[who] / seconds['rlhf_jax'] for name, seconds in found.items()
                                          if who in seconds} for who in SIDES if who != 'rlhf_jax'}
  report.print_table(whole | ratio, f'{asked.preset}, float32, medians of {asked.repeats} rounds in turns; torch '
                     f'{torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}')
  return found


if __name__ == '__main__':
  main()
