"""One row of data, of any layout, to an `Example`.

What a row may look like (`to_example(row, place)`), the first that fits; null is absent:

    chosen, rejected [, prompt]       a pair. Each is a string, messages, or an HH transcript. The last two bring their
                                      history, the same on both sides; it must continue `prompt`, if there is one
    prompt, responses, ranks or       K responses. Ranks: least is best; scores: greatest is best; equal are ties.
            scores                    A single response needs neither; where both are given, ranks count
    messages, or conversations        a chat, [{role, content}] or [{from, value}]; it ends with the assistant's
                                      response (a demonstration) or with the user (a prompt)
    instruction, output               alpaca; Dolly's instruction, response too
    prompt, response                  a demonstration. `question` stands for prompt; completion, output, answer or
                                      label (the TL;DR set) for response, one of them
    prompt                            a prompt to answer
    text                              an HH transcript, with the response or without

Messages may also be a dict of lists, as `datasets` and tfds nest them; role 'human' is the user, 'gpt' the assistant.
A content may be a list of parts, if each is {type: text, text}; they are joined.
An HH transcript is '\\n\\nHuman: ...\\n\\nAssistant: ...' (Bai et al. 2022, 2204.05862); a prompt that is one ends in
'\\n\\nAssistant:', and its responses continue it. The text of its turns is stripped; every other
text is kept.

Fields that change what these mean, beside any layout. Null, blank and empty values are absent:

    system, system_prompt, or         the system turn (Orca, alpaca, ShareGPT); a chat that has one
            system_message            of its own must have the same
    input, context                    set under instruction, prompt or question (alpaca, Dolly);
                                      beside a chat or transcript, its prompt must have the text
    history                           earlier turns, [[user, assistant], ...] or messages, before a
                                      prompt that is one string; a chat or transcript must begin so
    label or kto_tag, true or false   KTO: true is a demonstration; false, an undesired response, is
                                      refused
    weight                            refused unless 1

Refused in a row, since no template here could render them (`UNREAD`): tools and their calls,
images, audio, video, documents, chat_template_kwargs, reasoning apart from the response. Refused in
a message: the same and `reasoning`; in the assistant's also a flag of `LEARNT` (weight, train ...)
that says not to learn from it. Other fields are not read.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.errors import DataError

ASKED = ('instruction', 'prompt', 'question')
RESPONSES = ('response', 'completion', 'output', 'answer', 'label')
INPUTS = ('input', 'context')
SYSTEMS = ('system', 'system_prompt', 'system_message')
DESIRED = ('label', 'kto_tag')
UNREAD = ('tools', 'functions', 'tool_calls', 'function_call', 'image', 'images', 'video', 'videos',
          'audio', 'audios', 'documents', 'chat_template_kwargs', 'reasoning_content', 'thinking')
UNREAD_IN_MESSAGE = (*UNREAD, 'reasoning')
LEARNT = ('weight', 'train', 'training', 'train_on_turn', 'loss')
ROLES = {'system': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant'}
SPEAKER = re.compile(r'\n\n(Human|Assistant):')
INVITATION = '\n\nAssistant:'
ADVICE = 'Mend or drop the row, or pass --data.skip-bad-rows.'
SHAPES = ('[prompt +] chosen + rejected; prompt + responses + ranks or scores; messages; conversations; '
          f'instruction [+ input] + output; prompt + one of {", ".join(RESPONSES)}; prompt; text')


def to_example(row: Any, place: str = '') -> Example:
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
    raise DataError(f'the row is {shown(row)}; needed is an object with named fields.')
  fields = {name: value for name, value in row.items() if value is not None}
  _check_unread('the row', fields, UNREAD)
  _check_learnt('the row', fields, ('weight',))
  fields = _without_label(fields)
  for needed, parts in LAYOUTS:
    if needed <= fields.keys():
      prompt, responses, ranks = parts(fields, row)
      _check_told(fields, prompt)
      return _with_system(fields, prompt), responses, ranks
  raise DataError(f'the fields are {_names(row)}; needed is one of: {SHAPES}.')


# ---- layouts: each gives (turns of the prompt, responses, ranks)

def _pair(fields, row):
  sides = {name: fields[name] for name in ('chosen', 'rejected')}
  prompt, responses = _answered(fields, row, sides)
  if responses[0] == responses[1]:
    raise DataError("'chosen' equals 'rejected', so the pair says nothing.")
  return prompt, responses, (0, 1)


def _ranked(fields, row):
  texts = fields['responses']
  if not isinstance(texts, list) or not texts:
    raise DataError(f"'responses' is {shown(texts)}; needed is a list of one or more strings.")
  named = {f'responses[{index}]': text for index, text in enumerate(texts)}
  for name, text in named.items():
    _filled(name, text)
  if _asking(fields) is None:
    raise _without_prompt(row)
  prompt, responses = _answered(fields, row, named)
  ranks = _ranks(fields, len(responses))
  if len(responses) > 1 and (len(set(ranks)) == 1 or len(set(responses)) == 1):
    same = 'ranks' if len(set(ranks)) == 1 else 'responses'
    raise DataError(f'all {len(responses)} {same} are equal, so they say nothing.')
  return prompt, responses, ranks


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
    raise DataError(f'{name!r} is {shown(values)}; needed is a list of {numbers}.')
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
    prompt, responses = _answered(fields, row, {names[0]: fields[names[0]]})
    return prompt, responses, (0,)
  half = row.keys() & {'chosen', 'rejected', 'ranks', 'scores', 'responses', *RESPONSES}
  if half:
    raise DataError(f'the fields are {_names(row)}, where {_names(sorted(half))} is null or lacks its counterpart; '
                    f'needed is one of: {SHAPES}.')
  return _asked(fields), (), ()


LAYOUTS = (({'chosen', 'rejected'}, _pair), ({'responses'}, _ranked), ({'messages'}, _chat), ({'conversations'}, _chat),
           *(({name}, _prompted) for name in ASKED), ({'text'}, _transcribed))


# ---- a prompt and what answers it

def _asking(fields):
  """Name of the field that has the prompt, or None."""
  return next((name for name in ASKED if name in fields), None)


def _asked(fields):
  """Turns of the prompt: a string with what belongs to it, an HH transcript, or messages."""
  name = _asking(fields)
  value = fields[name]
  if name != 'instruction' and not isinstance(value, str):
    return _messages(name, value)
  text = _filled(name, value)
  if name != 'instruction' and _is_talk(text):
    return _without_opening(_transcript(name, text))
  under = [_text(extra, fields[extra]) for extra in INPUTS if not _absent(fields.get(extra))]
  return [*_history(fields), Turn('user', '\n\n'.join([text, *under]))]


def _history(fields):
  """The turns of the field of that name: pairs of what user and assistant said, or messages."""
  value = fields.get('history')
  if _absent(value):
    return []
  if isinstance(value, Mapping) or (isinstance(value, list) and isinstance(value[0], Mapping)):
    return _messages('history', value)
  pairs = value if isinstance(value, list) else [None]
  if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
    raise DataError(f"'history' is {shown(value)}; needed is a list of pairs [user, assistant].")
  return [Turn(role, _filled(f'history[{index}]', text))
          for index, pair in enumerate(pairs) for role, text in zip(('user', 'assistant'), pair)]


def _answered(fields, row, values):
  """(turns of the prompt, responses) of `values`, answers to it by the name of their field.

  An answer may bring the turns before it. Then all must bring the same, which continue the prompt.
  """
  name = _asking(fields)
  prompt = [] if name is None else _asked(fields)
  opening = _opening(fields)
  talks = [_continuation(field, value, opening, name is not None)
           for field, value in values.items()]
  histories, responses = zip(*talks)
  history = histories[0]
  if any(other != history for other in histories):
    raise DataError(f'{" and ".join(map(repr, values))} differ before their last turn; '
                    'needed is one prompt that they continue.')
  if name is None and not history:
    raise _without_prompt(row)
  if history and prompt not in (history[:len(prompt)], _spoken(history)[:len(prompt)]):
    raise DataError(f'{name!r} is {shown(fields[name])}, but the responses start with '
                    f'{shown(history[0].text)}; needed is one prompt that they continue.')
  return history or prompt, responses


def _without_prompt(row):
  return DataError(f"the fields are {_names(row)}, without 'prompt'; needed is one, or responses "
                   'that are transcripts or messages which start with it.')


def _opening(fields):
  """The row's prompt up to the invitation to answer, where it is an HH transcript; else None."""
  name = _asking(fields)
  value = fields.get(name)
  if name == 'instruction' or not isinstance(value, str) or not _is_talk(value):
    return None
  text = value.replace('\r\n', '\n').rstrip()
  return text if text.endswith(INVITATION) else text + INVITATION


def _continuation(name, value, opening, asked):
  """(turns before the response, the response), of a string, an HH transcript, or messages.

  A string continues `opening`, a transcript, by the rules of transcripts. Where no field asks
  (not `asked`), it must be a transcript itself, because the prompt is in it.
  """
  if not isinstance(value, str):
    turns = _messages(name, value)
  elif _is_transcript(value) or not asked:
    turns = _transcript(name, value)
  elif opening is not None:
    turns = _transcript(name, opening + value)
  else:
    return [], _filled(name, value)
  if not turns or turns[-1].role != 'assistant':
    raise DataError(f"{name!r} ends with {_end(turns)}; needed is the assistant's turn there.")
  response = turns[-1].text if opening is None else turns[-1].text.strip()
  return _each_filled(name, turns[:-1]), _filled(name, response)


# ---- what stands beside a prompt and changes it

def _without_label(fields):
  """The fields without KTO's label, true or 1; DataError where it is false, or anything else.

  Beside a prompt a `label` that is text is the response (TL;DR).
  """
  is_chat = any(name in fields for name in ('messages', 'conversations'))
  labels = {name: fields[name] for name in DESIRED if not _absent(fields.get(name)) and (
    is_chat or name != 'label' or _is_number(fields[name]))}
  for name, label in labels.items():
    if label not in (0, 1):
      raise DataError(f'{name!r} is {shown(label)}; needed is true or false, whether the response '
                      'is a desired one.')
    if not label:
      raise DataError(f'{name!r} is {shown(label)}: the response is an undesired one, and no '
                      'demonstration; needed is a desired one, or a pair of both.')
  return {name: value for name, value in fields.items() if name not in labels}


def _with_system(fields, turns):
  """The turns, which begin with the system text of the row, if it has one."""
  for name in SYSTEMS:
    if _absent(fields.get(name)):
      continue
    text = _text(name, fields[name])
    own = [turn for turn in turns if turn.role == 'system']
    other = next((turn for turn in own if turn.text.strip() != text.strip()), None)
    if other:
      raise DataError(f'{name!r} is {shown(text)}, but the system turn is {shown(other.text)}; '
                      'needed is one of them.')
    turns = turns if own else [Turn('system', text), *turns]
  return turns


def _check_told(fields, prompt):
  """DataError where a text that belongs to the prompt is not in it: beside a chat that lacks it."""
  for name in INPUTS:
    if not _absent(fields.get(name)):
      text = _text(name, fields[name]).strip()
      if not any(text in turn.text for turn in prompt):
        raise DataError(f'{name!r} is {shown(text)}, which the prompt does not say; needed is a '
                        'prompt that has it, or a prompt of one string, to set it under.')
  history = _spoken(_history(fields))
  if history != _spoken(prompt)[:len(history)]:
    raise DataError(f"'history' is {shown(fields['history'])}, but the prompt starts with "
                    f'{_end(prompt[:1])}; needed is a prompt of one string to follow it, or one '
                    'that starts with it.')


def _check_unread(name, fields, unread):
  """DataError where a field that is not read, and changes what the text means, is there."""
  for field in unread:
    if not _absent(fields.get(field)):
      raise DataError(f'{name} has {field!r}, {shown(fields[field])}, which changes what the text '
                      'means and is not read; needed is a row without it.')


def _check_learnt(name, fields, flags):
  """DataError where a field says that the text is not, or only in part, to be learnt from."""
  for flag in flags:
    value = fields.get(flag)
    if _is_number(value) and value != 1:
      raise DataError(f'{name} has {flag!r}, {shown(value)}, so it is not to be learnt like the '
                      'others; needed is a row whose every response is.')


def _is_number(value):
  return isinstance(value, bool | int | float)


def _spoken(turns):
  return [turn for turn in turns if turn.role != 'system']


def _absent(value):
  """Null, blank or empty, as deep as it goes: what a table holds where a row lacks a field."""
  if isinstance(value, str | bytes):
    return not value.strip()
  if isinstance(value, Mapping):
    return all(map(_absent, value.values()))
  if isinstance(value, list | tuple):
    return all(map(_absent, value))
  return value is None


# ---- the turns of a field

def _is_transcript(text):
  return text.replace('\r\n', '\n').startswith('\n\nHuman:')


def _is_talk(text):
  """Whether a prompt is an HH transcript; its start may have been stripped."""
  return _is_transcript(text) or text.replace('\r\n', '\n').rstrip().endswith(INVITATION)


def _transcript(name, text):
  """Turns of '\\n\\nHuman: ...\\n\\nAssistant: ...', the last of which may be empty."""
  before, *pieces = SPEAKER.split('\n\n' + text.replace('\r\n', '\n').lstrip())
  if before or pieces[0] != 'Human':
    raise DataError(f"{name!r} is a transcript that starts with {shown(text)}; needed is "
                    "'\\n\\nHuman:' there.")
  turns = [Turn('user' if who == 'Human' else 'assistant', _text(name, said).strip())
           for who, said in zip(pieces[::2], pieces[1::2])]
  return _each_filled(name, turns[:-1]) + turns[-1:]


def _without_opening(turns):
  """Without the '\\n\\nAssistant:' that invites the response."""
  return turns[:-1] if turns[-1] == Turn('assistant', '') else turns


def _messages(name, value):
  """Turns of [{role, content}], [{from, value}] or the same as a dict of lists; an empty system turn is left out."""
  messages = _listed(name, value)
  if not isinstance(messages, list):
    raise DataError(f'{name!r} is {shown(value)}; needed is a string or a list of messages.')
  turns = [_message(f'{name}[{index}]', message) for index, message in enumerate(messages)]
  return _each_filled(name, [turn for turn in turns if turn.role != 'system' or turn.text.strip()])


def _listed(name, value):
  """A dict of lists, an entry a turn or part in each, as a list of dicts; else the value itself."""
  if not isinstance(value, Mapping):
    return value
  if not all(isinstance(column, list) for column in value.values()):
    return value
  if len({len(column) for column in value.values()}) > 1:
    raise DataError(f'{name!r} is a dict of lists of unequal length; needed is one entry a turn in '
                    'each.')
  return [dict(zip(value, entries)) for entries in zip(*value.values())]


def _message(name, message):
  keys = ('from', 'value') if isinstance(message, Mapping) and 'from' in message else ('role', 'content')
  if not isinstance(message, Mapping) or any(key not in message for key in keys):
    raise DataError(f'{name!r} is {shown(message)}; needed is {{role, content}} or '
                    '{from, value}.')
  role, content = (message[key] for key in keys)
  if not isinstance(role, str) or role not in ROLES:
    raise DataError(f'{name!r} has role {shown(role)}; needed is one of {", ".join(ROLES)}.')
  _check_unread(repr(name), message, UNREAD_IN_MESSAGE)
  if ROLES[role] == 'assistant':
    _check_learnt(repr(name), message, LEARNT)
  return Turn(ROLES[role], _text(name, _joined(name, content)))


def _joined(name, content):
  """The text of a content that is a list of parts; any other content as it is."""
  parts = _listed(name, content)
  if not isinstance(parts, list):
    return content
  for part in parts:
    if not isinstance(part, Mapping) or part.get('type') != 'text':
      raise DataError(f'{name!r} has a part {shown(part)}; needed is text alone, each part '
                      '{type: text, text}.')
  return ''.join(_text(name, part.get('text')) for part in parts)


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
    raise DataError(f'{name!r} is {type(value).__name__} {shown(value)}; needed is a string.')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise DataError(f'{name!r} has half a surrogate pair, {value[error.start]!r}, which is no character; needed is '
                    'text that UTF-8 can hold.') from error
  return value


def _end(turns):
  return f'a turn of the {turns[-1].role}, {shown(turns[-1].text)}' if turns else 'nothing'


def shown(value: Any) -> str:
  """A value as messages show it, cut to 80 characters."""
  text = repr(value[:80] if isinstance(value, str) else value)
  return text if len(text) <= 80 else text[:77] + '...'


def _names(names):
  return ', '.join(map(str, names)) or 'none'
