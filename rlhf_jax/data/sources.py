"""Any source of data to a list of `Example`: files, folders, tensorflow-datasets, the Hugging Face hub.

Where rows come from (`load_examples(path, split=...)`):

    data.jsonl  data.jsonl.gz  data.json  data.parquet     one file (a .json file holds a list of objects, or lines)
    folder/                                                train*.jsonl, train*.jsonl.gz, train*.json or train*.parquet,
                                                           or what `datasets` saved with save_to_disk
    tfds:NAME   tfds:/folder/of/a/prepared/dataset         read as a data source, without TensorFlow
    id  id:config  hub:id                                  a data set on the Hugging Face hub

What a row may look like (`to_example(row, place)`), the first that fits; other fields are not read, null is absent:

    chosen, rejected [, prompt]       a pair. Each is a string, messages, or an HH transcript. The last two bring their
                                      history, the same on both sides; it must continue `prompt`, if there is one
    prompt, responses, ranks or       K responses. Ranks: least is best; scores: greatest is best; equal are ties.
            scores                    A single response needs neither; where both are given, ranks count
    messages, or conversations        a chat, [{role, content}] or [{from, value}]; it ends with the assistant's
                                      response (a demonstration) or with the user (a prompt)
    instruction, input, output        alpaca; `input` may be empty or absent, and is set under the instruction.
                                      Dolly's names, instruction, context, response, too
    prompt, response                  a demonstration. `question` stands for prompt; completion, output, answer or
                                      label (the TL;DR set) for response, one of them
    prompt                            a prompt to answer
    text                              an HH transcript, with the response or without

Messages may also be a dict of lists, as `datasets` and tfds nest them; role 'human' is the user, 'gpt' the assistant.
An HH transcript is '\\n\\nHuman: ...\\n\\nAssistant: ...' (Bai et al. 2022, 2204.05862); a prompt that is one ends in
'\\n\\nAssistant:'. The text of its turns is stripped; every other text is kept as it is.

Deliberately absent: templates and tokens (text.py), batches and their order (batches.py), rewards.
"""

import dataclasses
import gzip
import hashlib
import json
import math
import pathlib
import re
import zlib
from collections.abc import Mapping

from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.errors import ConfigError, DataError

FILES = ('.jsonl', '.jsonl.gz', '.json', '.parquet')
OTHER_FILES = ('.gz', '.csv', '.tsv', '.txt', '.arrow', '.zip', '.zst')          # a path that ends so is no hub id
ASKED = ('instruction', 'prompt', 'question')
RESPONSES = ('response', 'completion', 'output', 'answer', 'label')
INPUTS = ('input', 'context')
ROLES = {'system': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant'}
SPEAKER = re.compile(r'\n\n(Human|Assistant):')
ADVICE = 'Mend or drop the row, or pass --data.skip-bad-rows.'
SOURCES = ('Needed is a .jsonl, .jsonl.gz, .json or .parquet file, a folder with files named by split or made by '
           'save_to_disk, tfds:NAME, tfds:/prepared/folder, or the id of a data set on the Hugging Face hub.')
SHAPES = ('[prompt +] chosen + rejected; prompt + responses + ranks or scores; messages; conversations; '
          f'instruction [+ input] + output; prompt + one of {", ".join(RESPONSES)}; prompt; text')


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
    raise DataError(f'{place}: {_shown(row.decode())} is invalid JSON, {error}. Needed is one object a line, or a '
                    f'list of objects in a .json file. {ADVICE}') from error


# ---- one row

def to_example(row, place=''):
  """The Example in a row of any layout of this module's docstring; DataError, naming `place`, if there is none."""
  try:
    prompt, responses, ranks = _parts(row)
    if not prompt or prompt[-1].role != 'user':
      raise DataError(f'the prompt ends with {_end(prompt)}; needed is one that ends with what the user said.')
  except DataError as error:
    raise DataError(f'{place}: {error} {ADVICE}') from None
  return Example(tuple(prompt), tuple(responses), tuple(ranks), place)


def _parts(row):
  """(turns of the prompt, responses, ranks)."""
  if not isinstance(row, Mapping):
    raise DataError(f'the row is {_shown(row)}; needed is an object with named fields.')
  fields = {name: value for name, value in row.items() if value is not None}
  for needed, parts in LAYOUTS:
    if needed <= fields.keys():
      return parts(fields, row)
  raise DataError(f'the fields are {_names(row)}; needed is one of: {SHAPES}.')


def _pair(fields, row):
  asked = any(name in fields for name in ASKED)
  histories, responses = zip(*(_continuation(name, fields[name], asked) for name in ('chosen', 'rejected')))
  if histories[0] != histories[1]:
    raise DataError("'chosen' and 'rejected' differ before their last turn; needed is one prompt that both continue.")
  if fields['chosen'] == fields['rejected'] or responses[0] == responses[1]:
    raise DataError("'chosen' equals 'rejected', so the pair says nothing.")
  return _prompt(fields, row, histories[0]), responses, (0, 1)


def _ranked(fields, row):
  texts = fields['responses']
  if not isinstance(texts, list) or not texts:
    raise DataError(f"'responses' is {_shown(texts)}; needed is a list of one or more strings.")
  responses = [_filled(f'responses[{index}]', text) for index, text in enumerate(texts)]
  ranks = _ranks(fields, len(responses))
  if len(responses) > 1 and (len(set(ranks)) == 1 or len(set(responses)) == 1):
    same = 'ranks' if len(set(ranks)) == 1 else 'responses'
    raise DataError(f'all {len(responses)} {same} are equal, so they say nothing.')
  return _prompt(fields, row), responses, ranks


def _ranks(fields, count):
  """0 for the best, and no gaps."""
  name = next((name for name in ('ranks', 'scores') if name in fields), None)
  if name is None and count == 1:
    return (0,)
  if name is None:
    raise DataError(f"there are {count} 'responses', but neither 'ranks' nor 'scores'; needed is one of them.")
  kind, numbers = (int, 'whole numbers') if name == 'ranks' else (int | float, 'finite numbers')
  values = fields[name]
  if not isinstance(values, list) or not all(
      isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf for value in values):
    raise DataError(f'{name!r} is {_shown(values)}; needed is a list of {numbers}.')
  if len(values) != count:
    raise DataError(f'{name!r} has {len(values)} entries for {count} responses; needed is one for each.')
  order = sorted(set(values), reverse=name == 'scores')
  return tuple(order.index(value) for value in values)


def _chat(fields, row):
  name = 'messages' if 'messages' in fields else 'conversations'
  return _split(_messages(name, fields[name]))


def _transcribed(fields, row):
  turns = _transcript('text', _text('text', fields['text']))
  if all(turn.role == 'user' for turn in turns):
    raise DataError("'text' has no Assistant turn; needed is '\\n\\nHuman: ...\\n\\nAssistant: ...'.")
  return _split(_without_opening(turns))


def _split(turns):
  if turns and turns[-1].role == 'assistant':
    return turns[:-1], (turns[-1].text,), (0,)
  return turns, (), ()


def _prompted(fields, row):
  names = [name for name in RESPONSES if name in fields]
  if len(names) > 1:
    raise DataError(f'{_names(names)} could each be the response; needed is one of them.')
  if names:
    history, response = _continuation(names[0], fields[names[0]])
    return _prompt(fields, row, history), (response,), (0,)
  half = row.keys() & {'chosen', 'rejected', 'ranks', 'scores', 'responses', *RESPONSES}
  if half:
    raise DataError(f'the fields are {_names(row)}, where {_names(sorted(half))} is null or lacks its counterpart; '
                    f'needed is one of: {SHAPES}.')
  return _prompt(fields, row), (), ()


LAYOUTS = (({'chosen', 'rejected'}, _pair), ({'responses'}, _ranked), ({'messages'}, _chat), ({'conversations'}, _chat),
           *(({name}, _prompted) for name in ASKED), ({'text'}, _transcribed))


# ---- the turns of a field

def _prompt(fields, row, history=()):
  """The history that a response brought, which must continue the row's own prompt; or that prompt."""
  name = next((name for name in ASKED if name in fields), None)
  if name is None:
    if not history:
      raise DataError(f"the fields are {_names(row)}, without 'prompt'; needed is one, or responses that are "
                      'transcripts or messages which start with it.')
    return history
  turns = _instruction(fields) if name == 'instruction' else _turns(name, fields[name])
  spoken = [turn for turn in history if turn.role != 'system']
  if history and turns not in (list(history[:len(turns)]), spoken[:len(turns)]):
    raise DataError(f'{name!r} is {_shown(fields[name])}, but the responses start with {_shown(history[0].text)}; '
                    'needed is one prompt that they continue.')
  return history or turns


def _instruction(fields):
  name = next((name for name in INPUTS if name in fields), None)
  extra = _text(name, fields[name]) if name else ''
  instruction = _filled('instruction', fields['instruction'])
  return [Turn('user', f'{instruction}\n\n{extra}' if extra.strip() else instruction)]


def _turns(name, value):
  """Turns of a prompt: a string, an HH transcript, or messages."""
  if not isinstance(value, str):
    return _messages(name, value)
  text = _filled(name, value)
  if _is_transcript(text) or text.rstrip().endswith('\n\nAssistant:'):
    return _without_opening(_transcript(name, text))
  return [Turn('user', text)]


def _continuation(name, value, asked=True):
  """(turns before the response, the response), of a string, an HH transcript, or messages.

  Where no field asks (`asked`), a string must be a transcript, because the prompt is in it.
  """
  if isinstance(value, str) and asked and not _is_transcript(value):
    return [], _filled(name, value)
  turns = _transcript(name, value) if isinstance(value, str) else _messages(name, value)
  if not turns or turns[-1].role != 'assistant':
    raise DataError(f"{name!r} ends with {_end(turns)}; needed is the assistant's turn there.")
  return _each_filled(name, turns[:-1]), _filled(name, turns[-1].text)


def _is_transcript(text):
  return text.replace('\r\n', '\n').startswith('\n\nHuman:')


def _transcript(name, text):
  """Turns of '\\n\\nHuman: ...\\n\\nAssistant: ...', the last of which may be empty."""
  before, *pieces = SPEAKER.split('\n\n' + text.replace('\r\n', '\n').lstrip())
  if before or pieces[0] != 'Human':
    raise DataError(f"{name!r} is a transcript that starts with {_shown(text)}; needed is '\\n\\nHuman:' there.")
  turns = [Turn('user' if who == 'Human' else 'assistant', _text(name, said).strip())
           for who, said in zip(pieces[::2], pieces[1::2])]
  return _each_filled(name, turns[:-1]) + turns[-1:]


def _without_opening(turns):
  """Without the '\\n\\nAssistant:' that invites the response."""
  return turns[:-1] if turns[-1] == Turn('assistant', '') else turns


def _messages(name, value):
  """Turns of [{role, content}], [{from, value}] or the same as a dict of lists; an empty system turn is left out."""
  if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
    if len({len(column) for column in value.values()}) > 1:
      raise DataError(f'{name!r} is a dict of lists of unequal length; needed is one entry a turn in each.')
    value = [dict(zip(value, entries)) for entries in zip(*value.values())]
  if not isinstance(value, list):
    raise DataError(f'{name!r} is {_shown(value)}; needed is a string or a list of messages.')
  turns = [_message(f'{name}[{index}]', message) for index, message in enumerate(value)]
  return _each_filled(name, [turn for turn in turns if turn.role != 'system' or turn.text.strip()])


def _message(name, message):
  keys = ('from', 'value') if isinstance(message, Mapping) and 'from' in message else ('role', 'content')
  if not isinstance(message, Mapping) or any(key not in message for key in keys):
    raise DataError(f'{name!r} is {_shown(message)}; needed is {{role, content}} or {{from, value}}.')
  role, content = (message[key] for key in keys)
  if not isinstance(role, str) or role not in ROLES:
    raise DataError(f'{name!r} has role {_shown(role)}; needed is one of {", ".join(ROLES)}.')
  return Turn(ROLES[role], _text(name, content))


def _each_filled(name, turns):
  for index, turn in enumerate(turns):
    _filled(f'{name}[{index}]', turn.text)
  return turns


def _filled(name, value):
  if not _text(name, value).strip():
    raise DataError(f'{name!r} is empty; needed is some text.')
  return value


def _text(name, value):
  if not isinstance(value, str):
    raise DataError(f'{name!r} is {type(value).__name__} {_shown(value)}; needed is a string.')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise DataError(f'{name!r} has half a surrogate pair, {value[error.start]!r}, which is no character; needed is '
                    'text that UTF-8 can hold.') from error
  return value


def _end(turns):
  return f'a turn of the {turns[-1].role}, {_shown(turns[-1].text)}' if turns else 'nothing'


def _shown(value):
  text = repr(value[:80] if isinstance(value, str) else value)
  return text if len(text) <= 80 else text[:77] + '...'


def _names(names):
  return ', '.join(map(str, names)) or 'none'


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
