"""Chat templates with the mechanisms of model families, and by hand what is right for each.

The templates are written for these tests. Each has the mechanism of its family: who is named how,
what ends a turn, what is moved, trimmed or taken out of history. Nothing here calls
rlhf_jax.data.chat, whose results it is to judge.
"""

import dataclasses
from collections.abc import Callable

from rlhf_jax.data import text
from tests.chat_tokenizers import tokenizer_of

DATE = '26 Jul 2024'
_THINK = ('<think>', '</think>')


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What becomes of a conversation: how many earlier turns have rows of their own, or are not
  trained; or why it is refused."""

  apart: int = 0
  untrained: int = 0
  refused: str = ''
  message: str = ''  # what the error says; as `refused` where empty

  def __str__(self):
    if self.refused:
      return f'refused: {self.refused}'
    rows = f', {self.apart + 1} rows' if self.apart else ''
    return f'right{rows}' + (', the first turn untrained' if self.untrained else '')


@dataclasses.dataclass(frozen=True)
class Family:
  """A template with its tokenizer, and what the assistant writes under it."""

  template: str
  kind: str  # of the tokenizer
  special: tuple[str, ...]  # special tokens; the first is the end token, eos
  end: str  # what closes an answer, '' where the template writes nothing
  appended: str = (
    ''  # what is put behind the last answer of a row, where the template writes nothing there
  )
  generation_ends: tuple[str, ...] = ()  # as the model's generation_config.json names them
  bos: str | None = None
  added: tuple[str, ...] = ()  # added tokens that are not special
  answer: Callable[[str], str] = lambda said: said  # what stands between the invitation and the end
  earlier: Callable[[str], str] | None = (
    None  # of earlier turns that the marks show changed, the end included
  )
  text: Callable[[str], str] = lambda said: said  # what the template keeps of a turn
  outcomes: dict[str, Outcome] = dataclasses.field(
    default_factory=dict
  )  # of shapes where it is not plainly right
  trained_end: bool = True  # False where the marks leave it out

  @property
  def marked(self):
    return 'generation %}' in self.template

  def tokenizer(self):
    return tokenizer_of(
      self.template.replace("strftime_now('%d %b %Y')", repr(DATE)),
      self.kind,
      self.special,
      self.bos,
      self.added,
    )

  def outcome(self, shape):
    return self.outcomes.get(shape, Outcome())

  def trained(self, said, last):
    """The text that is trained of an answer."""
    if not last and self.earlier is not None:
      return self.earlier(said)
    end = self.end or (self.appended if last else '')
    return self.answer(said) + (end if self.trained_end else '')


# ---- templates


def _each(user, assistant, system, invite, before='', first=''):
  """A template that writes a turn of each role as that expression, with m the message."""
  return (
    f"{before}{{% for m in messages %}}{first}{{% if m.role == 'assistant' %}}{assistant}"
    f"{{% elif m.role == 'user' %}}{user}{{% else %}}{system}{{% endif %}}{{% endfor %}}"
    f'{{% if add_generation_prompt %}}{invite}{{% endif %}}'
  )


def _chatml(assistant="{{ m.content + '<|im_end|>\n' }}", before='', first=''):
  said = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  return _each(
    said,
    "{{ '<|im_start|>assistant\n' }}" + assistant,
    said,
    "{{ '<|im_start|>assistant\n' }}",
    before,
    first,
  )


_DEFAULT_SYSTEM = (
  "{% if messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
)
_LAST_USER = (
  "{% set ns = namespace(last=-1, system='') %}{% for m in messages %}{% if m.role == 'user' %}"
  "{% set ns.last = loop.index0 %}{% elif m.role == 'system' %}"
  "{% set ns.system = m.content + '\n\n' %}{% endif %}{% endfor %}"
)
# A thought stays while no user turn follows; a last turn without one gets an empty one.
_QWEN3 = (
  "{% set said = m.content %}{% set thought = '' %}{% if '</think>' in said %}"
  "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
  "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
  'MARK{% if loop.index0 > ns.last and (loop.last or thought) %}'
  "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
  "{{ said + '<|im_end|>' }}ENDMARK{{ '\n' }}"
)
_QWEN3_MARKED = _QWEN3.replace('ENDMARK', '{% endgeneration %}').replace('MARK', '{% generation %}')
_QWEN3_UNMARKED = _QWEN3.replace('ENDMARK', '').replace('MARK', '')
_HEADER = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
_LLAMA3_BEFORE = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
  "{% set system = messages[0]['content'] | trim %}"
  "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
  "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
  "{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' }}"
)
_LLAMA3_SAID = _HEADER + "{{ m.content | trim + '<|eot_id|>' }}"
_LLAMA3_INVITE = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
_MUST_ALTERNATE = (
  "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
)
_NO_SYSTEM = (
  "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
)
_LLAMA2 = _each(
  "{{ bos_token + '[INST] ' + (ns.system if loop.index0 == 0 else '') }}"
  "{{ m.content | trim + ' [/INST]' }}",
  "{{ ' ' + m.content | trim + ' ' + eos_token }}",
  '',
  '',
  first=_MUST_ALTERNATE,
  before=(
    "{% set ns = namespace(system='') %}{% if messages[0]['role'] == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    '{% set messages = messages[1:] %}{% endif %}'
  ),
)
_ALPACA_USER, _ALPACA_INVITE = (
  "{{ '### Instruction:\n' + m.content + '\n\n' }}",
  "{{ '### Response:\n' }}",
)


def _alpaca(answer):
  return _each(_ALPACA_USER, _ALPACA_INVITE + answer, "{{ m.content + '\n\n' }}", _ALPACA_INVITE)


def _deepseek(answer, invite='<｜Assistant｜>'):
  return _each(
    "{{ '<｜User｜>' + m.content }}",
    "{{ '<｜Assistant｜>' }}" + answer + '{{ eos_token }}',
    '{{ m.content }}',
    "{{ '" + invite + "' }}",
    before='{{ bos_token }}',
  )


def _mistral(user, assistant):
  """The system text in the last user turn."""
  return _each(user, assistant, '', '', before='{{ bos_token }}' + _LAST_USER)


_NEMO_USER = (
  "{{ '[INST]' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
)
_STRIP_THOUGHT = "{{ m.content.split('</think>')[-1].lstrip('\n') }}"


# ---- what is right


def _without_thought(said):
  return said.split('</think>')[-1].lstrip('\n')


def _with_thought(said):
  """As Qwen3 writes a last turn."""
  if '</think>' not in said:
    return f'<think>\n\n</think>\n\n{said}'
  thought = said.split('</think>')[0].split('<think>')[-1].strip('\n')
  return f'<think>\n{thought}\n</think>\n\n{_without_thought(said)}'


_TWO = Outcome(apart=1)
_FIRST_UNTRAINED = {'assistant first': Outcome(untrained=1)}
_ALTERNATE = {
  shape: Outcome(refused='roles must alternate') for shape in ('assistant first', 'two user turns')
}
_NOTHING_MARKED = {
  'empty answer': Outcome(refused='no token to train', message='marks nothing of the response')
}
_CHATML_SPECIAL = ('<|im_end|>', '<|im_start|>', '<|endoftext|>')
_QWEN_SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
_LLAMA3_SPECIAL = (
  '<|end_of_text|>',
  '<|begin_of_text|>',
  '<|start_header_id|>',
  '<|end_header_id|>',
  '<|eot_id|>',
)
_MISTRAL_SPECIAL = ('</s>', '<s>', '[INST]', '[/INST]')
_DEEPSEEK_SPECIAL = (
  '<｜end▁of▁sentence｜>',
  '<｜begin▁of▁sentence｜>',
  '<｜User｜>',
  '<｜Assistant｜>',
)
_HISTORY_CHANGES = {
  'several turns': Outcome(apart=2),
  **dict.fromkeys(('system', 'thought in an earlier turn', 'control strings', 'white space',
                   'emoji', 'empty answer'), _TWO),
}

SHAPES = {
  'one turn': 'ua',
  'several turns': 'uauaua',
  'system': 'suaua',
  'assistant first': 'aua',
  'thought in the last turn': 'ut',
  'thought in an earlier turn': 'utua',
  'two user turns': 'uua',
  'control strings': 'uaua',
  'white space': 'uaua',
  'emoji': 'uaua',
  'empty answer': 'ueue',
}

FAMILIES = {
  'ChatML': Family(_chatml(), 'bytes', _CHATML_SPECIAL, '<|im_end|>'),
  'Qwen2.5 base': Family(
    _chatml(before=_DEFAULT_SYSTEM),
    'bytes composed',
    _QWEN_SPECIAL,
    '<|im_end|>',
    outcomes=_FIRST_UNTRAINED,
  ),
  'Qwen3': Family(
    _chatml(_QWEN3_UNMARKED, before=_LAST_USER),
    'bytes composed',
    _QWEN_SPECIAL,
    '<|im_end|>',
    added=_THINK,
    answer=_with_thought,
    outcomes=_HISTORY_CHANGES | {'assistant first': _TWO},
  ),
  'Llama 2': Family(
    _LLAMA2,
    'llama',
    ('</s>', '<s>'),
    '</s>',
    bos='<s>',
    answer=lambda said: f' {said} ',
    text=str.strip,
    outcomes=_ALTERNATE,
  ),
  'Llama 3': Family(
    _each(_LLAMA3_SAID, _LLAMA3_SAID, _LLAMA3_SAID, _LLAMA3_INVITE, before=_LLAMA3_BEFORE),
    'bytes trimmed',
    _LLAMA3_SPECIAL,
    '<|eot_id|>',
    bos='<|begin_of_text|>',
    text=str.strip,
    outcomes=_FIRST_UNTRAINED,
  ),
  'Mistral v0.1': Family(
    _each(
      "{{ '[INST] ' + m.content + ' [/INST]' }}",
      "{{ ' ' + m.content + eos_token }}",
      '',
      '',
      before='{{ bos_token }}',
      first=_MUST_ALTERNATE,
    ),
    'llama',
    ('</s>', '<s>'),
    '</s>',
    bos='<s>',
    answer=lambda said: f' {said}',
    outcomes=_ALTERNATE | {'system': Outcome(refused='roles must alternate')},
  ),
  'Mistral v0.3': Family(
    _mistral(_NEMO_USER.replace('[INST]', '[INST] '), "{{ ' ' + m.content + eos_token }}"),
    'first',
    _MISTRAL_SPECIAL,
    '</s>',
    bos='<s>',
    answer=lambda said: f' {said}',
    outcomes={'system': _TWO},
  ),
  'Mistral v0.3, a space behind each control token': Family(
    _mistral(_NEMO_USER, '{{ m.content + eos_token }}'),
    'llama',
    _MISTRAL_SPECIAL,
    '</s>',
    bos='<s>',
    outcomes={'system': _TWO},
  ),
  'Mistral Nemo': Family(
    _mistral(_NEMO_USER, '{{ m.content + eos_token }}'),
    'bytes words',
    _MISTRAL_SPECIAL,
    '</s>',
    bos='<s>',
    outcomes={'system': _TWO},
  ),
  'Gemma': Family(
    _each(
      "{{ '<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n' }}",
      "{{ '<start_of_turn>model\n' + m.content | trim + '<end_of_turn>\n' }}",
      '',
      "{{ '<start_of_turn>model\n' }}",
      before='{{ bos_token }}' + _NO_SYSTEM,
      first=_MUST_ALTERNATE,
    ),
    'gemma',
    ('<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>'),
    '<end_of_turn>',
    bos='<bos>',
    added=('\n\n', '▁▁'),
    text=str.strip,
    outcomes=_ALTERNATE | {'system': Outcome(refused='no system turn')},
  ),
  'Zephyr': Family(
    _each(
      *(
        "{{ '<|" + role + "|>\n' + m.content + eos_token + '\n' }}"
        for role in ('user', 'assistant', 'system')
      ),
      "{{ '<|assistant|>\n' }}",
    ),
    'llama',
    ('</s>', '<s>'),
    '</s>',
    bos='<s>',
  ),
  'DeepSeek V3': Family(
    _deepseek('{{ m.content }}'),
    'bytes words',
    _DEEPSEEK_SPECIAL,
    _DEEPSEEK_SPECIAL[0],
    bos=_DEEPSEEK_SPECIAL[1],
  ),
  'DeepSeek R1, thoughts taken out': Family(
    _deepseek(_STRIP_THOUGHT),
    'bytes words',
    _DEEPSEEK_SPECIAL,
    _DEEPSEEK_SPECIAL[0],
    bos=_DEEPSEEK_SPECIAL[1],
    added=_THINK,
    text=_without_thought,
  ),
  'DeepSeek R1, a thought opened': Family(
    _deepseek(_STRIP_THOUGHT, '<｜Assistant｜><think>\n'),
    'bytes words',
    _DEEPSEEK_SPECIAL,
    _DEEPSEEK_SPECIAL[0],
    bos=_DEEPSEEK_SPECIAL[1],
    added=_THINK,
    text=_without_thought,
    outcomes={
      shape: Outcome(
        refused='the prompt alone opens a thought', message='differently once it follows'
      )
      for shape in SHAPES
    },
  ),
  'Alpaca': Family(
    _alpaca("{{ m.content + '\n\n' }}"),
    'bytes',
    ('<|endoftext|>',),
    '',
    appended='<|endoftext|>',
    outcomes={'empty answer': _TWO},
  ),
  'Alpaca, Unigram': Family(
    _alpaca("{{ m.content + '\n\n' }}"),
    'always',
    ('</s>',),
    '',
    appended='</s>',
    outcomes={'empty answer': _TWO},
  ),
  'T5 words': Family(
    _mistral(_NEMO_USER, '{{ m.content + eos_token }}'),
    'always',
    _MISTRAL_SPECIAL,
    '</s>',
    bos='<s>',
    outcomes={'system': _TWO},
  ),
  "GLM-like, a turn ends where the user's begins": Family(
    _each(
      "{{ '<|user|>\n' + m.content }}",
      "{{ '<|assistant|>\n' + m.content }}",
      "{{ '<|system|>\n' + m.content }}",
      "{{ '<|assistant|>\n' }}",
    ),
    'bytes',
    ('<|endoftext|>', '<|user|>', '<|assistant|>', '<|system|>'),
    '<|user|>',
    appended='<|user|>',
    generation_ends=('<|endoftext|>', '<|user|>'),
  ),
  # Below, the template marks what the assistant wrote.
  'our own': Family(
    text.TURN_TEMPLATE, 'bytes', ('<|end|>', '<|system|>', '<|user|>', '<|assistant|>'), '<|end|>'
  ),
  'transcript': Family(
    text.TRANSCRIPT_TEMPLATE,
    'bytes',
    ('<|endoftext|>',),
    '<|endoftext|>',
    answer=lambda said: f' {said}',
  ),
  'transcript, Llama tokenizer': Family(
    '{{ bos_token }}' + text.TRANSCRIPT_TEMPLATE,
    'llama',
    ('</s>', '<s>'),
    '</s>',
    bos='<s>',
    answer=lambda said: f' {said}',
  ),
  'plain': Family(
    text.PLAIN_TEMPLATE,
    'bytes',
    ('<|endoftext|>',),
    '<|endoftext|>',
    answer=lambda said: f' {said}',
  ),
  'ChatML, marks': Family(
    _chatml("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"),
    'bytes',
    _CHATML_SPECIAL,
    '<|im_end|>',
  ),
  'ChatML, marks without the end': Family(
    _chatml("{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"),
    'bytes',
    _CHATML_SPECIAL,
    '<|im_end|>',
    trained_end=False,
    outcomes=_NOTHING_MARKED,
  ),
  'ChatML, marks with the line break': Family(
    _chatml("{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"),
    'bytes',
    _CHATML_SPECIAL,
    '<|im_end|>',
    earlier=lambda said: f'{said}<|im_end|>\n',
  ),
  'Qwen3, marks': Family(
    _chatml(_QWEN3_MARKED, before=_LAST_USER),
    'bytes composed',
    _QWEN_SPECIAL,
    '<|im_end|>',
    added=_THINK,
    answer=_with_thought,
    earlier=lambda said: f'{_without_thought(said) if "</think>" in said else said}<|im_end|>',
  ),
  'Llama 3, marks': Family(
    _each(
      _LLAMA3_SAID,
      _HEADER + "{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}",
      _LLAMA3_SAID,
      _LLAMA3_INVITE,
      before=_LLAMA3_BEFORE,
    ),
    'bytes words',
    _LLAMA3_SPECIAL,
    '<|eot_id|>',
    bos='<|begin_of_text|>',
    text=str.strip,
  ),
  'Mistral Nemo, marks': Family(
    _mistral(_NEMO_USER, '{% generation %}{{ m.content + eos_token }}{% endgeneration %}'),
    'bytes words',
    _MISTRAL_SPECIAL,
    '</s>',
    bos='<s>',
  ),
  'Alpaca, marks': Family(
    _alpaca("{% generation %}{{ m.content }}{% endgeneration %}{{ '\n\n' }}"),
    'bytes',
    ('<|endoftext|>',),
    '',
    appended='<|endoftext|>',
    outcomes=_NOTHING_MARKED,
  ),
}
