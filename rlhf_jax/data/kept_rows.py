"""Encoded rows kept on disk: who starts again reads them in seconds, where tokenizing took minutes.

A file is named by all that its rows depend on: examples, tokenizer, template, limits. Rows hold
numpy arrays, views of one array for all, since lists of Python numbers take ten times the memory.
"""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.data import encode
from rlhf_jax.data.chat import Chat
from rlhf_jax.data.encode import Counts, Encoded, RankedRows, Row
from rlhf_jax.data.examples import Example, fingerprint

_FORMAT = 1  # of the file, and of what encode.py makes of the same settings


def rows_key(read: Callable, examples: Sequence[Example], chat: Chat, limits: encode.Limits,
             skip_bad_rows: bool) -> str:
  """A digest of all that the rows depend on, `read` being one of the functions of encode.py."""
  settings = [_FORMAT, read.__name__, fingerprint(examples), chat.identity,
              dataclasses.asdict(limits), skip_bad_rows]
  return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def write_rows(path: pathlib.Path, encoded: Encoded) -> None:
  """The rows as one file, written whole."""
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_suffix('.unfinished')
  counts = np.array(json.dumps(dataclasses.asdict(encoded.counts)))
  arrays = _to_arrays(encoded.rows) | {'counts': counts}
  with unfinished.open('wb') as file:
    np.savez(file, **arrays, digest=_digest(arrays))
  unfinished.rename(path)


def read_rows(path: pathlib.Path) -> Encoded | None:
  """What `write_rows` wrote there; None where there is nothing, or nothing that can be read."""
  try:
    with np.load(path) as file:
      arrays = {name: file[name] for name in file.files}
    digest = str(arrays.pop('digest'))
    if digest != _digest(arrays):
      return None
    return Encoded(_from_arrays(arrays), Counts(**json.loads(str(arrays['counts']))))
  except (OSError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, EOFError):
    return None


def _digest(arrays):
  """Of names, shapes and numbers; a zip file with a damaged header hides its own checksums."""
  digest = hashlib.sha256()
  for name in sorted(arrays):
    digest.update(f'{name} {arrays[name].dtype.str} {arrays[name].shape}'.encode())
    digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _to_arrays(rows):
  ranked = isinstance(rows[0], RankedRows)
  single = [row for each in rows for row in each.rows] if ranked else rows
  ids = np.concatenate([np.asarray(row.ids, np.int64) for row in single])
  arrays = {'ids': ids.astype(np.min_scalar_type(ids.max())),
            'lengths': np.array([len(row.ids) for row in single]),
            'mask': np.concatenate([np.asarray(row.mask, bool) for row in single]),
            'example': np.array([row.example for row in single])}
  if ranked:
    arrays |= {'candidates': np.array([len(each.rows) for each in rows]),
               'ranks': np.array([rank for each in rows for rank in each.ranks])}
  return arrays


def _from_arrays(arrays):
  ends = np.cumsum(arrays['lengths'])[:-1]
  single = [Row(ids, mask, int(example)) for ids, mask, example in zip(
    np.split(arrays['ids'], ends), np.split(arrays['mask'], ends), arrays['example'], strict=True)]
  if 'candidates' not in arrays:
    return single
  ends = np.cumsum(arrays['candidates'])
  ranks = arrays['ranks'].tolist()
  return [RankedRows(single[last - count:last], ranks[last - count:last], single[last - 1].example)
          for count, last in zip(arrays['candidates'].tolist(), ends.tolist())]
