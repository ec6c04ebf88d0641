"""The small Llama and its optimizer a second time, in PyTorch and float64, to compare with.

Nothing here comes from rlhf_jax but the names of the parameters, which are paths:
'policy/backbone/blocks/q_LDNH'.
"""

import math

import numpy as np
import torch

DECAYED = ('q_LDNH', 'k_LDKH', 'v_LDKH', 'o_LNHD', 'gate_LDF', 'up_LDF', 'down_LFD', 'unembed_DV')
NORM_EPSILON, ROPE_BASE = 1e-5, 10000.0


def flat(tree, name=''):
  """{path: float64 tensor} of a nested dict of arrays."""
  if not isinstance(tree, dict):
    return {name: torch.tensor(np.asarray(tree, np.float64))}
  return {
    path: x
    for key, part in tree.items()
    for path, x in flat(part, f'{name}/{key}'.strip('/')).items()
  }


def stream(params, tokens, valid):
  """The normalised stream [B, T, D] after the last block; padding has no position."""
  weight = lambda name: params[f'backbone/{name}']
  tokens, valid = torch.as_tensor(np.asarray(tokens, np.int64)), torch.as_tensor(np.array(valid))
  T = tokens.shape[1]
  position = valid.long().cumsum(1) - valid.long()
  sees = torch.ones(T, T, dtype=torch.bool).tril() & valid[:, None, :] | torch.eye(
    T, dtype=torch.bool
  )
  x = weight('embedding_VD')[tokens]
  for layer in range(len(weight('blocks/q_LDNH'))):
    block = {
      path.split('/')[-1]: p[layer]
      for path, p in params.items()
      if path.startswith('backbone/blocks/')
    }
    y = rms_norm(x, block['attention_norm_LD'])
    q, k, v = (
      torch.einsum('btd,dnh->btnh', y, block[name]) for name in ('q_LDNH', 'k_LDKH', 'v_LDKH')
    )
    q, k = rotated(q, position), rotated(k, position)
    k, v = (z.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for z in (k, v))
    score = torch.einsum('btnh,bsnh->bnts', q, k) / math.sqrt(q.shape[3])
    attention = score.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
    x = x + torch.einsum('bnts,bsnh,nhd->btd', attention, v, block['o_LNHD'])
    y = rms_norm(x, block['feedforward_norm_LD'])
    x = (
      x
      + (torch.nn.functional.silu(y @ block['gate_LDF']) * (y @ block['up_LDF']))
      @ block['down_LFD']
    )
  return rms_norm(x, weight('final_norm_D'))


def rms_norm(x, scale):
  return x / (x.square().mean(-1, keepdim=True) + NORM_EPSILON).sqrt() * scale


def rotated(x, position):
  """Every head turned by its position: number i and number i + H/2 are a pair."""
  half = x.shape[-1] // 2
  angle = position[:, :, None, None] * ROPE_BASE ** (
    -torch.arange(half, dtype=torch.float64) / half
  )
  a, b = x[..., :half], x[..., half:]
  return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def of(params, name):
  """The parameters whose paths begin with that name, without it."""
  return {
    path.removeprefix(f'{name}/'): x for path, x in params.items() if path.startswith(f'{name}/')
  }


def logprobs(params, hidden, temperature=1.0):
  """Log-probabilities [B, T, V] of the token after each place of a stream."""
  return (hidden @ params['unembed/unembed_DV'] / temperature).log_softmax(-1)


def scalars(params, hidden):
  """The number [B, T] that the scalar head reads off a stream."""
  return hidden @ params['scalar/scalar_D'] + params['scalar/bias']


def scores(params, tokens, valid):
  """The scalar at the last token of each sequence."""
  last = torch.tensor([np.flatnonzero(row)[-1] for row in np.asarray(valid)])
  return scalars(params, stream(params, tokens, valid))[torch.arange(len(last)), last]


def rate(config, step, last):
  """The learning rate at a step of a schedule that ends at step `last`."""
  if step < config.warmup_steps:
    return config.learning_rate * step / config.warmup_steps
  x = min(1.0, (step - config.warmup_steps) / (last - config.warmup_steps))
  left = {'constant': 1.0, 'linear': 1 - x, 'cosine': (1 + math.cos(math.pi * x)) / 2}[
    config.schedule
  ]
  share = 0.0 if config.schedule == 'constant' else config.final_share
  return config.learning_rate * (share + (1 - share) * left)


class Adam:
  """Adam with decoupled weight decay, as an OptimizerConfig says; the caller knows the rate."""

  def __init__(self, config):
    self.config, self.count, self.mean, self.square = config, 0, {}, {}

  def update(self, params, loss, learning_rate):
    """(new parameters, norm of the gradient)."""
    c, self.count = self.config, self.count + 1
    paths = [path for path, p in params.items() if p.requires_grad]
    gradient = dict(
      zip(paths, torch.autograd.grad(loss, [params[path] for path in paths], allow_unused=True))
    )
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values() if g is not None))
    scale = 1.0 if c.clip_norm is None or norm < c.clip_norm else c.clip_norm / norm
    new = {}
    for path, p in params.items():
      g = torch.zeros_like(p) if gradient.get(path) is None else gradient[path] * scale
      old = c.beta1 * self.mean.get(path, torch.zeros_like(p))
      m = (old.bfloat16().double() if c.moment_dtype == 'bfloat16' else old) + (1 - c.beta1) * g
      v = c.beta2 * self.square.get(path, torch.zeros_like(p)) + (1 - c.beta2) * g**2
      self.mean[path] = m.bfloat16().double() if c.moment_dtype == 'bfloat16' else m
      self.square[path] = v
      if c.form == 'adamw':
        change = (
          m / (1 - c.beta1**self.count) / ((v / (1 - c.beta2**self.count)).sqrt() + c.epsilon)
        )
      else:
        change = (
          math.sqrt(1 - c.beta2**self.count)
          / (1 - c.beta1**self.count)
          * m
          / (v.sqrt() + c.epsilon)
        )
      decay = c.weight_decay if path.split('/')[-1] in DECAYED else 0.0
      times = c.value_rate if path.startswith('value/') else 1.0
      new[path] = (
        p.detach() - learning_rate * times * (change + decay * p.detach())
      ).requires_grad_(p.requires_grad)
    return new, norm


def trained(params):
  """The same parameters, to be differentiated."""
  return {path: x.clone().requires_grad_() for path, x in params.items()}
