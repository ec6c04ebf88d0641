"""The workloads of `bench` in PyTorch with the models of `transformers`, on one device.

As PyTorch users run them: parameters and moments in float32 under autocast to bfloat16, attention
by scaled_dot_product_attention, fused AdamW, all logits at once, the loss that `transformers`
computes. Models that are not trained (reference, reward model, the writer of answers) are stored
in the compute dtype. Answers come from a static cache and one step a token, which includes
sampling. `compiled` sends the step through `torch.compile`; a decode step then also becomes a CUDA
graph. The very same code runs on a CPU, where the tests run it.

Every class makes its models and data once; `round()` does one round and returns the seconds of its
parts.
"""

import contextlib
import dataclasses
import inspect
import time
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rlhf_jax.model.huggingface_config import config_to_huggingface

_KL_WEIGHT, _LAMBDA, _CLIP = 0.05, 0.95, 0.2  # as our defaults


@dataclasses.dataclass(frozen=True)
class Place:
  """Where and how a side computes: the device, the compute dtype, and whether steps are compiled."""
  device: str  # of torch: 'cuda' or 'cpu'
  dtype: torch.dtype
  compiled: bool = False

  def compile(self, fn, **options):
    """fn, compiled if that is asked for."""
    return torch.compile(fn, **options) if self.compiled else fn

  def autocast(self):
    """A context in which products of float32 parameters are in the compute dtype."""
    if self.dtype == torch.float32:
      return contextlib.nullcontext()
    return torch.autocast(self.device, self.dtype)

  def wait(self):
    """Returns when the device has done all its work."""
    if self.device == 'cuda':
      torch.cuda.synchronize()


class Clock:
  """Seconds of the parts of a round, each until the device has done its work."""
  def __init__(self, place):
    self.place, self.parts, self.began = place, {}, time.perf_counter()

  def part(self, name):
    """Ends the part of that name."""
    self.place.wait()
    now = time.perf_counter()
    self.parts[name] = self.parts.get(name, 0.0) + now - self.began
    self.began = now


# ---- models

def _theirs(config):
  """Our ModelConfig as theirs, with fused attention and no token that ends anything."""
  values = config_to_huggingface(config, end_token=None, pad_token=None)
  values = {key: value for key, value in values.items() if key not in ('dtype', 'torch_dtype')}
  return AutoConfig.for_model(values.pop('model_type'), **values, attn_implementation='sdpa')


def language_model(config, place):
  """A language model with random weights in float32."""
  with torch.device(place.device):
    return AutoModelForCausalLM.from_config(_theirs(config))


class ScalarModel(nn.Module):
  """A number for every token from `start` on: their backbone, and a head."""
  def __init__(self, config, place):
    super().__init__()
    with torch.device(place.device):
      self.backbone = AutoModel.from_config(_theirs(config))
      self.head = nn.Linear(config.width, 1, bias=False)

  def forward(self, tokens, start=0):
    stream = self.backbone(input_ids=tokens, use_cache=False).last_hidden_state
    return self.head(stream[:, start:])[..., 0].float()


def frozen(model, place):
  """The model in the compute dtype, without gradients."""
  return model.to(place.dtype).requires_grad_(False)


def response_logprobs(model, tokens, P):
  """Log-probability of each token from P on, given all before it; only their logits are computed."""
  R = tokens.shape[1] - P
  logits = model(input_ids=tokens, use_cache=False, logits_to_keep=R + 1).logits[:, :-1]
  surprise = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, P:].flatten(),
                             reduction='none')
  return -surprise.view(len(tokens), R)


class Descent:
  """Updates of parameters: the gradient's norm is clipped at 1, then fused AdamW."""
  def __init__(self, parameters):
    self.parameters = list(parameters)
    self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=True)

  def update(self, loss):
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(self.parameters, 1.0)
    self.optimizer.step()


class Writer:
  """Answers of R tokens to prompts of P, sampled at temperature 1 over a static cache."""
  def __init__(self, model, P, R, place):
    self.model, self.P, self.R, self.place = model, P, R, place
    self.cache = transformers.StaticCache(config=model.config, max_cache_len=P + R)
    # The name of the argument has changed between versions of transformers.
    known = inspect.signature(type(model).forward).parameters
    self.cache_argument = 'cache' if 'cache' in known else 'past_key_values'
    self.step = place.compile(self.next_tokens, mode='reduce-overhead')

  def next_tokens(self, tokens, position):
    """A sampled token after each row of `tokens`, which stand at `position`."""
    logits = self.model(input_ids=tokens, position_ids=position, use_cache=True,
                        logits_to_keep=1, **{self.cache_argument: self.cache}).logits[:, -1]
    # Exponential noise divided into probabilities has its largest where a sample would fall.
    probabilities = logits.float().softmax(-1)
    noise = torch.empty_like(probabilities).exponential_()
    return (probabilities / noise).argmax(-1, keepdim=True)

  @torch.no_grad()
  def __call__(self, prompts):
    """Tokens of prompts and answers together."""
    self.cache.reset()
    positions = torch.arange(self.P + self.R, device=prompts.device)[None]
    answers = [self.next_tokens(prompts, positions[:, :self.P])]
    for t in range(self.P, self.P + self.R - 1):
      # A copy: the next run of a CUDA graph writes where this one did.
      answers.append(self.step(answers[-1], positions[:, t:t + 1]).clone())
    return torch.cat([prompts, *answers], 1)


# ---- workloads

class Sft:
  """One update on B sequences of T tokens."""
  def __init__(self, config, batch, place):
    self.place = place
    self.model = language_model(config, place)
    self.rows = _tokens(config, place, batch.sft_rows, batch.tokens)
    self.descent = Descent(self.model.parameters())
    self.loss = place.compile(self._loss)

  def _loss(self, rows):
    with self.place.autocast():
      return self.model(input_ids=rows, labels=rows, use_cache=False).loss

  def round(self):
    clock = Clock(self.place)
    self.descent.update(self.loss(self.rows))
    clock.part('update')
    return clock.parts


class Reward:
  """One update on pairs of responses."""
  def __init__(self, config, batch, place):
    self.place = place
    self.model = ScalarModel(config, place)
    self.pairs = _tokens(config, place, 2 * batch.reward_pairs, batch.of_reward)
    self.descent = Descent(self.model.parameters())
    self.loss = place.compile(self._loss)

  def _loss(self, pairs):
    last = pairs.shape[1] - 1
    with self.place.autocast():
      score = self.model(pairs, last)
    chosen, rejected = score.view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected).mean()

  def round(self):
    clock = Clock(self.place)
    self.descent.update(self.loss(self.pairs))
    clock.part('update')
    return clock.parts


class Generate:
  """Answers to prompts, by a loop of our own."""
  def __init__(self, config, batch, place):
    self.place = place
    self.prompts = _tokens(config, place, batch.generate_prompts, batch.prompt_tokens)
    model = frozen(language_model(config, place), place)
    self.write = Writer(model, batch.prompt_tokens, batch.new_tokens, place)

  def round(self):
    clock = Clock(self.place)
    self.answers = self.write(self.prompts)
    clock.part('generate')
    return clock.parts


class LibraryGenerate:
  """Answers to prompts by `generate` of transformers with a static cache, compiled by it on GPUs."""
  def __init__(self, config, batch, place):
    self.place, self.batch = place, batch
    self.prompts = _tokens(config, place, batch.generate_prompts, batch.prompt_tokens)
    self.model = frozen(language_model(config, place), place)

  def round(self):
    clock, R = Clock(self.place), self.batch.new_tokens
    self.answers = self.model.generate(
      self.prompts, attention_mask=torch.ones_like(self.prompts), do_sample=True, top_k=0,
      max_new_tokens=R, min_new_tokens=R, cache_implementation='static',
      disable_compile=not self.place.compiled)
    clock.part('generate')
    return clock.parts


class Ppo:
  """An iteration: answers, scores of four models, then updates of policy and value network."""
  def __init__(self, config, batch, place):
    self.place, self.batch = place, batch
    self.P, R = batch.of_ppo
    self.prompts = _tokens(config, place, batch.ppo_prompts, self.P)
    self.policy, self.value = language_model(config, place), ScalarModel(config, place)
    self.reference = frozen(language_model(config, place), place)
    self.judge = frozen(ScalarModel(config, place), place)
    self.scribe = frozen(language_model(config, place), place)   # the policy in the compute dtype
    self.write = Writer(self.scribe, self.P, R, place)
    self.descent = Descent([*self.policy.parameters(), *self.value.parameters()])
    self.loss = place.compile(self._loss)

  @torch.no_grad()
  def _look_back(self, tokens):
    """Of every response token: log-probability, value, advantage, return."""
    with self.place.autocast():
      logprob = response_logprobs(self.policy, tokens, self.P)
      reference_logprob = response_logprobs(self.reference, tokens, self.P)
      value = self.value(tokens, self.P - 1)[:, :-1]
      score = self.judge(tokens, tokens.shape[1] - 1)[:, 0]
    reward = -_KL_WEIGHT * (logprob - reference_logprob)
    reward[:, -1] += score
    advantage = _advantages(reward, value)
    whitened = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return logprob, value, whitened, advantage + value

  def _loss(self, tokens, old_logprob, old_value, advantage, returns):
    with self.place.autocast():
      ratio = (response_logprobs(self.policy, tokens, self.P) - old_logprob).exp()
      value = self.value(tokens, self.P - 1)[:, :-1]
    near = old_value + (value - old_value).clamp(-_CLIP, _CLIP)
    value_loss = torch.maximum((value - returns) ** 2, (near - returns) ** 2).mean()
    clipped = ratio.clamp(1 - _CLIP, 1 + _CLIP)
    policy_loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
    return policy_loss + 0.05 * value_loss

  def round(self):
    clock = Clock(self.place)
    with torch.no_grad():
      torch._foreach_copy_(list(self.scribe.parameters()), list(self.policy.parameters()))
    tokens = self.write(self.prompts)
    clock.part('generate')
    lessons = tokens, *self._look_back(tokens)
    clock.part('score')
    for _ in range(self.batch.epochs):
      order = torch.randperm(len(tokens), device=tokens.device)
      for rows in order.chunk(self.batch.minibatches):
        self.descent.update(self.loss(*(x[rows] for x in lessons)))
    clock.part('update')
    return clock.parts


def _advantages(reward, value):
  """Generalised advantage estimates with a discount of 1. Schulman et al. 2015 (1506.02438)."""
  after = following = torch.zeros_like(reward[:, 0])
  advantages = []
  for t in reversed(range(reward.shape[1])):
    after = reward[:, t] + following - value[:, t] + _LAMBDA * after
    following = value[:, t]
    advantages.append(after)
  return torch.stack(advantages[::-1], 1)


def _tokens(config, place, *shape):
  return torch.randint(0, config.vocab_size, shape, device=place.device)


SIDES: dict[str, dict[str, Any]] = {
  'PyTorch': {'sft': Sft, 'reward': Reward, 'generate': Generate, 'ppo': Ppo},
  'transformers': {'generate': LibraryGenerate},
}


def import_models(config):
  """Imports the classes of a family, which transformers does when they are first used."""
  with torch.device('meta'):
    AutoModelForCausalLM.from_config(_theirs(config))


class Side:
  """One workload of one side, and what is known of its device."""
  def __init__(self, side, workload, config, batch, place):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    self.place = place
    self.rounds = SIDES[side][workload](config, batch, place)

  def round(self):
    """Seconds of each part of one round."""
    return self.rounds.round()

  def peak_bytes(self):
    """The most that was allocated on the GPU at a time; None on a CPU."""
    return torch.cuda.max_memory_allocated() if self.place.device == 'cuda' else None

  def device_name(self):
    return torch.cuda.get_device_name() if self.place.device == 'cuda' else 'cpu'
