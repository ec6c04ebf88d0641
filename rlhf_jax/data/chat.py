"""Conversations to tokens: what a chat template renders, which of it the assistant wrote, what ends
it.

One text, one row of tokens: a conversation is rendered whole and tokenized whole, so a response has
the tokens that it has behind its prompt. What is trained on is never guessed. Where the template
marks what the assistant wrote (`{% generation %}`), its marks decide. Where it does not, an earlier
turn counts if what the template renders up to it is a beginning of the whole text; a turn that is
rendered differently by then (a thought that is taken out of history, say) is named in
`Conversation.apart`, to be trained in a row of its own, as the model saw it when it wrote it.

The text of a turn is text. A control string that somebody writes, `<|im_end|>` say, never becomes a
control token: only the template's own do. Next: `encode.py`, which fits conversations into limits.
"""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

from rlhf_jax.data.examples import Turn
from rlhf_jax.data.pieces import PieceTokenizer, any_of, safe_starts
from rlhf_jax.errors import ConfigError, DataError

# Code points that Unicode reserves for use inside a program. A control string of a turn is rendered
# as OPEN number CLOSE; where there is one, the template's own are tokenized under the name
# OPEN_NAME number CLOSE.
_OPEN, _CLOSE, _OPEN_NAME = '\ufdd0', '\ufdd1', '\ufdd2'
_RESERVED = re.compile(f'[{_OPEN}{_CLOSE}{_OPEN_NAME}]')
_PLACEHOLDER = re.compile(f'{_OPEN}(\\d+){_CLOSE}')
_MARKS = re.compile(r'\{%[-+]?\s*generation\s*[-+]?%\}')
_ANY_MARK = re.compile(r'\{%[-+]?\s*(end)?generation\s*[-+]?%\}')
_NOW = re.compile(
  r'strftime_now\(\s*(?P<quote>[\'"])(?P<format>(?:(?!(?P=quote)).)*)(?P=quote)\s*\)')
# A template is somebody else's program: what it raises says that it refuses a conversation.
_REFUSALS = (
  jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_MOST_KEPT = 2 ** 14  # rendered prompts
_SYSTEM, _PROBE = Turn('system', 'Yak'), (Turn('user', 'Xylophone'), Turn('assistant', 'Zebra'))


@dataclasses.dataclass(frozen=True)
class Conversation:
  """The tokens of a conversation that ends with the assistant's turn.

  `mask` is True where the assistant wrote, `start` the number of tokens that the policy sees before
  it writes the last turn. `apart` numbers the earlier turns of the assistant that are not trained
  here, since the template renders them differently by now.
  """
  ids: list[int]
  mask: list[bool]
  start: int
  apart: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Text:
  """A rendered text as it is tokenized; `named` where a turn has a control string, see
  `Chat._text`.
  """
  text: str
  named: bool


@dataclasses.dataclass(frozen=True)
class _Rendered:
  """A conversation before it is tokenized."""
  prompt: _Text
  whole: _Text
  spans: list[tuple[int, int]]  # characters of `whole` that the assistant wrote
  apart: tuple[int, ...]
  closed: bool  # whether the template ends the last turn with an end token


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
  """How the conversations of one run become tokens, and answers texts. Made by `open_chat`."""
  tokenizer: Any
  template: str  # the tokenizer's, with the date of the run in place of today's
  # at which an answer ends; the first is written where the template writes none
  end_tokens: tuple[int, ...]
  pad_token: int
  behind: str = ''  # what the template writes behind every answer where it writes no end token
  invitation: str = ''  # to answer, where the template writes none when it is asked for one

  def prompts(self, asked: Iterable[Sequence[Turn]]) -> list[list[int] | DataError]:
    """Ids of each prompt, with the template's invitation; DataError for what it refuses."""
    asked = [tuple(turns) for turns in asked]
    self._render_prompts(asked)
    texts = [_or_refusal(self._prompt, turns) for turns in asked]
    tokens = self._tokenize(text for text in texts if isinstance(text, _Text))
    return [tokens[text].ids if isinstance(text, _Text) else text for text in texts]

  def conversations(self, spoken: Iterable[Sequence[Turn]], *, earlier: bool = True
                    ) -> list[Conversation | DataError]:
    """Each conversation as tokens; DataError in place of what cannot be one. Each ends with the
    assistant's turn.

    With `earlier` what the assistant wrote before its last turn counts too.
    """
    spoken = [tuple(turns) for turns in spoken]
    self._render_prompts(turns[:-1] for turns in spoken)
    rendered = [_or_refusal(self._conversation, turns, whole, earlier)
                for turns, whole in zip(spoken, self._render_all(spoken))]
    good = [each for each in rendered if isinstance(each, _Rendered)]
    tokens = self._tokenize(text for each in good for text in (each.prompt, each.whole))
    return [_or_refusal(self._laid_out, each, tokens[each.prompt], tokens[each.whole])
            if isinstance(each, _Rendered) else each for each in rendered]

  def answer_text(self, ids: Sequence[int]) -> str:
    """What an answer says: without end and other special tokens, and without what the template
    writes around it.
    """
    before, behind = self._around
    return self._decoded(ids).removeprefix(before).removesuffix(behind)

  def shown(self, ids: Sequence[int], mask: Sequence[bool]) -> str:
    """The text of a row of tokens, with what is trained on in double brackets."""
    said = ''
    for written, run in itertools.groupby(zip(ids, mask), key=lambda pair: bool(pair[1])):
      text = self.tokenizer.decode([i for i, _ in run], clean_up_tokenization_spaces=False)
      said += f'[[{text}]]' if written else text
    return said

  @functools.cached_property
  def identity(self) -> str:
    """A digest of all that tokens depend on."""
    parts = [self._settings(), self.template, self.end_tokens, self.tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

  @property
  def begin_token(self) -> int | None:
    """The id that a text may begin with."""
    return self.tokenizer.bos_token_id

  @functools.cached_property
  def marks(self) -> bool:
    """Whether the template marks what the assistant wrote."""
    return _MARKS.search(self.template) is not None

  # ---- rendering

  def _prompt(self, turns):
    text = self._invited(turns)
    return self._text(text, _OPEN in text)

  def _conversation(self, turns, whole, earlier):
    if not turns or turns[-1].role != 'assistant':
      raise DataError('the conversation does not end with the assistant, so there is nothing to '
                      'learn from.')
    prompt = self._invited(turns[:-1])
    whole, marked = _or_raise(whole)
    if not whole.startswith(prompt):
      raise DataError('the chat template renders what is before the response '
                      f'{turns[-1].text[:60]!r} differently once it follows, so the policy would '
                      'be trained on other text than it sees. Use a template that only appends to '
                      'a prompt.')
    whole, closed = self._up_to_end(whole, len(prompt), [end for _, end in marked])
    if self.marks:
      spans, apart = [(first, min(last, len(whole))) for first, last in marked], ()
      if not any(last > len(prompt) for _, last in spans):
        raise DataError(f'the chat template marks nothing of the response {turns[-1].text[:60]!r} '
                        'as written by the assistant. Mend its {% generation %} marks, or take '
                        'them out.')
      spans = [span for span in spans if earlier or span[1] > len(prompt)]
    else:
      spans, apart = self._earlier_turns(turns, whole) if earlier else ([], ())
      spans = [*spans, (len(prompt), len(whole))]
    named = _OPEN in whole
    place = lambda at: len(self._text(whole[:at], named).text) if named else at
    return _Rendered(self._text(prompt, named), self._text(whole, named),
                     [(place(first), place(last)) for first, last in spans], apart, closed)

  def _earlier_turns(self, turns, whole):
    """(spans of the assistant's earlier turns whose place is proved, numbers of the others)."""
    spans, apart = [], []
    for number, turn in enumerate(turns[:-1]):
      if turn.role == 'assistant':
        span = self._proved(turns[:number], turns[:number + 1], whole)
        if span is None:
          apart.append(number)
        else:
          spans.append(span)
    return spans, tuple(apart)

  def _proved(self, history, said, whole):
    """Where the last turn of `said` stands in `whole`; None where the text up to there is none of
    its beginnings.
    """
    try:
      before = self._invited(history)
      after, closed = self._up_to_end(self._render(said)[0], len(before))
    except DataError:
      return None
    if not after.startswith(before) or not whole.startswith(after):
      return None
    # Some templates close a turn only once others follow.
    closing = None if closed else self._ends.match(whole, len(after))
    end = closing.end() if closing else len(after)
    return (len(before), end) if end > len(before) else None

  def _up_to_end(self, whole, start, marked_ends=()):
    """(the text up to the first end token behind `start`, whether there is one).

    Where there is none: up to where the last mark ends, or without what the template writes behind
    every answer.
    """
    found = self._ends.search(whole, start)
    if found:
      return whole[:found.end()], True
    if marked_ends:
      return whole[:max(marked_ends)], False
    return whole.removesuffix(self.behind), False

  def _invited(self, turns):
    """The text of a prompt."""
    if turns not in self._prompts_kept:
      self._render_prompts([turns])
    return _or_raise(self._prompts_kept[turns])[0] + self.invitation

  def _render_prompts(self, asked):
    """Renders those that are not kept. All responses of an example have the same prompt."""
    kept = self._prompts_kept
    if len(kept) > _MOST_KEPT:
      kept.clear()
    new = list(dict.fromkeys(turns for turns in asked if turns not in kept))
    kept.update(zip(new, self._render_all(new, invite=True)))

  @functools.cached_property
  def _prompts_kept(self):
    return {}

  def _render_all(self, some, invite=False):
    """`_render` of each, DataError in place of what is refused; faster than one at a time."""
    if len(some) > 1:
      try:
        return self._render_together(some, invite)
      except DataError:
        pass  # one of them is refused; found out below
    return [_or_refusal(self._render, turns, invite) for turns in some]

  def _render(self, turns, invite=False):
    """(text, spans that the template marks); control strings are rendered as placeholders."""
    return self._render_together([turns], invite)[0]

  def _render_together(self, some, invite):
    # Slow to import, and not always needed.
    from transformers.utils.chat_template_utils import render_jinja_template
    messages = [[{'role': turn.role, 'content': self._shielded(turn)} for turn in turns]
                for turns in some]
    try:
      texts, marked = render_jinja_template(
        conversations=messages, chat_template=self.template, add_generation_prompt=invite,
        return_assistant_tokens_mask=self.marks and not invite, **self.tokenizer.special_tokens_map)
    except _REFUSALS as error:
      roles = ', '.join(turn.role for turn in some[0]) or 'no turns'
      raise DataError(f'the chat template refuses a conversation of {roles}: '
                      f'{type(error).__name__}: {_first_line(error).rstrip(".")}.') from error
    return list(zip(texts, marked or itertools.repeat([])))

  def _shielded(self, turn):
    """The text of a turn with a placeholder for each control string.

    The assistant's own may be the tokens of a thought or a call, which are no special ones; a
    user's may not.
    """
    found = _RESERVED.search(turn.text)
    if found:
      raise DataError(f'a turn of the {turn.role} holds {found[0]!r}, a code point that Unicode '
                      'reserves for use inside programs; needed is text.')
    strings = self._special if turn.role == 'assistant' else self._control
    return strings.sub(lambda match: f'{_OPEN}{self._numbers[match[0]]}{_CLOSE}', turn.text)

  def _text(self, rendered, named):
    """A rendered text with the control strings of the turns in it, as text.

    Where there are any (`named`), the template's own go by other names, which `_renamed` knows.
    """
    if not named:
      return _Text(rendered, False)
    template_s = lambda match: (
      _name(self._numbers[match[0]]) if match[0] in self._numbers else match[0])
    said = self._control.sub(template_s, rendered)
    strings = list(self._numbers)
    return _Text(_PLACEHOLDER.sub(lambda match: strings[int(match[1])], said), True)

  # ---- tokens

  def _laid_out(self, rendered, prompt_tokens, tokens):
    """The Conversation of a rendered one, from the tokens of its prompt and of its whole text."""
    ids, prompt_ids, prompt = tokens.ids, prompt_tokens.ids, len(rendered.prompt.text)
    start = len(prompt_ids) if ids[:len(prompt_ids)] == prompt_ids else tokens.ending_by(prompt)
    if ids[:start] != prompt_ids[:start] or len(prompt_ids) - start not in (0, 1):
      raise DataError('the tokenizer joins the prompt and the response '
                      f'{rendered.whole.text[prompt:][:40]!r}: no token ends where the prompt '
                      'does, so the policy could never write the response in these tokens.')
    # A header that takes the space behind it reaches into the answer.
    headers = () if self.marks else self._control_ids
    mask = tokens.overlap(rendered.spans, never_begun_before=headers)
    if not rendered.closed:
      ids, mask = [*ids, self.end_tokens[0]], [*mask, True]
    return Conversation(ids, mask, start, rendered.apart)

  def _tokenize(self, texts):
    """{_Text: its Tokens}"""
    texts, tokens = list(dict.fromkeys(texts)), {}
    for named in (False, True):
      some = [text for text in texts if text.named == named]
      if some:
        tokenize = self._renamed_pieces if named else self._pieces
        tokens |= zip(some, tokenize([text.text for text in some]))
    return tokens

  def _decoded(self, ids):
    """The text of an answer, decoded behind a letter: of the first token the space may be lost."""
    ids = [*self._letter, *map(int, ids)]
    if ids[-1] in self.end_tokens:
      ids = ids[:-1]
    decode = self.tokenizer.decode
    text = decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix(decode(self._letter, clean_up_tokenization_spaces=False))

  @functools.cached_property
  def _letter(self):
    return self._backend.encode('a', add_special_tokens=False).ids

  @functools.cached_property
  def _around(self):
    """What the tokens of an answer say before and behind its text: seen on an answer."""
    for turns in (_PROBE, (_SYSTEM, *_PROBE)):
      (conversation,) = self.conversations([turns], earlier=False)
      if not isinstance(conversation, DataError):
        before, found, behind = self._decoded(
          conversation.ids[conversation.start:]).partition(_PROBE[1].text)
        return (before, behind) if found else ('', '')
    return '', ''

  @functools.cached_property
  def _pieces(self):
    return PieceTokenizer(self._backend, self._starts)

  @functools.cached_property
  def _renamed_pieces(self):
    names = [_name(self._numbers[content]) for content in self._starts]
    return PieceTokenizer(self._renamed, names)

  @functools.cached_property
  def _starts(self):
    return safe_starts(self._numbers, self.tokenizer.added_tokens_decoder.values())

  @functools.cached_property
  def _numbers(self):
    """{control string: its number}: special and end tokens, and others that the template writes."""
    named = self.tokenizer.special_tokens_map.values()  # what a template writes by name
    control = [token.content for number, token in self.tokenizer.added_tokens_decoder.items()
               if token.special or number in self.end_tokens or token.content in named
               or (token.content in self.template and not token.content.isspace())]
    return {content: number for number, content in enumerate(control)}

  @functools.cached_property
  def _control_ids(self):
    return frozenset(map(self.tokenizer.convert_tokens_to_ids, self._numbers))

  @functools.cached_property
  def _control(self):
    return any_of(self._numbers)

  @functools.cached_property
  def _special(self):
    added = self.tokenizer.added_tokens_decoder
    return any_of(token.content for number, token in added.items()
                  if token.special or number in self.end_tokens)

  @functools.cached_property
  def _ends(self):
    return any_of(self.tokenizer.convert_ids_to_tokens(list(self.end_tokens)))

  @functools.cached_property
  def _backend(self):
    import tokenizers
    return tokenizers.Tokenizer.from_str(json.dumps(self._settings()))

  @functools.cached_property
  def _renamed(self):
    """The same tokenizer, where each control token has a name that no text holds: its string is
    only text.
    """
    import tokenizers
    settings, model = self._settings(), self.tokenizer.backend_tokenizer.get_vocab(
      with_added_tokens=False)
    name = lambda content: _name(self._numbers[content]) if content in self._numbers else content
    for token in settings['added_tokens']:
      token['content'] = name(token['content'])
    vocab = settings['model'].get('vocab')
    if isinstance(vocab, dict):
      settings['model']['vocab'] = {name(content): number for content, number in vocab.items()}
    elif vocab is not None:  # of a Unigram: [[piece, score], ...]
      settings['model']['vocab'] = [[name(content), score] for content, score in vocab]
    if settings['model'].get('unk_token') in model:
      settings['model']['unk_token'] = name(settings['model']['unk_token'])
    merges = settings['model'].get('merges') or []
    if merges:  # none may make a control token of text
      settings['model']['merges'] = [
        pair for pair in merges if not self._numbers.keys() & _of_a_merge(pair)]
    renamed = tokenizers.Tokenizer.from_str(json.dumps(settings))
    for content in self._numbers:
      if renamed.token_to_id(name(content)) != self.tokenizer.convert_tokens_to_ids(content):
        raise DataError(f'the control string {content!r} in a turn cannot be kept apart from the '
                        'token of that name with this tokenizer.')
    return renamed

  def _settings(self):
    """The tokenizer's, without what users set on it, and without what adds tokens."""
    settings = json.loads(self.tokenizer.backend_tokenizer.to_str())
    return settings | {'truncation': None, 'padding': None, 'post_processor': None}


def open_chat(tokenizer: Any, *, generation_ends: Sequence[int] = (), pad_token: int | None = None,
              began: datetime.datetime | None = None) -> Chat:
  """The Chat of a tokenizer with a chat template.

  An answer ends at the token with which the template closes an assistant's turn, and at each of
  `generation_ends`, the ids that the model's generation config names; where there is neither, at
  the tokenizer's end token. `began` is the time that templates take for now. Raises ConfigError
  where the template is none, or asks for a time that is not fixed.
  """
  if not tokenizer.is_fast:
    raise ConfigError(f'the tokenizer is a {type(tokenizer).__name__}, which does not say where in '
                      'the text a token stands. Use one with a tokenizer.json.')
  template = dated(_template_of(tokenizer), began or datetime.datetime.now())
  eos, added = tokenizer.eos_token_id, tokenizer.added_tokens_decoder
  named = tuple(i for i in generation_ends if i in added)
  chat = Chat(tokenizer, template, (eos,), eos if pad_token is None else pad_token)
  behind, closing = _behind_an_answer(
    chat, {tokenizer.convert_ids_to_tokens(i) for i in (*named, eos)})
  invitation = _missing_invitation(chat)
  ends = [] if closing is None else [tokenizer.convert_tokens_to_ids(closing)]
  ends += [eos] if closing is None and (eos in named or not named) else []
  return dataclasses.replace(chat, end_tokens=tuple(dict.fromkeys([*ends, *named])), behind=behind,
                             invitation=invitation)


def dated(template: str, now: datetime.datetime) -> str:
  """The template with a fixed time in place of the moment of rendering: the same text tomorrow.

  >>> dated("{{ strftime_now('%d %b %Y') }}", datetime.datetime(2024, 7, 26))
  "{{ '26 Jul 2024' }}"
  """
  fixed = _NOW.sub(lambda call: repr(now.strftime(call['format'])), template)
  if re.search(r'strftime_now\s*\(', fixed):
    raise ConfigError('the chat template calls strftime_now with what is no string, so its text '
                      'changes with the clock. Write the format into the template.')
  return fixed


def _template_of(tokenizer):
  try:
    template = tokenizer.get_chat_template()
    jinja2.Environment(extensions=['jinja2.ext.loopcontrols']).parse(_ANY_MARK.sub('', template))
  except ValueError as error:
    raise ConfigError('the tokenizer has no chat template that is used by default: '
                      f'{_first_line(error)} Set chat_template in its '
                      'tokenizer_config.json.') from error
  except jinja2.TemplateSyntaxError as error:
    raise ConfigError(f'the chat template of the tokenizer is not jinja, line {error.lineno}: '
                      f'{_first_line(error)}. Mend chat_template.jinja beside it.') from error
  return template


def _behind_an_answer(chat, ends):
  """(text, closing string or None) that a Chat writes behind an answer; `ends` are strings that are
  known to end one.

  The closing string is the first of these. Where there is none, it is the control string that comes
  first behind an answer, whether or not another turn follows, if it is not the one with which turns
  begin.
  """
  for system in ((), (_SYSTEM,)):
    try:
      whole = chat._render((*system, *_PROBE))[0]
      followed = chat._render((*system, *_PROBE, *_PROBE[:1]))[0]
    except DataError:
      continue
    if _PROBE[1].text not in whole:  # it changes what is said
      return '', None
    behind = whole.rpartition(_PROBE[1].text)[2]
    between = followed.partition(_PROBE[1].text)[2].partition(_PROBE[0].text)[0]
    opening = chat._control.findall(followed.partition(_PROBE[0].text)[0])[-1:]  # of a user's turn
    last, earlier = chat._control.findall(behind), chat._control.findall(between)
    closing = next((string for string in last if string in ends), None)
    closers = earlier[:-1] if opening and earlier[-1:] == opening else earlier
    if closing is None and last and last[:1] == closers[:1]:
      closing = last[0]
    if closing is not None:
      return '', closing
    return behind, next((string for string in earlier if string in ends), None)
  return '', None


def _missing_invitation(chat):
  """What stands before every answer, of a template that writes the same prompt with an invitation
  to answer and without.

  Else the policy would have to write the header of its own turn. The space before an answer's first
  word is no part of it.
  """
  for system in ((), (_SYSTEM,)):
    try:
      prompt, invited = (chat._render((*system, _PROBE[0]), invite)[0] for invite in (False, True))
      whole, marked = chat._render((*system, *_PROBE))
    except DataError:
      continue
    if prompt == invited and whole.startswith(prompt) and _PROBE[1].text in whole:
      starts = ([first for first, _ in marked if first >= len(prompt)]
                or [whole.rindex(_PROBE[1].text)])
      return whole[len(prompt):starts[0]].rstrip(' ')
    return ''
  return ''


def _or_raise(made):
  """What `_or_refusal` gave."""
  if isinstance(made, DataError):
    raise made
  return made


def _or_refusal(make, *arguments):
  """make(...), or the DataError that it raises."""
  try:
    return make(*arguments)
  except DataError as error:
    return error


def _of_a_merge(pair):
  """The two tokens of a merge of a BPE (one string in older files), and the one that it makes."""
  one, other = pair.split(' ') if isinstance(pair, str) else pair
  return {one, other, one + other}


def _name(number):
  return f'{_OPEN_NAME}{number}{_CLOSE}'


def _first_line(error):
  return str(error).strip().partition('\n')[0]
