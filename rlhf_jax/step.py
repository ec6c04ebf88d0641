"""One update from one batch, and one measurement without it.

A loss returns sums (`Mean(total, weight)`); the step differentiates the total, adds gradients and sums over
microbatches and devices, and divides once, by the weight of the whole batch. So one device, `pmap`, a sharded `jit` and
any number of microbatches give the same update, however ragged the masks. Absent on purpose: compiling, placing and
donating (`runners.py`, or the caller) and shuffling (the stages). Next: `optimizer.py`, `losses/`.
"""

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.errors import ConfigError
from rlhf_jax.records import Max, Mean, TrainState, add_across


def init_state(params, optimizer):
  """The state before the first update. It shares the arrays of `params`: who donates it gives them away too."""
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(loss_fn, optimizer, *, axis_name=None, microbatches=1):
  """step(state, batch, key) -> (state, metrics), where loss_fn(params, batch, key) -> (Mean, dict of Means).

  `axis_name` is the axis mapped over devices, which have each its rows of the batch and all the same state; None under
  `jit`, sharded or not. `microbatches` trades time for memory: every leaf of the batch is cut along its first axis.
  Several microbatches get fold_in(key, index) each; devices share the key, since the losses here draw nothing from it.

  The metrics are the loss's own, 'loss', and 'gradient_norm' (of the mean loss, before clipping). A batch in which
  nothing counts leaves parameters and optimizer as they are, to the bit, but `state.step` counts it.
  """
  if microbatches < 1:
    raise ConfigError(f'microbatches is {microbatches}. A batch is cut into at least one. Pass 1 to keep it whole.')

  def step(state, batch, key):
    gradient, loss, metrics = add_across(_sums(loss_fn, state.params, batch, key, microbatches), axis_name)
    counts = loss.weight != 0
    weight = jnp.where(counts, loss.weight, 1)
    gradient = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), gradient, state.params)
    gradient_norm = jnp.where(counts, optax.tree.norm(gradient), 0)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = optax.tree.where(counts, (params, opt_state), (state.params, state.opt_state))
    metrics = metrics | {'loss': loss, 'gradient_norm': Mean(gradient_norm, jnp.ones(()))}
    return TrainState(state.step + 1, params, opt_state), metrics
  return step


def make_eval_step(loss_fn, *, axis_name=None):
  """eval_step(params, batch, key) -> metrics: the loss's own and 'loss', summed over the mapped axis."""
  def eval_step(params, batch, key):
    loss, metrics = loss_fn(params, batch, key)
    return add_across(metrics | {'loss': loss}, axis_name)
  return eval_step


def _sums(loss_fn, params, batch, key, microbatches):
  """(gradient of the loss's total in float32, loss, metrics), over all microbatches of this device."""
  if microbatches == 1:
    return _sums_of_one(loss_fn, params, batch, key)

  def add(gradient, index_and_part):
    index, part = index_and_part
    more, loss, metrics = _sums_of_one(loss_fn, params, part, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, gradient, more), (loss, metrics)
  zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
  gradient, parts = jax.lax.scan(add, zeros, (jnp.arange(microbatches), _interleave(batch, microbatches)))
  return gradient, *_add_along_first(parts)


def _sums_of_one(loss_fn, params, batch, key):
  def total(params):
    loss, metrics = loss_fn(params, batch, key)
    return loss.total, (loss, metrics)
  gradient, (loss, metrics) = jax.grad(total, has_aux=True)(params)
  return optax.tree.cast(gradient, jnp.float32), loss, metrics


def _interleave(batch, count):
  """Leaves [B, ...] as [count, B / count, ...]; microbatch i has the rows i, i + count, i + 2 count and so on.

  Neighbouring rows go to different microbatches, so a batch sharded along B is spread over all devices in each of them.
  """
  def cut(x):
    if x.shape[0] % count:
      raise ConfigError(f'The batch has {x.shape[0]} rows (on each device, under pmap), which {count} microbatches do '
                        'not divide. All must have the same size. Change the batch size or the number of microbatches.')
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
  return jax.tree.map(cut, batch)


def _add_along_first(tree):
  """Stacked Means summed and stacked Maxes maximised along their first axis, as `+` would one by one."""
  one = lambda x: Max(x.largest.max(0)) if isinstance(x, Max) else jax.tree.map(lambda y: y.sum(0), x)
  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, (Mean, Max)))
