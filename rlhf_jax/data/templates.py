"""Chat templates for readers that are not transformers.

In a template, `{% generation %}` and `{% endgeneration %}` mark what the assistant writes. The tag
is an extension of transformers, and a reader without it refuses the template.
"""

import re

_BEGIN = re.compile(r'(\{%[-+]?)\s*generation\s*([-+]?%\})')
_END = re.compile(r'(\{%[-+]?)\s*endgeneration\s*([-+]?%\})')
_MARKED = re.compile(f'{_BEGIN.pattern}(?P<text>.*?){_END.pattern}', re.DOTALL)
_SETS_A_NAME = re.compile(r'\{%[-+]?\s*set\s+\w+\s*[^\w\s.]')  # an attribute, as in ns.last, is not


def plain_jinja(template: str) -> str:
  """The template with tags of jinja2 itself for the marks: every conversation reads the same.

  A mark becomes a condition that holds, which every reader knows. A name that is set between marks
  is unknown after them, so a template that sets one gets `{% with %}` instead, which keeps to that.
  Signs that control whitespace stay. A template without marks is returned as it is.
  """
  sets_a_name = any(_SETS_A_NAME.search(match['text']) for match in _MARKED.finditer(template))
  begin, end = ('with', 'endwith') if sets_a_name else ('if true', 'endif')
  return _END.sub(rf'\1 {end} \2', _BEGIN.sub(rf'\1 {begin} \2', template))
