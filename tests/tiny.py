"""Models that compile in about a second, with parameters that are nowhere 0 or 1, and their numbers in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from families import FAMILIES

from rlhf_jax.model import forward
from rlhf_jax.model.heads import LanguageModel, ScalarModel, initial_params


def config(family='gpt2', **changes):
  """One layer of a family. GPT-2 is the default for its learned positions: a wrong position changes every number."""
  return dataclasses.replace(FAMILIES[family], **{'layers': 1, 'vocab_size': 19} | changes)


def models(family='gpt2', **changes):
  """(LanguageModel, ScalarModel) of one configuration."""
  return LanguageModel(config(family, **changes)), ScalarModel(config(family, **changes))


def params(model, seed):
  """Initial parameters plus noise, so that biases, norms and the position table take part."""
  leaves, tree = jax.tree.flatten(jax.jit(initial_params, static_argnums=0)(model, jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(tree, [leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])


def pad(rows, sides, length):
  """(rows as int32 [B, length], valid) with padding of token 1 on the side named for each: a token that models know."""
  padded, valid = np.ones((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
  for b, (row, side) in enumerate(zip(rows, sides, strict=True)):
    slots = slice(0, len(row)) if side == 'right' else slice(length - len(row), length)
    padded[b, slots], valid[b, slots] = row, True
  return jnp.array(padded), jnp.array(valid)


def log_softmax(logits):
  """float64, along the last axis."""
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


_logits = jax.jit(forward.logits, static_argnums=0)
_values = jax.jit(forward.values, static_argnums=0)


def next_token_tables(model, params, rows, length, temperature=1.0):
  """For every row a float64 [len, V]: entry i are the log-probabilities of the token after the first i + 1."""
  logits_BTV = _logits(model, params, *pad(rows, ['right'] * len(rows), length))
  return [log_softmax(np.asarray(logits_TV)[:len(row)] / temperature) for logits_TV, row in zip(logits_BTV, rows)]


def values_of(model, params, rows, length):
  """For every row a float64 [len]: the scalar after each token."""
  value_BT = np.asarray(_values(model, params, *pad(rows, ['right'] * len(rows), length)), np.float64)
  return [value_T[:len(row)] for value_T, row in zip(value_BT, rows)]


def by_cudnn(given):
  """A configuration with cuDNN's attention: on a CPU the same call by XLA, here in float32.

  The kernel itself computes in bfloat16 and refuses others. In float32 nothing is lost in rounding, so
  that numbers can be compared closely.
  """
  made = dataclasses.replace(given, attention='cudnn', dtype='bfloat16')
  object.__setattr__(made, 'dtype', 'float32')
  return made


def equations(jaxpr):
  """All of a program, whatever they are inside of."""
  for equation in jaxpr.eqns:
    yield equation
    is_program = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)
