"""One update is one update: cut into microbatches, spread over devices or neither, however ragged the masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import ConfigError
from rlhf_jax.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.records import Max, Mean
from rlhf_jax.step import init_state, make_eval_step, make_train_step

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.05, clip_norm=0.3, weight_decay=0.1))
KEY = jax.random.key(3)


def params():
  rng = np.random.default_rng(0)
  return {'up_DF': jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), 'bias': jnp.float32(0.4)}


def batch(rows=16):
  """Rows with 1 to 6 counted tokens of 6, so the mean of the means of its parts is not its mean."""
  rng = np.random.default_rng(1)
  mask_BT = np.arange(6) < rng.integers(1, 7, size=(rows, 1))
  return {'x_BTD': rng.normal(size=(rows, 6, 3)).astype(np.float32),
          'y_BT': rng.normal(size=(rows, 6)).astype(np.float32), 'mask_BT': mask_BT}


def error_BT(params, batch):
  return (jnp.tanh(batch['x_BTD'] @ params['up_DF']).sum(-1) + params['bias'] - batch['y_BT']) ** 2


def loss_fn(params, batch, key):
  """Mean squared error of the counted tokens, with a mean over rows and a maximum for company."""
  del key
  e_BT = error_BT(params, batch)
  loss = Mean((e_BT * batch['mask_BT']).sum(), batch['mask_BT'].sum().astype(jnp.float32))
  return loss, {'length': Mean(batch['mask_BT'].sum().astype(jnp.float32), jnp.float32(len(e_BT))),
                'worst': Max(e_BT.max())}


def mean_of_means_loss_fn(params, batch, key):
  """What this project must never do: divide inside the loss, where only a part of the batch is seen."""
  loss, _ = loss_fn(params, batch, key)
  return Mean(loss.value(), jnp.ones(())), {}


def values(metrics):
  return {name: float(metric.value()) for name, metric in metrics.items()}


def after(step, steps=3):
  """Parameters and the values of the last metrics after some steps on one batch."""
  state, data = init_state(params(), OPTIMIZER), batch()
  for _ in range(steps):
    state, metrics = step(state, data, KEY)
  assert int(state.step) == steps and state.step.dtype == jnp.int32
  return state.params, values(metrics)


def whole_batch_by_hand():
  """Three updates with the gradient of the plain mean, without any of our step."""
  p, data = params(), batch()
  opt_state = OPTIMIZER.init(p)
  loss = lambda p: (error_BT(p, data) * data['mask_BT']).sum() / data['mask_BT'].sum()
  for _ in range(3):
    value, gradient = jax.value_and_grad(loss)(p)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state, p)
    p = optax.apply_updates(p, updates)
  return p, value, gradient


def assert_close(got, want, tolerance=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


def pmapped(loss_fn=loss_fn, **options):
  step = jax.pmap(make_train_step(loss_fn, OPTIMIZER, axis_name='device', **options), axis_name='device',
                  in_axes=(None, 0, None), out_axes=None)
  split = lambda data: jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), data)
  return lambda state, data, key: step(state, split(data), key)


def test_an_update_is_that_of_the_mean_over_counted_tokens():
  want, value, gradient = whole_batch_by_hand()
  got, metrics = after(jax.jit(make_train_step(loss_fn, OPTIMIZER)))
  assert_close(got, want)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
  np.testing.assert_allclose(metrics['length'], batch()['mask_BT'].sum(1).mean(), rtol=1e-6)
  norm = np.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(gradient)))
  assert norm > 2 * 0.3, 'the gradient should be one that is clipped'
  np.testing.assert_allclose(metrics['gradient_norm'], norm, rtol=1e-5)


@pytest.mark.parametrize('microbatches', [2, 4])
def test_microbatches_give_the_update_of_the_whole_batch(microbatches):
  assert_close(after(jax.jit(make_train_step(loss_fn, OPTIMIZER, microbatches=microbatches))),
               after(jax.jit(make_train_step(loss_fn, OPTIMIZER))))


@pytest.mark.parametrize('step', [
  jax.jit(make_train_step(mean_of_means_loss_fn, OPTIMIZER, microbatches=2)),
  jax.jit(make_train_step(mean_of_means_loss_fn, OPTIMIZER, microbatches=4)), pmapped(mean_of_means_loss_fn)])
def test_a_mean_of_means_would_not(step):
  """The batch is ragged enough for the tests around this one to notice, by a hundred times their tolerance."""
  (wrong, wrong_metrics), (right, right_metrics) = after(step), after(jax.jit(make_train_step(loss_fn, OPTIMIZER)))
  assert np.abs(wrong['up_DF'] - right['up_DF']).max() > 1e-3
  assert abs(wrong_metrics['loss'] - right_metrics['loss']) > 1e-3
  assert abs(wrong_metrics['gradient_norm'] - right_metrics['gradient_norm']) > 1e-3


@pytest.mark.parametrize('microbatches', [1, 2])
def test_pmap_over_eight_devices_gives_the_update_of_one(microbatches):
  assert jax.device_count() == 8
  assert_close(after(pmapped(microbatches=microbatches)), after(jax.jit(make_train_step(loss_fn, OPTIMIZER))))


@pytest.mark.parametrize('microbatches', [1, 2])
def test_a_batch_sharded_over_eight_devices_gives_the_update_of_one(microbatches):
  rows = NamedSharding(Mesh(np.array(jax.devices()), ('data',)), PartitionSpec('data'))
  step = jax.jit(make_train_step(loss_fn, OPTIMIZER, microbatches=microbatches))
  got = after(lambda state, data, key: step(state, jax.device_put(data, rows), key))
  assert_close(got, after(jax.jit(make_train_step(loss_fn, OPTIMIZER))))


def test_microbatches_are_interleaved():
  """Of rows 0 to 7 in two microbatches the first rows are 0 and 1; contiguous halves would start with 0 and 4."""
  first = lambda params, batch, key: (Mean(params['bias'] * batch['row_B'].sum(), jnp.ones(())),
                                      {'first': Mean(batch['row_B'][0], jnp.ones(()))})
  step = make_train_step(first, OPTIMIZER, microbatches=2)
  _, metrics = step(init_state(params(), OPTIMIZER), {'row_B': jnp.arange(8.0)}, KEY)
  assert (float(metrics['first'].total), float(metrics['first'].weight)) == (0 + 1, 2)


def test_each_microbatch_has_its_own_key_and_a_whole_batch_the_one_given():
  noisy = lambda params, batch, key: (Mean(params['bias'] * batch['y_BT'].sum(), jnp.ones(())),
                                      {'noise': Mean(jax.random.uniform(key), jnp.ones(()))})
  noise = lambda **options: float(
    make_train_step(noisy, OPTIMIZER, **options)(init_state(params(), OPTIMIZER), batch(), KEY)[1]['noise'].total)
  np.testing.assert_allclose(noise(), jax.random.uniform(KEY), rtol=1e-6)
  want = sum(float(jax.random.uniform(jax.random.fold_in(KEY, i))) for i in range(4))
  np.testing.assert_allclose(noise(microbatches=4), want, rtol=1e-6)


def all_masked(data):
  return data | {'mask_BT': np.zeros_like(data['mask_BT'])}


@pytest.mark.parametrize('step', [jax.jit(make_train_step(loss_fn, OPTIMIZER)),
                                  jax.jit(make_train_step(loss_fn, OPTIMIZER, microbatches=2)), pmapped()])
def test_a_batch_in_which_nothing_counts_changes_nothing_but_the_step(step):
  """After one real update, so that momentum and decay alone would move the parameters."""
  before, _ = step(init_state(params(), OPTIMIZER), batch(), KEY)
  state, metrics = step(before, all_masked(batch()), KEY)
  jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
  assert int(state.step) == 2
  assert values(metrics)['loss'] == 0 and values(metrics)['gradient_norm'] == 0
  moved, _ = step(state, batch(), KEY)
  assert float(jnp.abs(moved.params['bias'] - state.params['bias'])) > 1e-3


def test_nan_in_a_batch_in_which_nothing_counts_does_not_reach_the_state():
  """0 * nan is nan, so a loss may well have such a gradient where every token is masked."""
  spoilt = lambda params, batch, key: (Mean((params['bias'] * batch['y_BT']).sum(), jnp.zeros(())), {})
  before, data = init_state(params(), OPTIMIZER), {'y_BT': jnp.full((2, 6), jnp.nan)}
  assert jnp.isnan(jax.grad(lambda p: spoilt(p, data, KEY)[0].total)(before.params)['bias'])
  state, metrics = jax.jit(make_train_step(spoilt, OPTIMIZER))(before, data, KEY)
  jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
  assert float(metrics['gradient_norm'].value()) == 0


def test_gradients_are_added_in_float32_even_for_bfloat16_parameters():
  """256 + 1 is 256 in bfloat16; in float32 the four microbatches sum to 259, and their mean shows in the norm."""
  linear = lambda params, batch, key: (Mean((params['w_D'] * batch['x_BD']).sum().astype(jnp.float32),
                                            jnp.float32(len(batch['x_BD']))), {})
  state = init_state({'w_D': jnp.ones(1, jnp.bfloat16)}, optax.sgd(0.5))
  data = {'x_BD': jnp.array([[256.0], [1.0], [1.0], [1.0]], jnp.bfloat16)}
  state, metrics = make_train_step(linear, optax.sgd(0.5), microbatches=4)(state, data, KEY)
  assert float(metrics['gradient_norm'].value()) == float(jnp.bfloat16(259 / 4)) != 256 / 4
  assert state.params['w_D'].dtype == jnp.bfloat16


def test_metrics_are_sums_that_travel():
  step = jax.jit(make_train_step(loss_fn, OPTIMIZER, microbatches=4))
  _, metrics = step(init_state(params(), OPTIMIZER), batch(), KEY)
  assert set(metrics) == {'loss', 'gradient_norm', 'length', 'worst'}
  assert float(metrics['loss'].weight) == batch()['mask_BT'].sum()
  assert float(metrics['length'].weight) == 16
  assert float(metrics['gradient_norm'].weight) == 1
  np.testing.assert_allclose(metrics['worst'].value(), error_BT(params(), batch()).max(), rtol=1e-6)


def test_evaluation_is_the_same_on_one_device_and_on_eight():
  data, axis = batch(), {'axis_name': 'device'}
  one = jax.jit(make_eval_step(loss_fn))(params(), data, KEY)
  on_eight = jax.pmap(make_eval_step(loss_fn, **axis), in_axes=(None, 0, None), out_axes=None, **axis)
  eight = on_eight(params(), jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), data), KEY)
  assert set(one) == {'loss', 'length', 'worst'}
  assert_close(eight, one)
  want = (error_BT(params(), data) * data['mask_BT']).sum() / data['mask_BT'].sum()
  np.testing.assert_allclose(one['loss'].value(), want, rtol=1e-6)


def test_rows_that_the_microbatches_do_not_divide_are_refused():
  step = jax.jit(make_train_step(loss_fn, OPTIMIZER, microbatches=4))
  with pytest.raises(ConfigError, match=r'^The batch has 6 rows .* which 4 microbatches do not divide'):
    step(init_state(params(), OPTIMIZER), batch(6), KEY)


def test_less_than_one_microbatch_is_refused():
  with pytest.raises(ConfigError, match=r'^microbatches is 0. A batch is cut into at least one'):
    make_train_step(loss_fn, OPTIMIZER, microbatches=0)
