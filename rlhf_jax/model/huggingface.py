"""Weights from and to the Hugging Face format, by one table a family that is read in both directions.

A row is (ours, theirs, layout): the suffix of our name says our axes, the layout says theirs in the same letters.
'NH D' is a matrix of N x H rows and D columns, head by head; '3NH D' holds three of ours one after the other, 'N3H D'
interleaves them head by head. From a row follow shapes, reading and writing. Nothing here holds a whole model on the
host: a device's part of a parameter is read, sent and forgotten, and files are written one by one. Configs are
translated in `huggingface_config.py`. Tokenizers are not read or written here.
"""

import collections
import functools
import itertools
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
_FILES = ['config.json', 'generation_config.json', 'model.safetensors', 'model-*.safetensors',
          'model.safetensors.index.json']


class _Stored(NamedTuple):
  """Where a tensor is, and what its file says of it."""
  file: Path
  name: str  # in the file
  shape: tuple
  dtype: str


def read_config(path, **changes):
  """The ModelConfig of a local directory or a model of the Hub, with fields replaced. No weights are read or fetched.

  Raises ConfigError for a model that this package does not compute.
  """
  return config_from_huggingface(_json(_local(path, _FILES[:1]) / 'config.json'), **changes)


def read_generation_ids(path: str | Path) -> tuple[int, ...]:
  """Ids at which generation stops, of a local directory or a model of the Hub; () if it says none.

  They are the `eos_token_id` of generation_config.json, or that of config.json where the former is
  absent or does not say. Raises CheckpointError where it is neither an id nor a list of ids.
  """
  directory = _local(path, _FILES[:2])
  for file in (directory / 'generation_config.json', directory / 'config.json'):
    said = _json(file).get('eos_token_id') if file.name == 'config.json' or file.exists() else None
    if said is not None:
      return _token_ids(said, file)
  return ()


def find_weights(path, config, *, kind='language'):
  """{tensor name as the table has it: where it is stored} for a model of that config; reads no more than the headers.

  kind 'language' is a `...ForCausalLM`, 'scalar' a `...ForSequenceClassification` of one label. Raises CheckpointError
  that names the file or tensor which is missing, cut short, of another shape or dtype, or too much.
  """
  check_kind(kind)
  directory = _local(path, _FILES)
  stored = _stored(directory, config)
  if (kind == 'scalar') != ('score.weight' in stored):
    raise CheckpointError(f"{directory} holds a {'language' if kind == 'scalar' else 'reward or value'} model: it has "
                          f"{'no' if kind == 'scalar' else 'a'} score.weight. Load it with kind="
                          f"{'language' if kind == 'scalar' else 'scalar'!r}.")
  rows = _rows(config, kind) + _copies_of_the_embedding(config, kind, stored)
  shapes = {row.theirs.format(layer): _shape(row, config) for row in rows for layer in _layers(row, config)}
  for name, shape in shapes.items():
    _check(name, shape, stored, directory)
  extra = sorted(stored.keys() - shapes.keys())
  if extra:
    raise CheckpointError(f'{directory} has a tensor {stored[extra[0]].name}, of which a {config.family} with this '
                          f'config.json has no use ({len(extra)} such). Check that config.json belongs to these files.')
  return stored


def load(path, config, *, kind='language', shardings=None):
  """float32 parameters of a model, each born with its sharding in the tree `shardings`; None: all on one local device.

  `path` and `kind` are those of `find_weights`, whose errors this raises; `config` is that of `read_config`. A process
  reads what its own devices need, and the host holds one device's part of one parameter (its layers stacked) at a time.
  Of a fused tensor q, k and v are read on their own, except where heads interleave them ('N3H'): there each takes its
  heads' whole blocks, so that tensor is read three times. The bias of a scalar model is the key `score_bias` of
  config.json, 0 without it.
  """
  stored, needed = find_weights(path, config, kind=kind), _needed(config, kind)
  if shardings is None:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    at = dict.fromkeys((tree_path for tree_path, _ in needed.values()), here)
  else:
    at = flax.traverse_util.flatten_dict(shardings)
  for row in _copies_of_the_embedding(config, kind, stored):
    tree_path, shape = needed['embedding_VD']
    _check_copy(row, config, stored, _parts(shape, at[tree_path]))
  params = {}
  for row in _rows(config, kind):
    for fused, name in enumerate(row.ours.split()):
      tree_path, shape = needed[name]
      params[tree_path] = _born(shape, at[tree_path], functools.partial(_part, row, fused, config, stored))
  if kind == 'scalar':
    tree_path, shape = needed['bias']
    score_bias = _json(_local(path, _FILES) / 'config.json').get('score_bias') or 0
    params[tree_path] = _born(shape, at[tree_path], lambda _: np.float32(score_bias))
  return flax.traverse_util.unflatten_dict(params)


def save(directory, config, params, *, kind, begin_token=None, end_token=None, pad_token=None,
         dtype='float32', shard_bytes=2**30, fetch=jax.device_get):
  """Writes parameters where transformers and vLLM can load them: config.json and safetensors, more than one if large.

  Weights that a directory already holds are replaced. A language model gets a
  generation_config.json too, by which servers know where an answer ends. A reward model becomes a
  `...ForSequenceClassification` with one label, which has no bias: transformers computes the score
  less `score_bias`, a key of config.json that `load` reads. `begin_token`, `end_token` and
  `pad_token` are described in `config_to_huggingface`.

  Parameters may be sharded: `fetch` brings one layer of one of them to the host at a time. safetensors writes a file
  from memory, so the host holds that layer and one file, of `shard_bytes` or of one tensor that is larger. All processes
  call this, since a fetch may need them all; the first one writes.
  """
  config_json = config_to_huggingface(config, kind=kind, dtype=dtype, begin_token=begin_token,
                                      end_token=end_token, pad_token=pad_token)
  leaves = _checked_leaves(config, kind, params)
  if kind == 'scalar':
    config_json['score_bias'] = float(fetch(leaves['bias']))
  directory, item, writes = Path(directory), jax.numpy.dtype(dtype), jax.process_index() == 0
  if writes:
    _clear(directory)
  places = [(row, layer) for row in _rows(config, kind) for layer in _layers(row, config)]
  shards = _shards(places, [math.prod(_shape(row, config)) * item.itemsize for row, _ in places], shard_bytes)
  weight_map = {}
  for i, shard in enumerate(shards):
    file = 'model.safetensors' if len(shards) == 1 else f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    tensors = {row.theirs.format(layer): _to_theirs(row, layer, leaves, config, item, fetch) for row, layer in shard}
    if writes:
      safetensors.numpy.save_file(tensors, directory / file, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(tensors, file)
    del tensors  # before the next file is put together
  if writes and len(shards) > 1:
    size = sum(math.prod(_shape(row, config)) for row, _ in places) * item.itemsize
    _write_json(directory / 'model.safetensors.index.json', {'metadata': {'total_size': size}, 'weight_map': weight_map})
  if writes and kind == 'language':
    said = {key: config_json[key] for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    _write_json(directory / 'generation_config.json', said)
  if writes:
    _write_json(directory / 'config.json', config_json)


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


def _copies_of_the_embedding(config, kind, stored):
  """The row of the unembedding, as a list, where a tied model stores it too. It has to be the embedding."""
  table = _TABLES[config.family] if kind == 'language' and config.tied else ()
  return [row._replace(ours='embedding_VD') for row in table if row.ours == 'unembed_DV' and row.theirs in stored]


# ------------------------------------------------------------------------------------------------------------ reading

def _local(path, files):
  """A directory: the path itself, or where the Hub's files of these patterns are kept."""
  if Path(path).is_dir():
    return Path(path)
  try:
    return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=files))
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


def _token_ids(said, file):
  """The `eos_token_id` of that file, one id or a list of them, as a tuple."""
  ids = said if isinstance(said, list) else [said]
  if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
    raise CheckpointError(f'{file} has eos_token_id={json.dumps(said)}. It has to be the id of a '
                          'token, or a list of ids. Correct it, or copy the file again.')
  return tuple(ids)


def _open(file):
  try:
    return safetensors.safe_open(file, framework='numpy')
  except (OSError, safetensors.SafetensorError) as error:
    what = 'is damaged' if file.is_file() else 'is absent'
    raise CheckpointError(f'{file} {what} ({error}). Copy or download it again.') from error


def _stored(directory, config):
  """{tensor name as the table has it: where it is}, less buffers that are not parameters. Opens every file once."""
  index = directory / 'model.safetensors.index.json'
  if (directory / 'model.safetensors').is_file() or not index.is_file():
    names = ['model.safetensors']
  else:
    weight_map = _json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise CheckpointError(f"{index} has no 'weight_map' of tensors to files. Copy it again.")
    names = sorted(set(weight_map.values()))
  stored = {}
  for path in (directory / name for name in names):
    with _open(path) as file:
      for name in file.keys():  # noqa: SIM118, it is no dict
        if not _NOT_A_PARAMETER.search(name):
          about = file.get_slice(name)
          stored[_table_name(name, config)] = _Stored(path, name, tuple(about.get_shape()), about.get_dtype())
  return stored


def _table_name(name, config):
  """The name in the table of a tensor, which a file of the backbone alone stores without a prefix."""
  table = _TABLES[config.family]
  name = _OTHER_NAMES.get(config.family, {}).get(name, name)
  prefix, tops = table[0].theirs.split('.')[0] + '.', {row.theirs for row in table if '{}' not in row.theirs}
  return name if name in tops or name.startswith(prefix) else prefix + name


def _check(name, shape, stored, directory):
  """CheckpointError unless the tensor is there, in that shape and in a dtype that can be read."""
  if name not in stored:
    raise CheckpointError(f'{directory} has no tensor {name}, needed with shape {shape}. Check that config.json '
                          'belongs to these files and that none is missing.')
  found = stored[name]
  if found.shape != shape:
    raise CheckpointError(f'{directory}: tensor {found.name} has shape {found.shape}, but config.json asks for {shape}. '
                          'Check that they belong together.')
  if found.dtype not in _STORED_DTYPES:
    raise CheckpointError(f'{directory}: tensor {found.name} has dtype {found.dtype}. Supported are '
                          f'{", ".join(sorted(_STORED_DTYPES))}; convert it to one of them.')


def _check_copy(row, config, stored, parts):
  """CheckpointError unless the tensor of that row is the embedding, in the parts that this process reads."""
  embedding = next(other for other in _TABLES[config.family] if other.ours == 'embedding_VD')
  for ranges in parts:
    if not np.array_equal(*(_part(either, 0, config, stored, ranges) for either in (embedding, row))):
      raise CheckpointError(f'{stored[row.theirs].file.parent}: {row.theirs} differs from the embedding, but config.json '
                            'has tie_word_embeddings true. Load it with tied=False, or remove the one that is wrong.')


def _parts(shape, sharding):
  """{part: the local devices that hold it}; a part is one range of indices an axis."""
  parts = collections.defaultdict(list)
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    parts[tuple(range(size)[along] for size, along in zip(shape, index, strict=True))].append(device)
  return parts


def _born(shape, sharding, read):
  """The float32 array whose parts are read(ranges): each is read once, and is on its devices before the next is read."""
  arrays = []
  for ranges, devices in _parts(shape, sharding).items():
    part = read(ranges)
    arrays += [jax.device_put(part, device) for device in devices]
    jax.block_until_ready(arrays)
    del part  # before the next one is made
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=np.float32)


def _part(row, fused, config, stored, ranges):
  """The part `ranges` of the parameter that is at index `fused` of a row's, layer by layer."""
  part = np.empty([len(along) for along in ranges], np.float32)
  by_layer = '{}' in row.theirs
  for i, layer in enumerate(ranges[0]) if by_layer else [(..., None)]:
    part[i] = _layer_part(row, fused, config, stored[row.theirs.format(layer)], ranges[by_layer:])
  return part


def _layer_part(row, fused, config, tensor, ranges):
  """The same of one layer, in the dtype of the file."""
  wanted = dict(zip(_letters(row), (range(fused, fused + 1), *ranges), strict=True))
  reads, shapes, cuts = zip(*(_window(group, wanted, config) for group in _groups(row)))
  with _open(tensor.file) as file:  # for this read alone, or all that was ever read would stay mapped
    found = file.get_slice(tensor.name)[reads]
  found = found.reshape([*itertools.chain(*shapes)])[tuple(itertools.chain(*cuts))]
  axes = ''.join(_groups(row))
  return found.transpose([axes.index(letter) for letter in _letters(row)])[0]


def _window(group, wanted, config):
  """Of one axis of theirs: the slice to read, the axes of ours that it unfolds to, and the slices wanted of these.

  What is wanted of 'NH' is one run of theirs. Of 'N3H' it is many, so the run of whole blocks around it is read and cut:
  the blocks are of the first letter of which more than one is wanted.
  """
  sizes, ranges = [_size(letter, config) for letter in group], [wanted[letter] for letter in group]
  outer = next((i for i, along in enumerate(ranges) if len(along) > 1), len(group) - 1)
  block = math.prod(sizes[outer + 1:])
  start = block * int(np.ravel_multi_index([along.start for along in ranges[:outer + 1]], sizes[:outer + 1]))
  count = len(ranges[outer])
  cut = [slice(None)] * (outer + 1) + [slice(along.start, along.stop) for along in ranges[outer + 1:]]
  return slice(start, start + count * block), [1] * outer + [count] + sizes[outer + 1:], cut


# ------------------------------------------------------------------------------------------------------------ writing

def _checked_leaves(config, kind, params):
  """{leaf name: array}; raises CheckpointError where parameters are not those of the config."""
  needed, given = _needed(config, kind), flax.traverse_util.flatten_dict(params)
  shapes = dict(needed.values())
  for path in sorted(shapes.keys() | given.keys(), key=str):
    needs, has = shapes.get(path, 'none'), tuple(given[path].shape) if path in given else 'none'
    if needs != has:
      raise CheckpointError(f"parameter {'/'.join(map(str, path))} has shape {has}, but the config of this {kind} "
                            f'model asks for {needs}. Save parameters with the config that they were made with.')
  return {path[-1]: leaf for path, leaf in given.items()}


def _shards(places, sizes, shard_bytes):
  """The places cut into runs of at most shard_bytes, or of one tensor that is larger."""
  shards, used = [[]], 0
  for place, size in zip(places, sizes, strict=True):
    if shards[-1] and used + size > shard_bytes:
      shards, used = [*shards, []], 0
    shards[-1].append(place)
    used += size
  return shards


def _to_theirs(row, layer, leaves, config, dtype, fetch):
  """Ours as theirs. Contiguous: safetensors writes the memory of an array, whatever its strides."""
  axes = ''.join(_groups(row))
  theirs = np.empty([_size(letter, config) for letter in axes], dtype)
  ours = theirs.transpose([axes.index(letter) for letter in _letters(row)])
  for i, name in enumerate(row.ours.split()):  # the copy, since an array keeps on the host what was fetched of it
    ours[i] = fetch(leaves[name].copy() if layer is None else leaves[name][layer])
  return theirs.reshape(_shape(row, config))


def _clear(directory):
  """An existing directory, without the weights and generation_config.json of another model."""
  directory.mkdir(parents=True, exist_ok=True)
  for pattern in _FILES[1:]:
    for old in directory.glob(pattern):
      old.unlink()


def _write_json(file, content):
  file.write_text(json.dumps(content, indent=2) + '\n')
