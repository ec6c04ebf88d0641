"""Any source of data to a list of `Example`: files, folders, tensorflow-datasets, the Hugging Face hub.

Where rows come from (`load_examples(path, split=...)`):

    data.jsonl  data.jsonl.gz  data.json  data.parquet     one file (a .json file holds a list of objects, or lines)
    folder/                                                SPLIT.jsonl, .jsonl.gz, .json, .parquet,
                                                           or shards of it; or what `datasets`
                                                           saved with save_to_disk
    tfds:NAME   tfds:/folder/of/a/prepared/dataset         read as a data source, without TensorFlow
    id  id:config  hub:id                                  a data set on the Hugging Face hub

A file of a folder belongs to a split if its name is the split's, alone or with the number of a
shard (train-00000-of-00002, train_0, train.1, train0), and not if it only begins so: train_sft and
training are other splits.
What a row may look like, and what becomes of it: rows.py.

Deliberately absent: templates and tokens (text.py), batches and their order (batches.py), rewards.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping

from rlhf_jax.data.examples import Example
from rlhf_jax.data.rows import ADVICE, SHAPES, shown, to_example
from rlhf_jax.errors import ConfigError, DataError

FILES = ('.jsonl', '.jsonl.gz', '.json', '.parquet')
OTHER_FILES = ('.gz', '.csv', '.tsv', '.txt', '.arrow', '.zip', '.zst')          # a path that ends so is no hub id
SOURCES = ('Needed is a .jsonl, .jsonl.gz, .json or .parquet file, a folder with files named by split or made by '
           'save_to_disk, tfds:NAME, tfds:/prepared/folder, or the id of a data set on the Hugging Face hub.')
# What follows a split's name where a file is one of several: 0, -1, _2, .3, -00000-of-00002[-hash].
SHARD = re.compile(r'[-_.]?(\d+)([-_.]of[-_.]\d+([-_.][0-9a-f]+)?)?')
OTHER_SPLIT = 'Name another with --data.split, or with --data.held-out-split for what is held out.'


# ---- all rows of a source

def load_examples(path: str | pathlib.Path, *, split: str = 'train', skip_bad_rows: bool = False,
                  limit: int | None = None,
                  read_row: Callable | None = None) -> tuple[list[Example], list[str]]:
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


def splits(path: str) -> list[str]:
  """Names of the splits of a source; none where it is one file, or one saved set without a name."""
  path = str(path)
  if path.startswith('tfds:'):
    return _tfds_splits(path)
  if path.startswith('hub:'):
    return _hub_splits(path.removeprefix('hub:'))
  local = _local(path)
  if local is None:
    return _hub_splits(path)
  if not local.is_dir():
    return []
  if not _saved_by_datasets(local):
    return _folder_splits(local)
  saved = _load_from_disk(local)
  if isinstance(saved, dict):
    return list(saved)
  return [str(saved.split)] if saved.split else []


def held_out_split(path: str, split: str, named: str | None = None) -> str | None:
  """The split to hold out beside `split`: the one `named`, else the test split that goes with it.

  That is the split whose name has 'test' for 'train' (train and test, train_sft and test_sft). None
  where the source has no such split: then a share of the prompts is held out.
  """
  if named is not None:
    if _local(path) is not None and not splits(path):  # elsewhere, reading it will tell
      raise DataError(f'{path} has no splits by name, so {named!r} cannot be held out of it. Name '
                      'a folder, or a set, that has both, or leave out --data.held-out-split.')
    return named
  known, base = splits(path), split.partition('[')[0]           # train[:10%] is a part of train
  counterpart = base.replace('train', 'test')
  return counterpart if counterpart != base and counterpart in known else None


def _rows(path, split):
  """Pairs of a place and a row, which is a dict, or the undecoded line of a file."""
  if path.startswith('tfds:'):
    return _from_tfds(path, split)
  if path.startswith('hub:'):
    return _from_hub(path.removeprefix('hub:'), split)
  local = _local(path)
  if local is None:
    return _from_hub(path, split)
  if local.is_dir():
    return _from_folder(local, split)
  if split != 'train' and _shard(local, split) is None:
    raise DataError(f'{path} is one file, and split {split!r} was asked of it. Name the file of '
                    'that split.')
  return _from_file(local)


def _local(path):
  """The file or folder of that path; None for the id of a set on the hub."""
  local = pathlib.Path(path).expanduser()
  if local.exists():
    return local
  if _looks_local(path) or path.endswith(FILES + OTHER_FILES):
    raise DataError(f'{path} does not exist, seen from {pathlib.Path.cwd()}. {SOURCES}')
  return None


def _looks_local(path):
  return path.startswith(('./', '../', '/', '~')) or path.count('/') > 1


def _from_folder(folder, split):
  if _saved_by_datasets(folder):
    return _from_disk(folder, split)
  files = [path for path in folder.iterdir() if _kind(path)]
  numbered = [(_shard(path, split), path) for path in files if _shard(path, split) is not None]
  paths = [path for _, path in sorted(numbered)]
  kinds = [suffix for suffix in FILES if suffix in map(_kind, paths)]
  if not kinds:
    here = ', '.join(sorted(path.name for path in folder.iterdir())[:20]) or 'nothing'
    known = ', '.join(_folder_splits(folder)) or 'none'
    raise DataError(f'{folder} has no file for split {split!r}; it holds {here}. Its splits are: '
                    f'{known}. {OTHER_SPLIT} Needed is {split} with one of {", ".join(FILES)}, or '
                    f'a folder from save_to_disk; one made by tensorflow-datasets is '
                    f'tfds:{folder}.')
  if len(kinds) > 1:
    raise DataError(f'{folder} has split {split!r} as {" and as ".join(kinds)}, so rows may come twice. '
                    'Keep one kind, or name the file.')
  return (pair for path in paths for pair in _from_file(path))


def _kind(path):
  """Which of the endings of FILES the name has, or None."""
  return next((suffix for suffix in FILES if path.name.endswith(suffix)), None)


def _shard(path, split):
  """A file's number among those of a split, -1 where it has none; None if of another split."""
  stem = path.name.removesuffix(_kind(path) or '')
  if stem == split:
    return -1
  shard = SHARD.fullmatch(stem.removeprefix(split)) if stem.startswith(split) else None
  return int(shard.group(1)) if shard else None


def _folder_splits(folder):
  stems = {path.name.removesuffix(_kind(path)) for path in folder.iterdir() if _kind(path)}
  return sorted({re.fullmatch(rf'(.+?)({SHARD.pattern})?', stem).group(1) for stem in stems})


def _saved_by_datasets(folder):
  return (folder / 'dataset_dict.json').exists() or (folder / 'state.json').exists()


def _from_disk(folder, split):
  saved = _load_from_disk(folder)
  by_split = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
  if split not in by_split:
    raise DataError(f'{folder} has no split {split!r}. Use one that it has: {", ".join(by_split)}. '
                    f'{OTHER_SPLIT}')
  return ((f'{folder} {split} row {number}', row) for number, row in enumerate(by_split[split], 1))


def _load_from_disk(folder):
  import datasets
  try:
    return datasets.load_from_disk(str(folder))
  except (OSError, ValueError, KeyError, TypeError) as error:                     # what damaged files raise in there
    raise DataError(f'{folder} cannot be read as a folder from save_to_disk: {_brief(error)}. '
                    'Save it again.') from error


def _from_hub(name, split):
  import datasets
  identity, _, config = name.partition(':')
  tried = f'datasets.load_dataset({identity!r}, {config or None!r}, split={split!r})'
  with _hub_errors(name, tried):
    rows = datasets.load_dataset(identity, config or None, split=split)
  return ((f'{name} {split} row {number}', row) for number, row in enumerate(rows, 1))


def _hub_splits(name):
  import datasets
  identity, _, config = name.partition(':')
  with _hub_errors(name, f'datasets.get_dataset_split_names({identity!r}, {config or None!r})'):
    return datasets.get_dataset_split_names(identity, config or None)


@contextlib.contextmanager
def _hub_errors(name, tried):
  import datasets
  try:
    yield
  except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
    other = f' {OTHER_SPLIT}' if 'split' in str(error) else ''
    raise DataError(f'{name} is no local path, and {tried} failed: {_brief(error)}.{other} '
                    f'{SOURCES} Without a network, fetch it elsewhere and save_to_disk it to a '
                    'folder here.') from error


def _from_tfds(path, split):
  name, folder = _tfds_name(path)
  import tensorflow_datasets as tfds
  with _tfds_errors(path, split):
    rows = (tfds.builder_from_directory(str(folder)).as_data_source(split) if folder.is_dir() else
            tfds.data_source(name, split=split))
  return ((f'{path} {split} row {number}', _plain(row)) for number, row in enumerate(rows, 1))


def _tfds_splits(path):
  name, folder = _tfds_name(path)
  import tensorflow_datasets as tfds
  with _tfds_errors(path, 'its splits'):
    builder = tfds.builder_from_directory(str(folder)) if folder.is_dir() else tfds.builder(name)
    return list(builder.info.splits)


def _tfds_name(path):
  """What follows tfds:, and the same as a folder, which exists where it looks like one."""
  name = path.removeprefix('tfds:')
  folder = pathlib.Path(name).expanduser()
  if _looks_local(name) and not folder.exists():
    raise DataError(f'{path}: the folder does not exist, seen from {pathlib.Path.cwd()}. Needed is the prepared folder '
                    'of one version, with dataset_info.json in it, or tfds:NAME.')
  return name, folder


@contextlib.contextmanager
def _tfds_errors(path, split):
  try:
    yield
  except (OSError, ValueError, RuntimeError, ImportError) as error:
    other = f' {OTHER_SPLIT}' if 'split' in str(error) else ''
    raise DataError(f'{path} ({split}) cannot be read by tensorflow-datasets: '
                    f'{_brief(error)}.{other} Needed is a set of its catalogue or a folder that it '
                    'prepared, with '
                    "file_format='array_record'.") from error


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
    raise DataError(f'{place}: {shown(row.decode())} is invalid JSON, {error}. Needed is one '
                    f'object a line, or a list of objects in a .json file. {ADVICE}') from error


# ---- what a stage takes of the examples

def as_demonstrations(examples: list[Example], part: str = '') -> list[Example]:
  """Each prompt with its best response alone, the first of those that tie.

  A chat that the user ends has what the assistant said last for a response, to what came before;
  what follows is cut. Examples without any response are left out. `part` says in the DataError, if
  none is left, what these examples are.
  """
  demonstrations = [_demonstration(example) for example in examples]
  kept = [example for example in demonstrations if example is not None]
  return _some(kept, examples, 'a response', part)


def _demonstration(example):
  if example.responses:
    best = example.responses[example.ranks.index(min(example.ranks))]
    return dataclasses.replace(example, responses=(best,), ranks=(0,))
  said = [index for index, turn in enumerate(example.prompt) if turn.role == 'assistant']
  if not said:
    return None
  prompt, response = example.prompt[:said[-1]], example.prompt[said[-1]].text
  if not prompt or prompt[-1].role != 'user':                                   # it answers nobody
    return None
  return dataclasses.replace(example, prompt=prompt, responses=(response,), ranks=(0,))


def as_comparisons(examples: list[Example], part: str = '') -> list[Example]:
  """The examples with two or more responses; `part` as above."""
  ranked = [example for example in examples if len(example.responses) > 1]
  return _some(ranked, examples, 'two or more ranked responses', part)


def as_prompts(examples: list[Example]) -> list[Example]:
  """Each prompt once, where it first stands, without its responses."""
  first = {}
  for example in examples:
    first.setdefault(example.prompt, dataclasses.replace(example, responses=(), ranks=()))
  return list(first.values())


def held_out(examples: list[Example], share: float,
             seed: int) -> tuple[list[Example], list[Example]]:
  """(train, held out): the first turn of the user and the seed alone decide, whatever is added.

  So no prompt is on both sides, nor a conversation on one and its continuation on the other. About
  `share` of the first turns are held out: each with that probability, by a hash.
  """
  if not 0 <= share < 1:
    raise ConfigError(f'held-out share is {share}. Needed is a share of the prompts, from 0 to less than 1.')
  sides = [], []
  for example in examples:
    sides[_uniform(seed, _first_said(example)) < share].append(example)
  return sides


def _first_said(example):
  first = next((turn for turn in example.prompt if turn.role == 'user'), example.prompt[0])
  return first.text.strip()


def _some(kept, examples, needed, part):
  if examples and not kept:
    where = f'{part} is empty: ' if part else ''
    raise DataError(f'{where}none of the {len(examples)} examples has {needed}; the first is '
                    f'{examples[0].place}. Needed is a layout that has: {SHAPES}.')
  return kept


def _uniform(seed, text):
  """In [0, 1), the same in every process."""
  said = json.dumps([seed, [('user', text)]])
  return int.from_bytes(hashlib.sha256(said.encode()).digest()[:6], 'big') / 2**48
