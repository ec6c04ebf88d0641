"""Updates against Adam written out in NumPy, schedules against their closed forms, and what decays by its name."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import ConfigError
from rlhf_jax.optimizer import OptimizerConfig, decays, learning_rate, make_optimizer

SHAPES = {'q_DNH': (3, 2, 2), 'attention_norm_D': (3,), 'embedding_VD': (5, 3)}
CONFIG = OptimizerConfig(learning_rate=0.037, clip_norm=None, beta1=0.83, beta2=0.957, epsilon=3e-3)


def numbers(seed):
  """A float32 array for every name, of sizes that differ from name to name."""
  rng = np.random.default_rng(seed)
  return {name: (0.3 * (i + 1) * rng.normal(size=shape)).astype(np.float32)
          for i, (name, shape) in enumerate(SHAPES.items())}


def run(optimizer, params, gradients):
  """Parameters after one compiled update for each gradient."""
  state = optimizer.init(params)

  @jax.jit
  def one(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state
  for gradient in gradients:
    params, state = one(params, state, gradient)
  return params, state


def adam_by_hand(c, param, gradients, *, decay=0.0, rate=1.0):
  """One parameter in float64, the two forms as their papers and sources write them."""
  m = v = 0.0
  param = np.asarray(param, np.float64)
  for t, g in enumerate(gradients, start=1):
    g = np.asarray(g, np.float64)
    m, v = c.beta1 * m + (1 - c.beta1) * g, c.beta2 * v + (1 - c.beta2) * g ** 2
    if c.form == 'adamw':
      change = (m / (1 - c.beta1 ** t)) / (np.sqrt(v / (1 - c.beta2 ** t)) + c.epsilon)
    else:
      change = np.sqrt(1 - c.beta2 ** t) / (1 - c.beta1 ** t) * m / (np.sqrt(v) + c.epsilon)
    param = param - c.learning_rate * rate * (change + decay * param)
  return param


@pytest.mark.parametrize('form', ['adamw', 'tensorflow'])
@pytest.mark.parametrize('weight_decay', [0.0, 0.31])
def test_updates_are_those_of_adam_written_out(form, weight_decay):
  config = dataclasses.replace(CONFIG, form=form, weight_decay=weight_decay)
  params, gradients = numbers(0), [numbers(seed) for seed in range(1, 6)]
  got, _ = run(make_optimizer(config), params, gradients)
  for name, param in params.items():
    decay = weight_decay if name == 'q_DNH' else 0.0
    want = adam_by_hand(config, param, [g[name] for g in gradients], decay=decay)
    np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=2e-6, err_msg=name)


def test_the_forms_differ_early_by_where_epsilon_enters():
  """First update, gradient g: g / (|g| + epsilon), and in TensorFlow g / (|g| + epsilon / sqrt(1 - beta2))."""
  params, gradient = {'q_DNH': np.full((1, 1, 1), 0.5, np.float32)}, {'q_DNH': np.full((1, 1, 1), 0.02, np.float32)}
  for form, epsilon in [('adamw', 3e-3), ('tensorflow', 3e-3 / math.sqrt(1 - 0.957))]:
    got, _ = run(make_optimizer(dataclasses.replace(CONFIG, form=form)), params, [gradient])
    np.testing.assert_allclose(0.5 - got['q_DNH'].item(), 0.037 * 0.02 / (0.02 + epsilon), rtol=1e-5)


@pytest.mark.parametrize('form', ['adamw', 'tensorflow'])
def test_only_the_first_moment_is_stored_in_bfloat16(form):
  config = dataclasses.replace(CONFIG, form=form, moment_dtype='bfloat16')
  params, gradients = numbers(0), [numbers(seed) for seed in range(1, 4)]
  got, state = run(make_optimizer(config), params, gradients)
  adam = state[1]
  assert {x.dtype.name for x in jax.tree.leaves(adam.mu)} == {'bfloat16'}
  assert {x.dtype.name for x in jax.tree.leaves(adam.nu)} == {'float32'}
  want = adam_by_hand(config, params['q_DNH'], [g['q_DNH'] for g in gradients])
  np.testing.assert_allclose(got['q_DNH'], want, atol=0.037 * 3 * 0.02)      # 8 bits of mantissa, three updates
  assert np.abs(got['q_DNH'] - want).max() > 1e-6


def test_the_state_keeps_the_names_of_parameters_and_counts_in_int32():
  params = {'policy': {'block': {'q_LDNH': jnp.ones((2, 3, 2, 2))}}}
  optimizer = make_optimizer(dataclasses.replace(CONFIG, weight_decay=0.1, value_rate=9.0))
  state = optimizer.init(params)
  paths = [jax.tree_util.keystr(path, simple=True, separator='/') for path, x in jax.tree.leaves_with_path(state)
           if x.ndim]
  assert paths == ['1/mu/policy/block/q_LDNH', '1/nu/policy/block/q_LDNH']
  assert [x.dtype.name for x in jax.tree.leaves(state) if not x.ndim] == ['int32', 'int32']
  _, after = jax.jit(optimizer.update)(params, state, params)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_a_large_gradient_is_clipped_as_a_whole_and_a_small_one_is_not():
  """Adam hardly feels the size of one gradient, so the second update shows it: large first, then small."""
  params, large, small = numbers(0), numbers(1), jax.tree.map(lambda x: 0.01 * x, numbers(2))
  norm = math.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in large.values()))
  clip = 0.7
  assert norm > clip > 0.01 * norm
  got, _ = run(make_optimizer(dataclasses.replace(CONFIG, clip_norm=clip)), params, [large, small])
  free, _ = run(make_optimizer(CONFIG), params, [large, small])
  for name, param in params.items():
    want = adam_by_hand(CONFIG, param, [large[name].astype(np.float64) * clip / norm, small[name]])
    np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=2e-6, err_msg=name)
    assert np.abs(got[name] - free[name]).max() > 1e-3, name


def test_value_rate_multiplies_updates_and_decay_under_the_top_level_key_value():
  params, gradients = numbers(0), [numbers(1), numbers(2)]
  both = lambda tree: {'policy': {'value': tree}, 'value': tree}
  config = dataclasses.replace(CONFIG, weight_decay=0.2, value_rate=9.5)
  got, _ = run(make_optimizer(config), both(params), [both(g) for g in gradients])
  for name, param in params.items():
    decay = 0.2 if name == 'q_DNH' else 0.0
    for part, rate in [(got['policy']['value'], 1.0), (got['value'], 9.5)]:
      want = adam_by_hand(config, param, [g[name] for g in gradients], decay=decay, rate=rate)
      np.testing.assert_allclose(part[name], want, rtol=3e-5, atol=3e-6, err_msg=name)


@pytest.mark.parametrize('step, share', [(0, 0.0), (3, 3 / 4), (4, 1.0), (9, 1.0), (500, 1.0)])
def test_constant_schedule(step, share):
  config = OptimizerConfig(learning_rate=0.02, schedule='constant', warmup_steps=4)
  np.testing.assert_allclose(learning_rate(config, step), 0.02 * share, rtol=1e-6)


@pytest.mark.parametrize('schedule, shape', [('linear', lambda x: 1 - x),
                                             ('cosine', lambda x: (1 + math.cos(math.pi * x)) / 2)])
@pytest.mark.parametrize('warmup_steps', [0, 5])
@pytest.mark.parametrize('final_share', [0.0, 0.1])
def test_decaying_schedules(schedule, shape, warmup_steps, final_share):
  config = OptimizerConfig(learning_rate=0.02, schedule=schedule, warmup_steps=warmup_steps, total_steps=25,
                           final_share=final_share)
  rates = jax.jit(jax.vmap(lambda step: learning_rate(config, step)))(jnp.arange(30))
  for step, rate in enumerate(rates):
    along = min(1.0, (step - warmup_steps) / (25 - warmup_steps))
    want = step / warmup_steps if step < warmup_steps else final_share + (1 - final_share) * shape(along)
    np.testing.assert_allclose(rate, 0.02 * want, rtol=1e-5, atol=1e-8, err_msg=str(step))


def test_the_rate_anneals_per_step_of_several_updates():
  """With a constant gradient of sign s every update of Adam is rate * s, so differences show the rates."""
  config = OptimizerConfig(learning_rate=0.03, schedule='linear', total_steps=4, clip_norm=None, epsilon=1e-12)
  optimizer = make_optimizer(config, updates_per_step=3)
  params = {'q_DNH': jnp.zeros((1, 1, 1))}
  gradient = {'q_DNH': jnp.full((1, 1, 1), -0.8)}
  places = [run(optimizer, params, [gradient] * n)[0]['q_DNH'].item() for n in range(13)]
  want = [0.03 * (1 - iteration / 4) for iteration in range(4) for _ in range(3)]
  np.testing.assert_allclose(np.diff(places), want, rtol=1e-4)


def test_decay_is_chosen_by_name():
  """Every kind of name of the transformer; stacked norms and biases have two or more axes and still must not decay."""
  expected = {
    'policy': {
      'backbone': {
        'embedding_VD': False, 'position_TD': False, 'final_norm_D': False, 'final_norm_bias_D': False,
        'blocks': {
          'attention_norm_LD': False, 'attention_norm_bias_LD': False, 'q_norm_LH': False,
          'q_LDNH': True, 'k_LDKH': True, 'o_LNHD': True, 'q_bias_LNH': False, 'k_bias_LKH': False,
          'up_LDF': True, 'down_LFD': True, 'up_bias_LF': False},
        'block_0': {'q_DNH': True, 'q_bias_NH': False, 'attention_norm_D': False}},
      'unembed': {'unembed_DV': True}},
    'value': {'scalar': {'scalar_D': False, 'bias': False}}}
  assert decays(jax.tree.map(np.zeros_like, expected)) == expected


@pytest.mark.parametrize('change, message', [
  ({'learning_rate': -0.1}, r'^learning_rate of the optimizer is -0\.1\. It must be from 0\. '),
  ({'learning_rate': math.nan}, '^learning_rate of the optimizer is nan'),
  ({'schedule': 'cosin'}, "^schedule of the optimizer is 'cosin'. It must be 'constant', 'linear' or 'cosine'"),
  ({'warmup_steps': -3}, '^warmup_steps of the optimizer is -3. It must be 0 or more'),
  ({'warmup_steps': 40, 'total_steps': 40, 'schedule': 'cosine'},
   '^warmup_steps of the optimizer is 40. It must be less than total_steps=40. Shorten it'),
  ({'final_share': 10.0}, r'^final_share of the optimizer is 10\.0. It must be from 0 to 1. Pass 0.1'),
  ({'total_steps': -1}, '^total_steps of the optimizer is -1. It must be 0 or more'),
  ({'clip_norm': 0.0}, r'^clip_norm of the optimizer is 0\.0. It must be above 0. Pass None'),
  ({'beta1': 1.0}, '^beta1 of the optimizer is 1.0. It must be from 0 and below 1'),
  ({'beta2': -0.5}, '^beta2 of the optimizer is -0.5. It must be from 0 and below 1'),
  ({'epsilon': 0.0}, '^epsilon of the optimizer is 0.0. It must be above 0'),
  ({'weight_decay': -0.01}, '^weight_decay of the optimizer is -0.01. It must be from 0'),
  ({'form': 'adam'}, "^form of the optimizer is 'adam'. It must be 'adamw' or 'tensorflow'"),
  ({'moment_dtype': 'float16'}, "^moment_dtype of the optimizer is 'float16'. It must be 'float32' or 'bfloat16'"),
  ({'value_rate': 0.0}, '^value_rate of the optimizer is 0.0. It must be above 0'),
])
def test_settings_that_cannot_work_are_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    OptimizerConfig(**change)


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_a_decay_without_an_end_is_refused_when_it_is_used(schedule):
  config = OptimizerConfig(schedule=schedule, warmup_steps=10)
  for use in (make_optimizer, lambda c: learning_rate(c, 3)):
    with pytest.raises(ConfigError, match=f"total_steps of the optimizer is 0. The schedule '{schedule}' must know"):
      use(config)


def test_a_step_without_updates_is_refused():
  with pytest.raises(ConfigError, match=r'^updates_per_step is 0. A step of the schedule has at least one update'):
    make_optimizer(OptimizerConfig(), updates_per_step=0)
