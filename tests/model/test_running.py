"""What 'auto' and None become on a device, with sizes worked out by hand, and what is refused."""

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest
from families import FAMILIES

from rlhf_jax.errors import ConfigError
from rlhf_jax.model import device, forward, running
from rlhf_jax.model.config import ModelConfig, preset
from rlhf_jax.model.device import Device, describe
from rlhf_jax.model.heads import LanguageModel, initial_params

CPU, TPU = Device('cpu'), Device('tpu', 16 * 10**9)
H100, A100 = Device('gpu', 80 * 10**9, 9.0), Device('gpu', 40 * 10**9, 8.0)
T4, AMD = Device('gpu', 15 * 10**9, 7.5), Device('gpu', 60 * 10**9, None)


def on(place, dtype='bfloat16', **changes):
  """Three blocks of width 24, with 6 query heads of 8 numbers and 2 key/value heads, 44 inside."""
  return dataclasses.replace(FAMILIES['llama'], dtype=dtype, device=place, **changes)


# ---- the device


def there(platform, stats=None, **more):
  """What a device of JAX's tells, of a platform that is not here."""
  return types.SimpleNamespace(platform=platform, memory_stats=lambda: stats, **more)


def test_a_device_is_described():
  assert describe(jax.devices()[0]) == device.first_device() == CPU
  stats = {'bytes_limit': 79 * 2**30}  # rounded down to 76, so that all hosts find the same
  assert describe(there('cuda', stats, compute_capability='9.0')) == Device('gpu', 76 * 2**30, 9.0)
  assert describe(there('gpu', stats, compute_capability='8.6'), 23 * 2**30 + 5) == Device(
    'gpu', 20 * 2**30, 8.6
  )
  assert describe(there('rocm', stats, compute_capability='gfx942')) == Device('gpu', 76 * 2**30)
  assert describe(there('tpu')) == Device('tpu')


def test_a_device_that_is_not_here_tells_no_memory():
  def absent():
    raise jax.errors.JaxRuntimeError('not addressable')

  there = types.SimpleNamespace(platform='tpu', memory_stats=absent)
  assert describe(there) == Device('tpu')
  assert describe(there, 8 * 2**30) == Device('tpu', 8 * 2**30)
  assert describe(there, 5) == Device('tpu', 4 * 2**30)  # what is rounded to nothing is not


def test_memory_is_asked_of_a_device_of_this_process(monkeypatch):
  def absent():
    raise jax.errors.JaxRuntimeError('only supported for addressable devices')

  ours = there('gpu', {'bytes_limit': 12 * 2**30}, process_index=jax.process_index())
  monkeypatch.setattr(device.jax, 'local_devices', lambda: [ours])
  theirs = types.SimpleNamespace(
    platform='gpu', memory_stats=absent, process_index=jax.process_index() + 1
  )
  assert describe(theirs) == Device('gpu', 12 * 2**30)


def test_all_but_the_cpu_are_accelerators():
  assert [place.is_accelerator for place in (CPU, TPU, H100)] == [False, True, True]


def test_a_model_is_for_the_first_device_unless_it_says_for_which():
  assert running.device_of(on(None)) == CPU
  assert running.device_of(on(H100)) == H100


# ---- layers


@pytest.mark.parametrize(
  'place, layers, asked, scans',
  [
    (CPU, 8, None, False),
    (CPU, 17, None, True),
    (CPU, 9, False, False),
    (CPU, 1, True, True),
    (H100, 1, None, True),
    (TPU, 1, None, True),
    (H100, 9, False, False),
  ],
)
def test_layers_are_scanned_on_accelerators_and_where_there_are_many(place, layers, asked, scans):
  assert running.scans_layers(on(place, layers=layers, scan_layers=asked)) is scans


# ---- attention


@pytest.mark.parametrize(
  'place, dtype, head_width, kernel',
  [
    (CPU, 'bfloat16', 64, 'xla'),
    (TPU, 'bfloat16', 64, 'splash'),
    (TPU, 'float32', 60, 'splash'),
    (H100, 'bfloat16', 64, 'cudnn'),
    (A100, 'bfloat16', 64, 'cudnn'),
    (H100, 'bfloat16', 128, 'cudnn'),
    (H100, 'float32', 64, 'xla_loop'),
    (H100, 'bfloat16', 60, 'xla_loop'),
    (H100, 'bfloat16', 136, 'xla_loop'),
    (T4, 'bfloat16', 64, 'xla_loop'),
    (AMD, 'bfloat16', 64, 'xla_loop'),
  ],
)
def test_the_automatic_kernel(place, dtype, head_width, kernel):
  config = on(place, dtype, head_width=head_width)
  assert running.attention_kernel(config) == kernel
  running.check_attention(config)
  dense = kernel == 'cudnn'
  assert running.takes_dense_rows(config) is dense
  assert running.reads_written_cache(config) is dense


def test_xla_by_name_is_one_piece_in_a_loop_on_an_accelerator():
  kernels = [running.attention_kernel(on(place, attention='xla')) for place in (CPU, H100, TPU)]
  assert kernels == ['xla', 'xla_loop', 'xla_loop']
  for place in (CPU, H100, TPU):
    running.check_attention(on(place, attention='xla'))


def test_on_a_cpu_kernels_have_stand_ins_and_are_refused_to_runs():
  assert running.attention_kernel(on(CPU, attention='cudnn')) == 'cudnn_by_xla'
  assert running.takes_dense_rows(on(CPU, attention='cudnn'))
  assert running.attention_kernel(on(CPU, attention='splash')) == 'splash'
  assert not running.takes_dense_rows(on(CPU, attention='splash'))


def test_heads_that_the_decoding_kernel_cannot_load_have_a_cache_that_grows():
  config = on(H100, head_width=24)
  assert running.takes_dense_rows(config) and not running.reads_written_cache(config)


TAKES = 'Choose another: --attention auto would take {}.'


@pytest.mark.parametrize(
  'asked, place, changes, says',
  [
    ('cudnn', CPU, {}, 'it is for GPUs, and the device here is a CPU. ' + TAKES.format('xla')),
    ('splash', CPU, {}, 'it is for TPUs, and the device here is a CPU. ' + TAKES.format('xla')),
    ('splash', H100, {}, 'it is for TPUs, and the device here is a GPU. ' + TAKES.format('cudnn')),
    ('cudnn', TPU, {}, 'it is for GPUs, and the device here is a TPU. ' + TAKES.format('splash')),
    ('cudnn', AMD, {}, 'it is for NVIDIA GPUs. ' + TAKES.format('xla')),
    (
      'cudnn',
      T4,
      {},
      'it is for GPUs of compute capability 8.0 (Ampere) and later, and this one has 7.5. '
      + TAKES.format('xla'),
    ),
    (
      'cudnn',
      A100,
      {'head_width': 256},
      'it takes heads of at most 128 numbers, a multiple of 8, and the model has head_width=256. '
      + TAKES.format('xla'),
    ),
    (
      'cudnn',
      H100,
      {'head_width': 256},
      'head_width=256 (on the device itself, where JAX sees that it can, up to 256). Choose',
    ),
    ('cudnn', H100, {'head_width': 264}, 'head_width=264. ' + TAKES.format('xla')),
    ('cudnn', H100, {'head_width': 60}, 'head_width=60. ' + TAKES.format('xla')),
  ],
)
def test_a_kernel_that_a_device_has_not_is_refused(asked, place, changes, says):
  with pytest.raises(ConfigError, match=f'^--attention {asked}: .*{re.escape(says)}'):
    running.check_attention(on(place, attention=asked, **changes))
  if place != CPU:
    with pytest.raises(ConfigError, match=f'^--attention {asked}: '):
      running.attention_kernel(on(place, attention=asked, **changes))


def test_wide_heads_are_taken_where_jax_sees_a_hopper(monkeypatch):
  monkeypatch.setattr(running, 'first_device', lambda: H100)
  assert running.attention_kernel(on(H100, head_width=256)) == 'cudnn'
  assert 'at most 256 numbers' in running.refusal(on(H100, head_width=264), 'cudnn')
  monkeypatch.setattr(running, 'first_device', lambda: A100)
  assert 'at most 128 numbers' in running.refusal(on(A100, head_width=256), 'cudnn')


def test_a_kernel_of_bfloat16_is_refused_to_other_models():
  assert running.refusal(on(H100, 'float32'), 'cudnn') == (
    "it computes in dtype 'bfloat16', and the model in 'float32'"
  )
  with pytest.raises(ConfigError, match=r"dtype='float32'\. The kernel needs dtype 'bfloat16'"):
    on(H100, 'float32', attention='cudnn')


@pytest.mark.parametrize(
  'config, line',
  [
    (on(CPU), 'attention by XLA; 3 layers unrolled'),
    (on(CPU, layers=17), 'attention by XLA; 17 layers scanned'),
    (on(H100), 'attention by cuDNN; 3 layers scanned'),
    (on(TPU, scan_layers=False), 'attention by splash; 3 layers unrolled'),
    (
      on(H100, 'float32'),
      "attention by XLA, queries in a loop (not cudnn: it computes in dtype 'bfloat16', and the "
      "model in 'float32'); 3 layers scanned",
    ),
    (
      on(H100, attention='xla'),
      'attention by XLA, queries in a loop (not cudnn: another was asked for); 3 layers scanned',
    ),
  ],
)
def test_what_was_chosen_is_said_with_its_reason(config, line):
  assert running.chosen(config) == line


# ---- memory


def test_blocks_keep_their_products_where_these_fit_in_a_fifth():
  """A token: 3 blocks of 2 * 6 + 2 * 2 heads of 8, twice 44, and twice 24, each of 2 bytes."""
  a_token = 3 * (16 * 8 + 2 * 44 + 2 * 24) * 2
  assert a_token == 1584
  small = on(Device('gpu', 10**6, 9.0))
  assert 10**6 / 5 / a_token == pytest.approx(126.3, abs=0.1)
  assert [running.remat_policy(small, tokens) for tokens in (1, 126, 127, 10**6)] == [
    'dots',
    'dots',
    'block',
    'block',
  ]
  wide = on(Device('gpu', 10**6, 9.0), 'float32')  # twice as much
  assert [running.remat_policy(wide, tokens) for tokens in (63, 64)] == ['dots', 'block']
  ungated = dataclasses.replace(small, gated=False)  # 44 numbers less
  assert [running.remat_policy(ungated, tokens) for tokens in (151, 152)] == ['dots', 'block']


def test_what_is_said_of_rematerialisation_is_done():
  for policy in ('none', 'dots', 'block'):
    assert running.remat_policy(on(Device('gpu', 1, 9.0), remat=policy), 10**6) == policy
  assert running.remat_policy(on(CPU), 10**12) == 'none'


@pytest.mark.parametrize('family', ['llama', 'gpt_neox'])
def test_what_dots_keeps_is_what_the_choice_counts(family):
  """Read off the backward pass: what the forward pass hands to it of every layer and token."""
  config = dataclasses.replace(FAMILIES[family], dtype='bfloat16', remat='dots', scan_layers=True)
  model, shape = LanguageModel(config), (5, 32)
  params = jax.eval_shape(functools.partial(initial_params, model), jax.random.key(0))
  tokens_BT, valid_BT = (
    jax.ShapeDtypeStruct(shape, jnp.int32),
    jax.ShapeDtypeStruct(shape, jnp.bool_),
  )
  pull = jax.eval_shape(
    lambda p, *batch: jax.vjp(lambda p: forward.hidden(model, p, *batch), p)[1],
    params,
    tokens_BT,
    valid_BT,
  )
  kept = sum(
    math.prod(x.shape) * x.dtype.itemsize
    for x in jax.tree.leaves(pull)
    if x.shape[:1] == (config.layers,) and (5 in x.shape[1:] or 5 * 32 in x.shape[1:])
  )
  assert kept == pytest.approx(running._kept_bytes(config, 5 * 32), rel=0.02)


def test_the_memory_of_an_accelerator_that_does_not_tell():
  """An eighth of 16 GiB, in logits of 4 * 128,256 bytes."""
  config = preset('llama3.2-1b', device=Device('gpu', None, 9.0), dtype='bfloat16')
  assert pytest.approx(4185.9, abs=0.1) == 2**34 / 8 / (4 * 128256)
  assert [running.keeps_logits(config, tokens) for tokens in (4185, 4186)] == [True, False]


def test_logits_stay_where_they_take_an_eighth():
  config = on(Device('gpu', 10**6, 9.0))  # 4 * 61 bytes a token
  assert [running.keeps_logits(config, tokens) for tokens in (512, 513)] == [True, False]
  assert not running.keeps_logits(on(CPU), 1)
  assert not running.keeps_logits(dataclasses.replace(config, tokens_per_chunk=8), 1)


def test_chunks_take_a_64th_and_1024_tokens_at_least():
  config = preset('llama3.2-1b', device=H100, dtype='bfloat16')
  assert pytest.approx(2436.5, abs=0.1) == 80e9 / 64 / (4 * 128256)
  assert running.tokens_per_chunk(config) == 2436
  assert running.tokens_per_chunk(on(Device('gpu', 10**6, 9.0))) == 1024
  assert running.tokens_per_chunk(on(CPU)) == 1024
  assert running.tokens_per_chunk(dataclasses.replace(config, tokens_per_chunk=7)) == 7


def test_no_chunk_is_refused():
  with pytest.raises(ConfigError, match='model tokens_per_chunk=0'):
    ModelConfig(tokens_per_chunk=0)
