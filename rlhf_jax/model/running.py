"""How a model is run on a device: what the settings 'auto' and None become, and why.

Nothing here changes what is computed, up to rounding. On a CPU, which compiles for as long as it
computes, shallow models are unrolled and nothing is computed twice. On an accelerator one block is
compiled for all layers, attention is one kernel, and what the backward pass needs is kept as far
as the memory goes. Read next: `transformer.py`, `kernels.py`.
"""

from rlhf_jax.errors import ConfigError
from rlhf_jax.model import decode_kernel
from rlhf_jax.model.config import ModelConfig
from rlhf_jax.model.device import Device, first_device

_DEEP = 16  # more layers than this are scanned on a CPU too
_CPU_CHUNK = 1024  # tokens unembedded at once on a CPU
# Shares of an accelerator's memory. Parameters, moments and gradients want the most of the rest.
_ACTIVATIONS = 1 / 5  # that the products of all blocks may take until the backward pass
_LOGITS = 1 / 8  # that the logits of a batch may take until the backward pass
_CHUNK = 1 / 64  # that the logits of a chunk may take, where those of the batch are too many
_UNKNOWN_MEMORY = 16 * 2**30  # taken for the memory of an accelerator that does not tell


def device_of(config: ModelConfig) -> Device:
  """The device that a model is compiled for."""
  return first_device() if config.device is None else config.device


def scans_layers(config: ModelConfig) -> bool:
  """Whether one compiled block serves all layers."""
  if config.scan_layers is None:
    return device_of(config).is_accelerator or config.layers > _DEEP
  return config.scan_layers


def attention_kernel(config: ModelConfig) -> str:
  """The key of `attention.attend`: a fused kernel, 'xla', or 'xla_loop', where XLA has one piece of
  attention in a loop.

  On a CPU the fused kernels have stand-ins, slow and for tests. Raises ConfigError where an
  accelerator cannot run the kernel that the config names.
  """
  if config.attention == 'auto':
    return _automatic(config)
  if config.attention == 'xla':
    return _plain(config)
  if not device_of(config).is_accelerator:
    return {'cudnn': 'cudnn_by_xla'}.get(config.attention, config.attention)
  check_attention(config)
  return config.attention


def check_attention(config: ModelConfig) -> None:
  """ConfigError where the model's device cannot run the kernel that the config names."""
  refused = config.attention in _KERNELS and refusal(config, config.attention)
  if refused:
    named = {'xla_loop': 'xla'}.get(_automatic(config), _automatic(config))
    raise ConfigError(f'--attention {config.attention}: {refused}. Choose another: --attention auto '
                      f'would take {named}.')


def reads_written_cache(config: ModelConfig) -> bool:
  """Whether decoding reads no more of a cache than is written, so that it need not grow."""
  return takes_dense_rows(config) and decode_kernel.allows(config.head_width)


def takes_dense_rows(config: ModelConfig) -> bool:
  """Whether the kernel is told of padding by lengths, which rows must begin at slot 0 for."""
  return attention_kernel(config) in ('cudnn', 'cudnn_by_xla')


def _automatic(config):
  allowed = [kernel for kernel in _KERNELS if not refusal(config, kernel)]
  return allowed[0] if allowed else _plain(config)


def _plain(config):
  return 'xla_loop' if device_of(config).is_accelerator else 'xla'


def refusal(config: ModelConfig, kernel: str) -> str | None:
  """Why a fused kernel cannot be had for a model on its device; None where it can."""
  device = device_of(config)
  if device.platform != _KERNELS[kernel]:
    return f'it is for {_KERNELS[kernel].upper()}s, and the device here is a {device.platform.upper()}'
  if kernel == 'cudnn':
    return _cudnn_refusal(config, device)
  return None


def _cudnn_refusal(config, device):
  if config.dtype != 'bfloat16':
    return f"it computes in dtype 'bfloat16', and the model in {config.dtype!r}"
  if device.compute_capability is None:
    return 'it is for NVIDIA GPUs'
  if device.compute_capability < 8:
    return ('it is for GPUs of compute capability 8.0 (Ampere) and later, and this one has '
            f'{device.compute_capability}')
  widest = 256 if _is_hopper_here() else 128
  if config.head_width % 8 or config.head_width > widest:
    return (f'it takes heads of at most {widest} numbers, a multiple of 8, and the model has '
            f'head_width={config.head_width}' + _absent(config, device))
  return None


def _is_hopper_here():
  """JAX allows wide heads where it sees a GPU of that generation, not where it compiles for one."""
  return (first_device().compute_capability or 0) >= 9


def _absent(config, device):
  can = device.compute_capability >= 9 and config.head_width % 8 == 0 and config.head_width <= 256
  return ' (on the device itself, where JAX sees that it can, up to 256)' if can else ''


_KERNELS = {'cudnn': 'gpu', 'splash': 'tpu'}  # fused kernels, and what they are for


def remat_policy(config: ModelConfig, tokens: int) -> str:
  """'none', 'dots' or 'block', for so many tokens on a device.

  Blocks keep the products of weights where all of these fit, and else nothing but their input.
  """
  if config.remat != 'auto':
    return config.remat
  device = device_of(config)
  if not device.is_accelerator:
    return 'none'
  fits = _kept_bytes(config, tokens) <= _ACTIVATIONS * _memory(device)
  return 'dots' if fits else 'block'


def _kept_bytes(config, tokens):
  """Bytes that 'dots' keeps: of each token and block what products give, and the stream."""
  heads = (2 * config.query_heads + 2 * config.kv_heads) * config.head_width
  inner = (2 if config.gated else 1) * config.feedforward_width
  stream = (1 if config.parallel_residual else 2) * config.width  # before and after attention
  a_number = 2 if config.dtype == 'bfloat16' else 4
  return tokens * config.layers * (heads + inner + stream) * a_number


def _memory(device):
  return device.memory_bytes or _UNKNOWN_MEMORY


def keeps_logits(config: ModelConfig, tokens: int) -> bool:
  """Whether the logits of so many tokens on a device stay until the backward pass."""
  device = device_of(config)
  if config.tokens_per_chunk is not None or not device.is_accelerator:
    return False
  return _logit_bytes(config, tokens) <= _LOGITS * _memory(device)


def tokens_per_chunk(config: ModelConfig) -> int:
  """How many tokens a device unembeds at once, where the logits of a batch do not stay."""
  if config.tokens_per_chunk is not None:
    return config.tokens_per_chunk
  device = device_of(config)
  if not device.is_accelerator:
    return _CPU_CHUNK
  return max(_CPU_CHUNK, int(_CHUNK * _memory(device) / _logit_bytes(config, 1)))


def _logit_bytes(config, tokens):
  return 4 * tokens * config.vocab_size


def chosen(config: ModelConfig) -> str:
  """One line: how the model is run, and why not by a fused kernel."""
  kernel, device = attention_kernel(config), device_of(config)
  said = {'xla_loop': 'XLA, queries in a loop', 'xla': 'XLA', 'cudnn': 'cuDNN', 'splash': 'splash'}
  line = f'attention by {said.get(kernel, kernel)}'
  fused = next((name for name, platform in _KERNELS.items() if platform == device.platform), None)
  if fused not in (None, kernel):
    line += f' (not {fused}: {refusal(config, fused) or "another was asked for"})'
  layers = 'scanned' if scans_layers(config) else 'unrolled'
  return f'{line}; {config.layers} layers {layers}'
