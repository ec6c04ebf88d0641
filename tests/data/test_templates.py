"""A template without transformers' own tag says in plain jinja2 what transformers says with it."""

import itertools

import jinja2
import pytest

from rlhf_jax.data import text
from rlhf_jax.data.templates import plain_jinja

# Tags on lines of their own, which jinja2 trims on the left and on the right.
INDENTED = """{% for m in messages %}
  {%- if m.role == 'assistant' %}
    {% generation %}
    {{ m.content }}
    {{ eos_token }}
    {% endgeneration %}

  {% else %}
  <{{ m.role }}> {{ m.content }}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{% endif %}
"""
# The assistant's last turn is another one than those before, and it is counted over all turns.
COUNTED = """{% set ns = namespace(count=0) %}{% for m in messages %}[{{ ns.count }}]
{% if m.role == 'assistant' %}{%- generation -%}
  {% set ns.count = ns.count + 1 %}
  {% if loop.last %} {{ m.content | trim }} {% else %}{{ m.content }}{% endif %}
{%- endgeneration -%} {{ eos_token }}
{% else %}{{ m.content }}{% endif %}{% endfor %} {{ ns.count }}"""
# A name that is set between the marks is another one than that outside of them.
SHADOWED = """{% set end = '?' %}{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}
{% generation %}{% set end = '!' %}{% set more %}{{ m.content }}{% endset %}{{ more + end }}
{% endgeneration %}{{ end }}{{ more }}{% else %}{{ m.content + end }}{% endif %}{% endfor %}"""
# Every sign at each of the four places.
SIGNED = [
  f'x \n {{%{a}generation{b}%}} \n {{{{ messages[0].role }}}} \n {{%{c}\n endgeneration {d}%}} \n z'
  for a, b, c, d in itertools.product(['', '-', '+'], repeat=4)]
TEMPLATES = [text.TRANSCRIPT_TEMPLATE, text.PLAIN_TEMPLATE, text.TURN_TEMPLATE, INDENTED, COUNTED,
             SHADOWED, *SIGNED]

CONVERSATIONS = [
  [('user', 'what is the colour of the cat?')],
  [('user', ' hello\n'), ('assistant', '  the sky is blue \n\n')],
  [('system', 'be brief'), ('user', 'a {% generation %} b'), ('assistant', '{{ 3 }}\n'),
   ('user', ''), ('assistant', 'x')],
]
PLAIN = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)


@pytest.fixture(scope='module')
def tokenizer():
  return text.train_tokenizer([], 261)


@pytest.mark.parametrize('template', TEMPLATES)
def test_plain_jinja2_says_what_transformers_says(template, tokenizer):
  with pytest.raises(jinja2.TemplateSyntaxError, match="unknown tag 'generation'"):
    PLAIN.from_string(template)
  plain = PLAIN.from_string(plain_jinja(template))
  for turns, invite in itertools.product(CONVERSATIONS, (False, True)):
    messages = [{'role': role, 'content': content} for role, content in turns]
    given = {'messages': messages, 'add_generation_prompt': invite}
    theirs = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                           add_generation_prompt=invite)
    assert plain.render(given | tokenizer.special_tokens_map) == theirs


def test_signs_stay_and_nothing_else_changes():
  for template, plain in [
    ('a{%-generation+%}b{%+ endgeneration -%}\n', 'a{%- if true +%}b{%+ endif -%}\n'),
    ('{% generation %}{%- set x = 1 %}{% endgeneration %}',
     '{% with %}{%- set x = 1 %}{% endwith %}'),
    ('{% set x = 1 %}{% generation %}{% set ns.x = 1 %}{% endgeneration %}',
     '{% set x = 1 %}{% if true %}{% set ns.x = 1 %}{% endif %}'),
  ]:
    assert plain_jinja(template) == plain
  for template in ("{{ 'generation' }}", '{% if add_generation_prompt %}x{% endif %}',
                   plain_jinja(text.TURN_TEMPLATE)):
    assert plain_jinja(template) == template
