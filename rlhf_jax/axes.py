"""The alphabet: the letters after the last underscore of a name say the axes of the array that it names.

`logprob_BR` is a log-probability for every response token (R) of every sequence (B). The same suffix is the subscript in
an einsum, the key of the partition rules and the key in a checkpoint.

    B sequences · T tokens of a whole sequence · P prompt tokens · R response tokens · S keys attended to
    V vocabulary · D model width · N query heads · K key/value heads · G = N/K · H head width · F feed-forward width
    L layers · C candidates (ranked responses of one prompt) · Q slots of a queue, sequences that are decoded at a time
"""

import re

from rlhf_jax.errors import AxesError

ALPHABET = 'BTPRSVDNKGHFLCQ'
_SUFFIX = re.compile(rf'_([{ALPHABET}]+)$')


def axes_of(name):
  """The letters of a name, '' for a scalar.

  >>> axes_of('logprob_BR'), axes_of('bias')
  ('BR', '')
  """
  found = _SUFFIX.search(name)
  return found.group(1) if found else ''


def check_axes(**arrays):
  """Sizes of the letters that the named arrays bind, as a dict; raises AxesError where two disagree.

  Arrays that are None are passed over. Works on anything with a `shape`, tracers included.

  >>> import numpy as np
  >>> check_axes(logprob_BR=np.zeros((2, 3)), mask_BR=np.ones((2, 3), bool))
  {'B': 2, 'R': 3}
  """
  sizes, bound_by = {}, {}
  for name, array in arrays.items():
    if array is None:
      continue
    letters, shape = axes_of(name), tuple(array.shape)
    if len(letters) != len(shape):
      raise AxesError(f'{name} has shape {shape}, but its name says {len(letters)} axes ({letters or "a scalar"}). '
                      f'Pass an array with the axes {letters or "()"}.')
    for letter, size in zip(letters, shape, strict=True):
      if sizes.setdefault(letter, size) != size:
        raise AxesError(f'{name} has {letter}={size}, but {bound_by[letter]} has {letter}={sizes[letter]}. '
                        f'All arrays of one call must agree on {letter}.')
      bound_by.setdefault(letter, name)
  return sizes
