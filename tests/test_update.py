"""Epochs and minibatches: every row once an epoch, in a new order each, and the same ones on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import ConfigError
from rlhf_jax.records import Mean
from rlhf_jax.step import init_state, make_train_step
from rlhf_jax.update import make_update

ROWS, DEVICES = 48, 8
KEY = jax.random.key(0)


def record(state, batch, key):
  """A step that counts, and whose metrics are which rows it was given, under which number and with which key."""
  return state + 1, {'row': batch['row_B'], 'tenfold': batch['x_BT'], 'number': state, 'key': jax.random.key_data(key)}


def batch():
  row_B = jnp.arange(ROWS)
  return {'row_B': row_B, 'x_BT': 10 * row_B[:, None] + jnp.arange(2)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def visited(epochs, minibatches, key=KEY):
  """(state afterwards, metrics) of the recording step."""
  return make_update(record, epochs=epochs, minibatches=minibatches)(jnp.int32(0), batch(), key)


def test_each_epoch_visits_each_row_once_in_its_own_order():
  state, metrics = visited(3, 4)
  row_EMB = np.array(metrics['row'])
  assert row_EMB.shape == (3, 4, 12) and state == 12
  for row_MB in row_EMB:
    assert sorted(row_MB.ravel()) == list(range(ROWS))
    assert not np.array_equal(row_MB.ravel(), np.arange(ROWS))
  orders = {tuple(row_MB.ravel()) for row_MB in row_EMB}
  partitions = {frozenset(frozenset(row_B.tolist()) for row_B in row_MB) for row_MB in row_EMB}
  assert len(orders) == len(partitions) == 3


def test_rows_stay_together_across_the_arrays_of_a_batch():
  _, metrics = visited(2, 4)
  np.testing.assert_array_equal(metrics['tenfold'], 10 * metrics['row'][..., None] + np.arange(2))


def test_metrics_are_stacked_in_the_order_of_the_steps():
  _, metrics = visited(3, 4)
  np.testing.assert_array_equal(metrics['number'], np.arange(12).reshape(3, 4))
  assert len(np.unique(np.reshape(metrics['key'], (12, -1)), axis=0)) == 12     # no two steps share their chance


def test_the_order_depends_on_the_key_and_on_nothing_else():
  (_, one), (_, again), (_, other) = visited(2, 4), visited(2, 4), visited(2, 4, jax.random.key(1))
  _, more_epochs = visited(3, 4)
  np.testing.assert_array_equal(one['row'], again['row'])
  np.testing.assert_array_equal(one['row'], more_epochs['row'][:2])
  assert not np.array_equal(one['row'], other['row'])


def params():
  return {'up_DF': jnp.float32(np.random.default_rng(0).normal(size=(3, 2))), 'bias': jnp.float32(0.4)}


def regression():
  """Rows with 1 to 6 counted tokens of 6."""
  rng = np.random.default_rng(1)
  return {'x_BTD': jnp.float32(rng.normal(size=(ROWS, 6, 3))), 'y_BT': jnp.float32(rng.normal(size=(ROWS, 6))),
          'mask_BT': jnp.array(np.arange(6) < rng.integers(1, 7, size=(ROWS, 1)))}


def loss_fn(params, batch, key):
  del key
  error_BT = (jnp.tanh(batch['x_BTD'] @ params['up_DF']).sum(-1) + params['bias'] - batch['y_BT']) ** 2
  return Mean((error_BT * batch['mask_BT']).sum(), batch['mask_BT'].sum(dtype=jnp.float32)), {}


def trained(epochs, minibatches, axis_name=None):
  """An update of real steps, not compiled."""
  return make_update(make_train_step(loss_fn, optax.adam(0.05), axis_name=axis_name), epochs=epochs,
                     minibatches=minibatches, axis_name=axis_name)


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_one_epoch_of_one_minibatch_is_one_step():
  state = init_state(params(), optax.adam(0.05))
  once, metrics = jax.jit(trained(1, 1))(state, regression(), KEY)
  step, step_metrics = jax.jit(make_train_step(loss_fn, optax.adam(0.05)))(state, regression(), KEY)
  close(once, step)
  close(jax.tree.map(lambda x: x[0, 0], metrics), step_metrics)
  assert metrics['loss'].total.shape == (1, 1)
  assert not np.allclose(once.params['up_DF'], state.params['up_DF'])


def test_a_step_starts_from_what_the_step_before_left():
  """Two epochs of three minibatches by hand, in the recorded order."""
  state = init_state(params(), optax.adam(0.05))
  updated, metrics = jax.jit(trained(2, 3))(state, regression(), KEY)
  step = jax.jit(make_train_step(loss_fn, optax.adam(0.05)))
  _, recorded = visited(2, 3)
  losses = []
  for row_B in np.array(recorded['row']).reshape(6, -1):
    state, step_metrics = step(state, jax.tree.map(lambda x, row_B=row_B: x[row_B], regression()), KEY)
    losses.append(float(step_metrics['loss'].value()))
  close(updated, state)
  np.testing.assert_allclose(jax.vmap(jax.vmap(Mean.value))(metrics['loss']).ravel(), losses, rtol=1e-5)


def on_devices(update, state, batch):
  """The update under pmap, rows split over the devices; a leading device axis on all that comes out."""
  split = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
  return jax.pmap(update, axis_name='data', in_axes=(None, 0, None))(state, split, KEY)


def test_devices_share_the_minibatches_of_one():
  _, alone = visited(2, 3)
  _, metrics = on_devices(make_update(record, epochs=2, minibatches=3, axis_name='data'), jnp.int32(0), batch())
  row_EMB = np.moveaxis(np.array(metrics['row']), 0, 2).reshape(2, 3, -1)
  np.testing.assert_array_equal(row_EMB, alone['row'])
  assert metrics['row'].shape == (DEVICES, 2, 3, ROWS // 3 // DEVICES)


def test_devices_arrive_where_one_does():
  state = init_state(params(), optax.adam(0.05))
  alone, alone_metrics = jax.jit(trained(2, 3))(state, regression(), KEY)
  shared, metrics = on_devices(trained(2, 3, 'data'), state, regression())
  for device in (0, DEVICES - 1):
    close(jax.tree.map(lambda x, d=device: x[d], shared), alone)
    close(jax.tree.map(lambda x, d=device: x[d], metrics), alone_metrics)


def test_rows_that_do_not_divide_are_refused():
  with pytest.raises(ConfigError, match='48 rows does not divide into 5 minibatches on 1 devices'):
    visited(1, 5)
  with pytest.raises(ConfigError, match='48 rows does not divide into 4 minibatches on 8 devices'):
    on_devices(make_update(record, epochs=1, minibatches=4, axis_name='data'), jnp.int32(0), batch())
