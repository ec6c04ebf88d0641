"""The one Optax chain: clip -> Adam -> weight decay -> the critic's rate -> schedule.

What decays is read off a parameter's name, because layers are stacked, so the number of axes of an array no longer
tells a matrix from a norm. Optax's moments keep the parameters' names in their paths, so the partition rules of the
parameters shard them too. Absent on purpose: factored and other optimizers (`make_train_step` takes any Optax
transformation) and gradient accumulation (`step.py` has it, exactly). Next: `step.py`.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.axes import axes_of
from rlhf_jax.errors import ConfigError

_NEVER_DECAYS = ('embedding', 'position')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How gradients become updates. Steps of the schedule are whatever the stage calls a step: for PPO, an iteration."""
  learning_rate: float = 1e-3                                # highest rate of the schedule
  schedule: Literal['constant', 'linear', 'cosine'] = 'constant'  # what the rate does after the warm-up
  warmup_steps: int = 0                                      # steps over which the rate rises from 0, which step 0 has
  final_share: float = 0.0                                   # share of the highest rate that linear and cosine end at
  total_steps: int = 0  # step at which the decay ends; 0: the last of the stage
  clip_norm: float | None = 1.0                              # largest norm of the whole gradient; None: no clipping
  beta1: float = 0.9                                         # decay per update of the mean gradient
  beta2: float = 0.999                                       # decay per update of the mean squared gradient
  epsilon: float = 1e-8                                      # added to the root of the mean squared gradient
  weight_decay: float = 0.0                                  # decoupled decay of matrices, times the learning rate
  form: Literal['adamw', 'tensorflow'] = 'adamw'             # tensorflow: epsilon counts before bias correction
  moment_dtype: Literal['float32', 'bfloat16'] = 'float32'   # how the mean gradient is stored; the squared is float32
  value_rate: float = 1.0                                    # times the learning rate, for parameters under 'value'

  def __post_init__(self):
    decays_in = self.total_steps - self.warmup_steps
    for field, holds, needed, do in (
      ('learning_rate', 0 <= self.learning_rate < math.inf, 'from 0', 'Adam on pretrained models takes 1e-6 to 1e-4'),
      ('schedule', self.schedule in ('constant', 'linear', 'cosine'), "'constant', 'linear' or 'cosine'", 'Pick one'),
      ('warmup_steps', self.warmup_steps >= 0, '0 or more', 'Pass 0 for no warm-up'),
      ('final_share', 0 <= self.final_share <= 1, 'from 0 to 1', 'Pass 0.1 to end at a tenth of the learning rate'),
      ('total_steps', self.total_steps >= 0, '0 or more', 'Leave it at 0 for the stage to fill in'),
      ('warmup_steps', self.schedule == 'constant' or not self.total_steps or decays_in > 0,
       f'less than total_steps={self.total_steps}', "Shorten it, or use the schedule 'constant'"),
      ('clip_norm', self.clip_norm is None or 0 < self.clip_norm < math.inf, 'above 0', 'Pass None for no clipping'),
      ('beta1', 0 <= self.beta1 < 1, 'from 0 and below 1', 'The usual one is 0.9'),
      ('beta2', 0 <= self.beta2 < 1, 'from 0 and below 1', 'The usual one is 0.999'),
      ('epsilon', 0 < self.epsilon < math.inf, 'above 0', 'Without it a gradient of 0 divides by 0; pass 1e-8'),
      ('weight_decay', 0 <= self.weight_decay < math.inf, 'from 0', 'Pass 0 for no decay'),
      ('form', self.form in ('adamw', 'tensorflow'), "'adamw' or 'tensorflow'", 'Pick one'),
      ('moment_dtype', self.moment_dtype in ('float32', 'bfloat16'), "'float32' or 'bfloat16'", 'Pick one'),
      ('value_rate', 0 < self.value_rate < math.inf, 'above 0', 'Pass 1 for one rate for all parameters'),
    ):
      if not holds:
        raise ConfigError(f'{field} of the optimizer is {getattr(self, field)!r}. It must be {needed}. {do}.')


def make_optimizer(config, *, updates_per_step=1):
  """What turns a gradient and the parameters into an update, as an Optax transformation.

  Moments and their bias correction count every update. The schedule counts steps of `updates_per_step` updates each:
  PPO anneals per iteration, not per minibatch. The decay is decoupled (Loshchilov and Hutter 2019, 1711.05101): it is
  multiplied by the scheduled rate and, under 'value', by `value_rate`. Raises ConfigError where total_steps is missing.
  """
  if updates_per_step < 1:
    raise ConfigError(f'updates_per_step is {updates_per_step}. A step of the schedule has at least one update. '
                      'Pass the number of minibatches times the number of epochs.')
  schedule = _schedule(config)
  adam = _scale_by_tensorflow_adam if config.form == 'tensorflow' else optax.scale_by_adam
  return optax.chain(
    optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
    adam(config.beta1, config.beta2, config.epsilon, mu_dtype=jnp.dtype(config.moment_dtype)),
    optax.add_decayed_weights(config.weight_decay, mask=decays),
    optax.masked(optax.scale(config.value_rate), _is_value),
    optax.scale_by_learning_rate(lambda count: schedule(count // updates_per_step)))


def learning_rate(config, step):
  """The scheduled rate at a step (from 0; may be traced), float32, without `value_rate`.

  Warm-up: learning_rate * step / warmup_steps. Then, with x the share of the way from warmup_steps to total_steps, at
  most 1: linear 1 - x, cosine (1 + cos(pi x)) / 2, both stretched to end at final_share * learning_rate. As in
  `transformers`, step 0 of a warm-up has the rate 0.
  """
  return jnp.asarray(_schedule(config)(step), jnp.float32)


def decays(params):
  """True for each parameter that weight decay applies to: the matrices, by the letters of their names.

  L, the axis of stacked layers, does not count. Not norms, biases and scalar heads (one letter, or 'bias' in the name),
  nor embedding and position tables.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: _name_decays(_key(path[-1:])), params)


def _name_decays(name):
  is_matrix = len(axes_of(name).replace('L', '')) >= 2
  return is_matrix and 'bias' not in name and not name.startswith(_NEVER_DECAYS)


def _is_value(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: _key(path[:1]) == 'value', params)


def _key(path):
  return jax.tree_util.keystr(path, simple=True)


def _schedule(config):
  peak, share, decay_steps = config.learning_rate, config.final_share, config.total_steps - config.warmup_steps
  if config.schedule != 'constant' and not config.total_steps:
    raise ConfigError(f'total_steps of the optimizer is 0. The schedule {config.schedule!r} must know where it ends. '
                      "Pass the number of steps of the run, or use the schedule 'constant'.")
  if config.schedule == 'constant':
    after = optax.constant_schedule(peak)
  elif config.schedule == 'linear':
    after = optax.linear_schedule(peak, share * peak, decay_steps)
  else:
    after = optax.cosine_decay_schedule(peak, decay_steps, alpha=share)
  if not config.warmup_steps:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup_steps), after], [config.warmup_steps])


def _scale_by_tensorflow_adam(beta1, beta2, epsilon, *, mu_dtype):
  """sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + epsilon), TensorFlow 1's Adam, which the RLHF of 2019 used.

  Divided through by sqrt(1 - beta2^t) it is Optax's with a larger epsilon: m_hat / (sqrt(v_hat) + epsilon_hat) with
  epsilon_hat = epsilon / sqrt(1 - beta2^t). Kingma and Ba 2015 (1412.6980), section 2, just before 2.1.
  """
  def update(gradient, state, params=None):
    epsilon_hat = epsilon / jnp.sqrt(1 - beta2 ** (state.count + 1))
    return optax.scale_by_adam(beta1, beta2, epsilon_hat, mu_dtype=mu_dtype).update(gradient, state, params)
  return optax.GradientTransformation(optax.scale_by_adam(beta1, beta2, mu_dtype=mu_dtype).init, update)
