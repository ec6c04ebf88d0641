"""All epochs and minibatches of a PPO iteration in one dispatch: a scan of train steps over permuted rows."""

import jax
import jax.numpy as jnp

from rlhf_jax.errors import ConfigError


def make_update(step, *, epochs, minibatches, axis_name=None):
  """update(state, batch, key) -> (state, metrics): `epochs` passes over the rows, a fresh permutation each,
  and a fresh key for every step.

  Metrics are those of the step, stacked [epochs, minibatches]: the first is the first minibatch of the first epoch. With
  `axis_name`, rows are permuted across devices, so that the minibatches are the same ones on any number of them.
  """
  def update(state, batch, key):
    order_key, step_key = jax.random.split(key)
    order_EMB, rows = _orders(batch, order_key, epochs, minibatches, axis_name)

    def one_minibatch(state, numbered):
      number, order_B = numbered
      chosen = jax.tree.map(lambda x: x[order_B], rows)
      return step(state, chosen, jax.random.fold_in(step_key, number))

    def one_epoch(state, numbered):
      return jax.lax.scan(one_minibatch, state, numbered)

    number_EM = jnp.arange(epochs * minibatches).reshape(epochs, minibatches)
    return jax.lax.scan(one_epoch, state, (number_EM, order_EMB))
  return update


def _orders(batch, key, epochs, minibatches, axis_name):
  """Row numbers of every minibatch, [epochs, minibatches, rows of this device], and the rows that they number."""
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  B = jax.tree.leaves(batch)[0].shape[0] * devices
  if B % (minibatches * devices):
    raise ConfigError(f'a batch of {B} rows does not divide into {minibatches} minibatches on {devices} devices. '
                      'Choose a batch size that is a multiple of both together.')
  permute = lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), B)
  order = jax.vmap(permute)(jnp.arange(epochs)).reshape(epochs, minibatches, devices, -1)
  if axis_name is None:
    return order[:, :, 0], batch
  everything = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), batch)
  return order[:, :, jax.lax.axis_index(axis_name)], everything
