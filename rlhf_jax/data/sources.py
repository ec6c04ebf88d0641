"""Any source of data to a list of `Example`: files, folders, tensorflow-datasets, the Hugging Face hub.

Where rows come from (`load_examples(path, split=...)`):

    data.jsonl  data.jsonl.gz  data.json  data.parquet     one file (a .json file holds a list of objects, or lines)
    folder/                                                train*.jsonl, train*.jsonl.gz, train*.json or train*.parquet,
                                                           or what `datasets` saved with save_to_disk
    tfds:NAME   tfds:/folder/of/a/prepared/dataset         read as a data source, without TensorFlow
    id  id:config  hub:id                                  a data set on the Hugging Face hub

What a row may look like, and what becomes of it: rows.py.

Deliberately absent: templates and tokens (text.py), batches and their order (batches.py), rewards.
"""

import dataclasses
import gzip
import hashlib
import json
import pathlib
import zlib
from collections.abc import Mapping

from rlhf_jax.data.rows import ADVICE, SHAPES, shown, to_example
from rlhf_jax.errors import ConfigError, DataError

FILES = ('.jsonl', '.jsonl.gz', '.json', '.parquet')
OTHER_FILES = ('.gz', '.csv', '.tsv', '.txt', '.arrow', '.zip', '.zst')          # a path that ends so is no hub id
SOURCES = ('Needed is a .jsonl, .jsonl.gz, .json or .parquet file, a folder with files named by split or made by '
           'save_to_disk, tfds:NAME, tfds:/prepared/folder, or the id of a data set on the Hugging Face hub.')


# ---- all rows of a source

def load_examples(path, *, split='train', skip_bad_rows=False, limit=None, read_row=None):
  """(examples, messages of the rows that were skipped): the first `limit` good rows, or all.

  A bad row raises DataError, unless `skip_bad_rows`; a damaged file, or one without any good row, always does.
  `read_row(row, place)` reads a layout of one's own, in place of `to_example`.
  """
  if limit is not None and limit < 1:
    raise ConfigError(f'limit is {limit}. Needed is 1 or more; leave it out to read every row.')
  examples, skipped = [], []
  read_row = read_row or to_example
  for place, row in _rows(str(path), split):
    try:
      examples.append(read_row(_parsed(row, place), place))
    except DataError as error:
      if not skip_bad_rows:
        raise
      skipped.append(str(error))
    if len(examples) == limit:
      break
  if not examples:
    what = f'each of its {len(skipped)} rows is bad, first: {skipped[0]}' if skipped else 'it has no rows.'
    raise DataError(f'{path} ({split}): {what} Check that the path and the split are the ones you mean.')
  return examples, skipped


def _rows(path, split):
  """Pairs of a place and a row, which is a dict, or the undecoded line of a file."""
  if path.startswith('tfds:'):
    return _from_tfds(path, split)
  if path.startswith('hub:'):
    return _from_hub(path.removeprefix('hub:'), split)
  local = pathlib.Path(path).expanduser()
  if local.is_dir():
    return _from_folder(local, split)
  if local.exists():
    if split != 'train' and not local.name.startswith(split):
      raise DataError(f'{path} is one file, and split {split!r} was asked of it. Name the file of that split.')
    return _from_file(local)
  if _looks_local(path) or path.endswith(FILES + OTHER_FILES):
    raise DataError(f'{path} does not exist, seen from {pathlib.Path.cwd()}. {SOURCES}')
  return _from_hub(path, split)


def _looks_local(path):
  return path.startswith(('./', '../', '/', '~')) or path.count('/') > 1


def _from_folder(folder, split):
  if (folder / 'dataset_dict.json').exists() or (folder / 'state.json').exists():
    return _from_disk(folder, split)
  found = {suffix: sorted(folder.glob(f'{split}*{suffix}')) for suffix in FILES}
  kinds = [suffix for suffix in FILES if found[suffix]]
  if not kinds:
    here = ', '.join(sorted(path.name for path in folder.iterdir())[:20]) or 'nothing'
    raise DataError(f'{folder} has no file for split {split!r}; it holds {here}. Needed is {split}* with one of '
                    f'{", ".join(FILES)}, or a folder from save_to_disk; one made by tensorflow-datasets is '
                    f'tfds:{folder}.')
  if len(kinds) > 1:
    raise DataError(f'{folder} has split {split!r} as {" and as ".join(kinds)}, so rows may come twice. '
                    'Keep one kind, or name the file.')
  return (pair for path in found[kinds[0]] for pair in _from_file(path))


def _from_disk(folder, split):
  import datasets
  try:
    saved = datasets.load_from_disk(str(folder))
  except (OSError, ValueError, KeyError, TypeError) as error:                     # what damaged files raise in there
    raise DataError(f'{folder} cannot be read as a folder from save_to_disk: {_brief(error)}. '
                    'Save it again.') from error
  by_split = saved if isinstance(saved, dict) else {str(saved.split or 'train'): saved}
  if split not in by_split:
    raise DataError(f'{folder} has no split {split!r}. Use one that it has: {", ".join(by_split)}.')
  return ((f'{folder} {split} row {number}', row) for number, row in enumerate(by_split[split], 1))


def _from_hub(name, split):
  import datasets
  identity, _, config = name.partition(':')
  try:
    rows = datasets.load_dataset(identity, config or None, split=split)
  except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
    tried = f'datasets.load_dataset({identity!r}, {config or None!r}, split={split!r})'
    raise DataError(f'{name} is no local path, and {tried} failed: {_brief(error)}. {SOURCES} Without a network, '
                    'fetch it elsewhere and save_to_disk it to a folder here.') from error
  return ((f'{name} {split} row {number}', row) for number, row in enumerate(rows, 1))


def _from_tfds(path, split):
  import tensorflow_datasets as tfds
  name = path.removeprefix('tfds:')
  folder = pathlib.Path(name).expanduser()
  if _looks_local(name) and not folder.exists():
    raise DataError(f'{path}: the folder does not exist, seen from {pathlib.Path.cwd()}. Needed is the prepared folder '
                    'of one version, with dataset_info.json in it, or tfds:NAME.')
  try:
    rows = (tfds.builder_from_directory(str(folder)).as_data_source(split) if folder.is_dir() else
            tfds.data_source(name, split=split))
  except (OSError, ValueError, RuntimeError, ImportError) as error:
    raise DataError(f'{path} ({split}) cannot be read by tensorflow-datasets: {_brief(error)}. Needed is a set of its '
                    "catalogue or a folder that it prepared, with file_format='array_record'.") from error
  return ((f'{path} {split} row {number}', _plain(row)) for number, row in enumerate(rows, 1))


def _plain(value):
  """Numpy's and bytes' values as Python's own, as deep as they go. Bytes that are not UTF-8 stay, and are bad rows."""
  if isinstance(value, Mapping):
    return {name: _plain(inner) for name, inner in value.items()}
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      return value
  if hasattr(value, 'tolist'):                                                    # a numpy array or scalar
    return _plain(value.tolist())
  return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _brief(error):
  """Its kind and first line; tensorflow-datasets adds its whole catalogue."""
  return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}'.rstrip('.')


# ---- files

def _from_file(path):
  if path.name.endswith('.parquet'):
    return _parquet_rows(path)
  if path.name.endswith(('.json', '.json.gz')):
    return _json_rows(path)
  if path.name.endswith(('.jsonl', '.jsonl.gz')):
    return _json_lines(path)
  raise DataError(f'{path} is a file of unknown kind. {SOURCES}')


def _json_lines(path):
  """Lines that are not blank, counted as an editor counts them; only a newline ends one (U+2028 is text)."""
  number = 0
  try:
    with path.open('rb') as raw:
      file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b'\x1f\x8b' else raw    # the name may say otherwise
      for number, line in enumerate(file, 1):
        if line.strip():
          yield f'{path} row {number}', line
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise DataError(f'{path} is gzip, damaged or cut off after row {number}: {_brief(error)}. '
                    'Fetch or compress it again.') from error


def _json_rows(path):
  lines = list(_json_lines(path))
  if not lines or not lines[0][1].removeprefix(b'\xef\xbb\xbf').lstrip().startswith(b'['):
    return lines                                                                  # lines in all but name
  rows = _parsed(b''.join(line for _, line in lines), f'{path} as a list of rows')
  return [(f'{path} row {number}', row) for number, row in enumerate(rows, 1)]


def _parquet_rows(path):
  """A few rows at a time. Not through `datasets`, which would write a copy of the file into its cache first."""
  import pyarrow.parquet
  number = 0
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
          number += 1
          yield f'{path} row {number}', row
  except (OSError, ValueError) as error:                                          # pyarrow's own errors are both
    raise DataError(f'{path} is not parquet, or damaged after row {number}: {_brief(error)}. '
                    'Fetch or write it again.') from error


def _parsed(row, place):
  if not isinstance(row, bytes):
    return row
  try:
    return json.loads(row.decode('utf-8-sig'))
  except UnicodeDecodeError as error:
    raise DataError(f'{place}: byte {row[error.start]:#04x} is not UTF-8. Save the file as UTF-8. {ADVICE}') from error
  except (ValueError, RecursionError) as error:
    raise DataError(f'{place}: {shown(row.decode())} is invalid JSON, {error}. Needed is one object a line, or a '
                    f'list of objects in a .json file. {ADVICE}') from error


# ---- what a stage takes of the examples

def as_demonstrations(examples):
  """Each prompt with its best response alone, the first of those that tie; prompts without a response are dropped."""
  return _some([_best(example) for example in examples if example.responses], examples, 'a response')


def _best(example):
  best = example.responses[example.ranks.index(min(example.ranks))]
  return dataclasses.replace(example, responses=(best,), ranks=(0,))


def as_comparisons(examples):
  """The examples with two or more responses."""
  ranked = [example for example in examples if len(example.responses) > 1]
  return _some(ranked, examples, 'two or more ranked responses')


def as_prompts(examples):
  """Each prompt once, where it first stands, without its responses."""
  first = {}
  for example in examples:
    first.setdefault(example.prompt, dataclasses.replace(example, responses=(), ranks=()))
  return list(first.values())


def held_out(examples, share, seed):
  """(train, held out): the prompt's text and the seed alone decide, so no prompt is on both sides, whatever is added.

  About `share` of the prompts are held out: each with that probability, by a hash.
  """
  if not 0 <= share < 1:
    raise ConfigError(f'held-out share is {share}. Needed is a share of the prompts, from 0 to less than 1.')
  sides = [], []
  for example in examples:
    sides[_uniform(seed, example.prompt) < share].append(example)
  return sides


def _some(kept, examples, needed):
  if examples and not kept:
    raise DataError(f'none of the {len(examples)} examples has {needed}; the first is {examples[0].place}. '
                    f'Needed is a layout that has: {SHAPES}.')
  return kept


def _uniform(seed, prompt):
  """In [0, 1), the same in every process."""
  text = json.dumps([seed, [(turn.role, turn.text) for turn in prompt]])
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], 'big') / 2**48
