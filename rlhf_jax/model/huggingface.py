"""Weights from and to the Hugging Face format, by one table a family that is read in both directions.

A row is (ours, theirs, layout): the suffix of our name says our axes, the layout says theirs in the same letters.
'NH D' is a matrix of N x H rows and D columns, head by head; '3NH D' holds three of ours one after the other, 'N3H D'
interleaves them head by head. From a row follow shapes, reading and writing. Configs are translated in
`huggingface_config.py`. Tokenizers are not read or written here.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import huggingface_hub
import jax
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax.axes import axes_of
from rlhf_jax.errors import CheckpointError, ConfigError
from rlhf_jax.model.heads import LanguageModel, ScalarModel, initial_params
from rlhf_jax.model.huggingface_config import check_kind, config_from_huggingface, config_to_huggingface


class _Row(NamedTuple):
  ours: str  # leaf names of our parameters, more than one where theirs is fused
  theirs: str  # tensor name, {} is the layer
  layout: str  # axes of theirs: a word an axis, letters of ours in order; a digit counts ours


_LLAMA = (
  _Row('embedding_VD', 'model.embed_tokens.weight', 'V D'),
  _Row('attention_norm_LD', 'model.layers.{}.input_layernorm.weight', 'D'),
  _Row('q_LDNH', 'model.layers.{}.self_attn.q_proj.weight', 'NH D'),
  _Row('k_LDKH', 'model.layers.{}.self_attn.k_proj.weight', 'KH D'),
  _Row('v_LDKH', 'model.layers.{}.self_attn.v_proj.weight', 'KH D'),
  _Row('q_bias_LNH', 'model.layers.{}.self_attn.q_proj.bias', 'NH'),
  _Row('k_bias_LKH', 'model.layers.{}.self_attn.k_proj.bias', 'KH'),
  _Row('v_bias_LKH', 'model.layers.{}.self_attn.v_proj.bias', 'KH'),
  _Row('q_norm_LH', 'model.layers.{}.self_attn.q_norm.weight', 'H'),
  _Row('k_norm_LH', 'model.layers.{}.self_attn.k_norm.weight', 'H'),
  _Row('o_LNHD', 'model.layers.{}.self_attn.o_proj.weight', 'D NH'),
  _Row('o_bias_LD', 'model.layers.{}.self_attn.o_proj.bias', 'D'),
  _Row('feedforward_norm_LD', 'model.layers.{}.post_attention_layernorm.weight', 'D'),
  _Row('gate_LDF', 'model.layers.{}.mlp.gate_proj.weight', 'F D'),
  _Row('gate_bias_LF', 'model.layers.{}.mlp.gate_proj.bias', 'F'),
  _Row('up_LDF', 'model.layers.{}.mlp.up_proj.weight', 'F D'),
  _Row('up_bias_LF', 'model.layers.{}.mlp.up_proj.bias', 'F'),
  _Row('down_LFD', 'model.layers.{}.mlp.down_proj.weight', 'D F'),
  _Row('down_bias_LD', 'model.layers.{}.mlp.down_proj.bias', 'D'),
  _Row('final_norm_D', 'model.norm.weight', 'D'),
  _Row('unembed_DV', 'lm_head.weight', 'V D'),
  _Row('scalar_D', 'score.weight', '1 D'),
)

_GPT2 = (  # its matrices are stored with the input first
  _Row('embedding_VD', 'transformer.wte.weight', 'V D'),
  _Row('position_TD', 'transformer.wpe.weight', 'T D'),
  _Row('attention_norm_LD', 'transformer.h.{}.ln_1.weight', 'D'),
  _Row('attention_norm_bias_LD', 'transformer.h.{}.ln_1.bias', 'D'),
  _Row('q_LDNH k_LDKH v_LDKH', 'transformer.h.{}.attn.c_attn.weight', 'D 3NH'),
  _Row('q_bias_LNH k_bias_LKH v_bias_LKH', 'transformer.h.{}.attn.c_attn.bias', '3NH'),
  _Row('o_LNHD', 'transformer.h.{}.attn.c_proj.weight', 'NH D'),
  _Row('o_bias_LD', 'transformer.h.{}.attn.c_proj.bias', 'D'),
  _Row('feedforward_norm_LD', 'transformer.h.{}.ln_2.weight', 'D'),
  _Row('feedforward_norm_bias_LD', 'transformer.h.{}.ln_2.bias', 'D'),
  _Row('up_LDF', 'transformer.h.{}.mlp.c_fc.weight', 'D F'),
  _Row('up_bias_LF', 'transformer.h.{}.mlp.c_fc.bias', 'F'),
  _Row('down_LFD', 'transformer.h.{}.mlp.c_proj.weight', 'F D'),
  _Row('down_bias_LD', 'transformer.h.{}.mlp.c_proj.bias', 'D'),
  _Row('final_norm_D', 'transformer.ln_f.weight', 'D'),
  _Row('final_norm_bias_D', 'transformer.ln_f.bias', 'D'),
  _Row('unembed_DV', 'lm_head.weight', 'V D'),
  _Row('scalar_D', 'score.weight', '1 D'),
)

_GPT_NEOX = (
  _Row('embedding_VD', 'gpt_neox.embed_in.weight', 'V D'),
  _Row('attention_norm_LD', 'gpt_neox.layers.{}.input_layernorm.weight', 'D'),
  _Row('attention_norm_bias_LD', 'gpt_neox.layers.{}.input_layernorm.bias', 'D'),
  _Row('q_LDNH k_LDKH v_LDKH', 'gpt_neox.layers.{}.attention.query_key_value.weight', 'N3H D'),
  _Row('q_bias_LNH k_bias_LKH v_bias_LKH', 'gpt_neox.layers.{}.attention.query_key_value.bias', 'N3H'),
  _Row('o_LNHD', 'gpt_neox.layers.{}.attention.dense.weight', 'D NH'),
  _Row('o_bias_LD', 'gpt_neox.layers.{}.attention.dense.bias', 'D'),
  _Row('feedforward_norm_LD', 'gpt_neox.layers.{}.post_attention_layernorm.weight', 'D'),
  _Row('feedforward_norm_bias_LD', 'gpt_neox.layers.{}.post_attention_layernorm.bias', 'D'),
  _Row('up_LDF', 'gpt_neox.layers.{}.mlp.dense_h_to_4h.weight', 'F D'),
  _Row('up_bias_LF', 'gpt_neox.layers.{}.mlp.dense_h_to_4h.bias', 'F'),
  _Row('down_LFD', 'gpt_neox.layers.{}.mlp.dense_4h_to_h.weight', 'D F'),
  _Row('down_bias_LD', 'gpt_neox.layers.{}.mlp.dense_4h_to_h.bias', 'D'),
  _Row('final_norm_D', 'gpt_neox.final_layer_norm.weight', 'D'),
  _Row('final_norm_bias_D', 'gpt_neox.final_layer_norm.bias', 'D'),
  _Row('unembed_DV', 'embed_out.weight', 'V D'),
  _Row('scalar_D', 'score.weight', '1 D'),
)

_TABLES = {'gpt2': _GPT2, 'gpt_neox': _GPT_NEOX} | dict.fromkeys(('llama', 'mistral', 'qwen2', 'qwen3'), _LLAMA)
_OTHER_NAMES = {'gpt_neox': {'lm_head.weight': 'embed_out.weight'}}  # transformers 5 renamed it
_NOT_A_PARAMETER = re.compile(r'(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$')
_STORED_DTYPES = {'F64', 'F32', 'F16', 'BF16'}
_FILES = ['config.json', 'model.safetensors', 'model-*.safetensors', 'model.safetensors.index.json']


def load(path, *, kind='language', **config_changes):
  """(ModelConfig, float32 NumPy parameters) of a local directory or a model of the Hub; fields of the config replaced.

  kind 'language' reads a `...ForCausalLM`, 'scalar' a `...ForSequenceClassification` of one label, whose bias is the
  key `score_bias` of config.json, 0 without it. Raises CheckpointError that names the file or tensor which is missing,
  damaged, of another shape or too much, and ConfigError for a model that this package does not compute.
  """
  check_kind(kind)
  directory = _local(path)
  config_json = _json(directory / 'config.json')
  config = config_from_huggingface(config_json, **config_changes)
  stored = _stored(directory, config)
  if (kind == 'scalar') != ('score.weight' in stored):
    raise CheckpointError(f"{directory} holds a {'language' if kind == 'scalar' else 'reward or value'} model: it has "
                          f"{'no' if kind == 'scalar' else 'a'} score.weight. Load it with kind="
                          f"{'language' if kind == 'scalar' else 'scalar'!r}.")
  return config, _read(config, kind, stored, directory, float(config_json.get('score_bias') or 0))


def save(directory, config, params, *, kind, end_token=None, pad_token=None, dtype='float32', shard_bytes=5 * 2**30):
  """Writes parameters where transformers and vLLM can load them: config.json and safetensors, more than one if large.

  Weights that a directory already holds are replaced. A reward model becomes a `...ForSequenceClassification` with one
  label, which has no bias: transformers computes the score less `score_bias`, a key of config.json that `load` reads.
  `end_token` and `pad_token` are described in `config_to_huggingface`.
  """
  config_json = config_to_huggingface(config, kind=kind, dtype=dtype, end_token=end_token, pad_token=pad_token)
  arrays = _checked_leaves(config, kind, params)
  if kind == 'scalar':
    config_json['score_bias'] = float(arrays['bias'])
  directory, item = Path(directory), jax.numpy.dtype(dtype)
  directory.mkdir(parents=True, exist_ok=True)
  for pattern in _FILES[1:]:
    for old in directory.glob(pattern):
      old.unlink()
  places = [(row, layer) for row in _rows(config, kind) for layer in _layers(row, config)]
  shards = _shards(places, [math.prod(_shape(row, config)) * item.itemsize for row, _ in places], shard_bytes)
  weight_map = {}
  for i, shard in enumerate(shards):
    file = 'model.safetensors' if len(shards) == 1 else f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    tensors = {row.theirs.format(layer): _to_theirs(row, layer, arrays, config, item) for row, layer in shard}
    safetensors.numpy.save_file(tensors, directory / file, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(tensors, file)
  if len(shards) > 1:
    size = sum(math.prod(_shape(row, config)) for row, _ in places) * item.itemsize
    index = {'metadata': {'total_size': size}, 'weight_map': weight_map}
    (directory / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')
  (directory / 'config.json').write_text(json.dumps(config_json, indent=2) + '\n')


# ---------------------------------------------------------------------------------------------------------- the table

@functools.cache
def _needed(config, kind):
  """{leaf name: (path, shape)} of every parameter of a model. Leaf names are unique. Do not change it."""
  model = LanguageModel(config) if kind == 'language' else ScalarModel(config)
  shapes = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
  return {path[-1]: (path, leaf.shape) for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}


def _rows(config, kind):
  """The rows of the family's table that this model uses."""
  needed = set(_needed(config, kind)) - {'bias'}  # of the scalar head: in config.json
  rows = [row for row in _TABLES[config.family] if needed.issuperset(row.ours.split())]
  homeless = needed - {name for row in rows for name in row.ours.split()}
  if homeless:
    raise ConfigError(f'the Hugging Face format of {config.family} has no tensor for {sorted(homeless)[0]}. Use '
                      'another family, or change the field of the config that asks for it.')
  return rows


def _layers(row, config):
  return range(config.layers) if '{}' in row.theirs else (None,)


def _groups(row):
  """Axes of theirs, one word each, with the count of ours in it: 'NH D' is ['1NH', 'D']."""
  return (row.layout if re.search(r'\d', row.layout) else f'1{row.layout}').split()


def _letters(row):
  """Axes of ours in one layer, stacked: 'q_LDNH k_LDKH v_LDKH' is '3DNH'."""
  names = row.ours.split()
  return str(len(names)) + axes_of(names[0]).replace('L', '')


def _size(letter, config):
  return int(letter) if letter.isdigit() else config.size(letter)


def _shape(row, config):
  """The shape of theirs."""
  return tuple(math.prod(_size(letter, config) for letter in group) for group in _groups(row))


def _to_ours(row, tensor, config):
  """Theirs as ours, stacked along the first axis."""
  axes = ''.join(_groups(row))
  return tensor.reshape([_size(letter, config) for letter in axes]).transpose([axes.index(x) for x in _letters(row)])


def _to_theirs(row, layer, arrays, config, dtype):
  """Ours as theirs. Contiguous: safetensors writes the memory of an array, whatever its strides."""
  stacked = np.stack([arrays[name] if layer is None else arrays[name][layer] for name in row.ours.split()])
  merged = stacked.transpose([_letters(row).index(x) for x in ''.join(_groups(row))]).reshape(_shape(row, config))
  return np.ascontiguousarray(merged.astype(dtype))


# ------------------------------------------------------------------------------------------------------------ reading

def _local(path):
  """A directory: the path itself, or where the Hub's files of that name are kept."""
  if Path(path).is_dir():
    return Path(path)
  try:
    return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=_FILES))
  except (OSError, huggingface_hub.errors.HFValidationError) as error:
    raise CheckpointError(f'{path} is not a directory, and the Hugging Face Hub gives no model of that name '
                          f'({type(error).__name__}). Pass a directory with config.json and safetensors, or a name '
                          "such as 'Qwen/Qwen3-0.6B' while the Hub can be reached.") from error


def _json(file):
  try:
    found = json.loads(file.read_text())
  except (OSError, ValueError) as error:
    raise CheckpointError(f'{file} cannot be read as JSON ({error}). A Hugging Face model needs it; copy it '
                          'again.') from error
  if not isinstance(found, dict):
    raise CheckpointError(f'{file} is not a JSON object. Copy it again.')
  return found


def _open(file):
  try:
    return safetensors.safe_open(file, framework='numpy')
  except (OSError, safetensors.SafetensorError) as error:
    what = 'is damaged' if file.is_file() else 'is absent'
    raise CheckpointError(f'{file} {what} ({error}). Copy or download it again.') from error


def _stored(directory, config):
  """{tensor name as the table has it: (open file, name in the file)}, less buffers that are not parameters."""
  index = directory / 'model.safetensors.index.json'
  if (directory / 'model.safetensors').is_file() or not index.is_file():
    names = ['model.safetensors']
  else:
    weight_map = _json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise CheckpointError(f"{index} has no 'weight_map' of tensors to files. Copy it again.")
    names = sorted(set(weight_map.values()))
  stored = {}
  for file in (_open(directory / name) for name in names):
    for name in file.keys():  # noqa: SIM118, it is no dict
      if not _NOT_A_PARAMETER.search(name):
        stored[_table_name(name, config)] = (file, name)
  return stored


def _table_name(name, config):
  """The name in the table of a tensor, which a file of the backbone alone stores without a prefix."""
  table = _TABLES[config.family]
  name = _OTHER_NAMES.get(config.family, {}).get(name, name)
  prefix, tops = table[0].theirs.split('.')[0] + '.', {row.theirs for row in table if '{}' not in row.theirs}
  return name if name in tops or name.startswith(prefix) else prefix + name


def _read(config, kind, stored, directory, score_bias):
  """Parameters from tensors, one tensor in memory at a time besides the result."""
  needed = _needed(config, kind)
  arrays = {name: np.empty(shape, np.float32) for name, (_, shape) in needed.items()}
  left = dict(stored)
  for row in _rows(config, kind):
    for layer in _layers(row, config):
      tensor = _take(row.theirs.format(layer), _shape(row, config), left, directory)
      for name, ours in zip(row.ours.split(), _to_ours(row, tensor, config), strict=True):
        arrays[name][... if layer is None else layer] = ours
  if kind == 'scalar':
    arrays['bias'][...] = score_bias
  elif config.tied:
    _drop_tied(left, arrays['embedding_VD'], config, directory)
  if left:
    _, name = left[min(left)]
    raise CheckpointError(f'{directory} has a tensor {name}, of which a {config.family} with this config.json has no '
                          f'use ({len(left)} such). Check that config.json belongs to these files.')
  return flax.traverse_util.unflatten_dict({path: arrays[name] for name, (path, _) in needed.items()})


def _take(name, shape, left, directory):
  if name not in left:
    raise CheckpointError(f'{directory} has no tensor {name}, needed with shape {shape}. Check that config.json '
                          'belongs to these files and that none is missing.')
  file, stored_name = left.pop(name)
  about = file.get_slice(stored_name)
  if tuple(about.get_shape()) != shape:
    raise CheckpointError(f'{directory}: tensor {stored_name} has shape {tuple(about.get_shape())}, but config.json '
                          f'asks for {shape}. Check that they belong together.')
  if about.get_dtype() not in _STORED_DTYPES:
    raise CheckpointError(f'{directory}: tensor {stored_name} has dtype {about.get_dtype()}. Supported are '
                          f'{", ".join(sorted(_STORED_DTYPES))}; convert it to one of them.')
  return file.get_tensor(stored_name).astype(np.float32)


def _drop_tied(left, embedding_VD, config, directory):
  """A tied model may store its unembedding too, if it is the embedding."""
  name = next(row.theirs for row in _TABLES[config.family] if row.ours == 'unembed_DV')
  if name in left and not np.array_equal(_take(name, embedding_VD.shape, left, directory), embedding_VD):
    raise CheckpointError(f'{directory}: {name} differs from the embedding, but config.json has tie_word_embeddings '
                          'true. Load it with tied=False, or remove the one that is wrong.')


# ------------------------------------------------------------------------------------------------------------ writing

def _checked_leaves(config, kind, params):
  """{leaf name: array} on the host; raises CheckpointError where parameters are not those of the config."""
  needed, given = _needed(config, kind), flax.traverse_util.flatten_dict(params)
  shapes = dict(needed.values())
  for path in sorted(shapes.keys() | given.keys(), key=str):
    needs, has = shapes.get(path, 'none'), tuple(given[path].shape) if path in given else 'none'
    if needs != has:
      raise CheckpointError(f"parameter {'/'.join(map(str, path))} has shape {has}, but the config of this {kind} "
                            f'model asks for {needs}. Save parameters with the config that they were made with.')
  return {path[-1]: np.asarray(leaf) for path, leaf in given.items()}


def _shards(places, sizes, shard_bytes):
  """The places cut into runs of at most shard_bytes, or of one tensor that is larger."""
  shards, used = [[]], 0
  for place, size in zip(places, sizes, strict=True):
    if shards[-1] and used + size > shard_bytes:
      shards, used = [*shards, []], 0
    shards[-1].append(place)
    used += size
  return shards
