"""Where each axis lives on a mesh: one dict from letters to mesh axes, applied to the suffix of every name.

It serves parameters, optimizer state (Optax keeps the names), batches and activations. Exhaustive: a name that the rules
do not cover raises, so a misspelt one is never replicated by accident. Meshes are made in `runners.py`.
"""

import contextlib
import contextvars
import functools
import math

import jax
from jax.sharding import PartitionSpec

from rlhf_jax.axes import ALPHABET, axes_of
from rlhf_jax.errors import ShardingError

RULES = {
  'B': ('data', 'fsdp'), 'D': 'fsdp', 'V': 'tensor', 'N': 'tensor', 'K': 'tensor', 'F': 'tensor',
  'H': None, 'L': None, 'T': None, 'P': None, 'R': None, 'S': None, 'C': None, 'G': None,
  # An embedding that is cut along both axes is gathered whole at every look-up; cut along V alone it is not.
  'embedding_VD': (('tensor', 'fsdp'), None),
  'step': (), 'bias': (), 'count': (),
}
# Where an axis does not divide: a vocabulary of 50257 has no divisors that a mesh could use.
_SECOND_CHOICE = {'embedding_VD': (None, ('tensor', 'fsdp'))}
_rules = contextvars.ContextVar('rules', default=RULES)  # those of the runner whose function is being traced


@contextlib.contextmanager
def using(rules):
  """Inside, `gathered` parameters and their gradients are laid out by these rules."""
  token = _rules.set(rules)
  try:
    yield
  finally:
    _rules.reset(token)


def _name(path):
  """The last word of a path in a pytree: a dict key or a field name."""
  words = [str(getattr(entry, 'key', getattr(entry, 'name', ''))) for entry in path]
  words = [word for word in words if word and not word.isdigit()]
  return words[-1] if words else ''


def spec(name, shape, rules=RULES):
  """The PartitionSpec of an array by its name; raises ShardingError for a name that the rules do not cover."""
  if name in rules and len(rules[name]) == len(shape):
    return PartitionSpec(*rules[name])
  letters = axes_of(name)
  if len(letters) != len(shape) or (not letters and shape):
    raise ShardingError(f'no partition rule covers {name!r} of shape {tuple(shape)}. Name it with one letter of '
                        f'{ALPHABET} an axis, or add its name to the rules.')
  missing = [letter for letter in letters if letter not in rules]
  if missing:
    raise ShardingError(f'{name!r} has the axis {missing[0]}, which no partition rule covers. Add {missing[0]!r} to the '
                        'rules, with a mesh axis or None.')
  return PartitionSpec(*(rules[letter] for letter in letters))


def specs(tree, axis_sizes, rules=RULES):
  """PartitionSpecs for every leaf of a tree (arrays or shapes), each checked to divide by the mesh's {axis: size}."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: _checked(path, leaf, axis_sizes, rules), tree)


def _parts(axes, axis_sizes):
  """Into how many parts mesh axes (a name, several, or None) cut."""
  return math.prod(axis_sizes.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def _divides(shape, spec, axis_sizes):
  return all(size % _parts(axes, axis_sizes) == 0 for size, axes in zip(shape, spec, strict=True))


def _stored(name, shape, axis_sizes, rules):
  """The PartitionSpec by which a parameter is kept: the first choice, or the second where only that divides."""
  found = spec(name, shape, rules)
  second = _SECOND_CHOICE.get(name) if name in rules else None
  if second and not _divides(shape, found, axis_sizes) and _divides(shape, second, axis_sizes):
    return PartitionSpec(*second)
  return found


def batch_parts():
  """Into how many parts the current mesh cuts a batch; 1 without a data x fsdp x tensor mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return _parts(RULES['B'], dict(mesh.shape)) if set(RULES['B']) <= set(mesh.axis_names) else 1


def cuts_parameters():
  """Whether the current mesh cuts parameters along fsdp, so that they are `gathered` to be used."""
  return dict(jax.sharding.get_abstract_mesh().shape).get('fsdp', 1) > 1


def _checked(path, leaf, axis_sizes, rules):
  name = _name(path)
  if not leaf.shape and name not in rules:
    return PartitionSpec()                                               # a number has nothing to shard
  found = _stored(name, leaf.shape, axis_sizes, rules)
  for letter, size, axes in zip(axes_of(name), leaf.shape, found, strict=False):
    for_axis = (axes,) if isinstance(axes, str) else axes or ()
    parts = _parts(axes, axis_sizes)
    if size % parts:
      largest = max(n for n in range(1, parts + 1) if size % n == 0 and parts % n == 0)
      where = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ShardingError(f"{where} has {letter}={size}, which mesh axis {' x '.join(map(repr, for_axis))} ({parts} "
                          f'devices) does not divide. Use {largest} there, or map {letter} to None.')
  return found


def constrain(x, letters, **cut):
  """x, with its axes pinned to a data x fsdp x tensor mesh: B split, the rest whole. No-op without such a mesh.

  `cut` names mesh axes for other letters, V='tensor', which cut them where they divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(RULES['B']) <= set(mesh.axis_names):
    return x
  parts = batch_parts()
  for letter, size in zip(letters, x.shape, strict=True):
    if letter == 'B' and size % parts:
      raise ShardingError(f'{size} sequences at a time, which the {parts} devices of the mesh axes data x fsdp do not '
                          'divide. Choose a batch size that they divide after the cut into minibatches and microbatches.')
  cut = {letter: axis for letter, axis in cut.items() if x.shape[letters.index(letter)] % mesh.shape[axis] == 0}
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*((cut | {'B': RULES['B']}).get(letter) for letter in letters)))


def _pin(x, name, whole=False):
  """x laid out on the current mesh as a parameter of its name is kept; or, `whole` along fsdp, as it is used.

  Where the mesh does not divide it, it is whole; in use also what is kept by its second choice.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not x.shape or not set(RULES['B']) <= set(mesh.axis_names):
    return x

  def kept(axes, size):
    axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if not (whole and axis == 'fsdp'))
    return axes if size % _parts(axes, dict(mesh.shape)) == 0 else None
  found = spec(name, x.shape, _rules.get()) if whole else _stored(name, x.shape, dict(mesh.shape), _rules.get())
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(kept, found, x.shape)))


def gathered(weight, name):
  """A parameter, whole along the mesh axis fsdp while it is used; its gradient is cut along it again.

  Without such an axis it is the weight itself, and can be differentiated in any way.
  """
  return _gathered(weight, name) if cuts_parameters() else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight, name):
  """`gathered` where there is something to gather.

  Said here, because what a compiler does of itself with a weight that is cut along a contracted axis is to send it around
  piece by piece, and to add to all of the product for each.
  """
  return _pin(weight, name, whole=True)


# The gradient first whole, then cut: each chip sums over its own sequences, and the sums of all are scattered.
_gathered.defvjp(lambda weight, name: (_pin(weight, name, whole=True), None),
                 lambda name, _, gradient: (_pin(_pin(gradient, name, whole=True), name),))


def for_lookup(table, name, count):
  """A table, `gathered` where so many rows are looked up that these would be more to send than the table itself.

  What is cut over fsdp, as the batch is, is else looked up by every chip for all sequences, and summed over all chips.
  """
  rows = table.shape[0] / dict(jax.sharding.get_abstract_mesh().shape).get('tensor', 1)
  return gathered(table, name) if count >= rows else table


def by_device(fn, inputs, output):
  """fn of arrays with the letters `inputs`, where each device of a data x fsdp x tensor mesh computes its own part alone.

  For attention kernels, which XLA cannot cut. Always by `RULES`, whatever a runner changes: query heads and key/value heads
  must be cut alike. fn itself without such a mesh; raises ShardingError for an axis that the mesh does not divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(RULES['B']) <= set(mesh.axis_names):
    return fn
  cut = lambda letters: PartitionSpec(*(RULES[letter] for letter in letters))
  mapped = jax.shard_map(fn, in_specs=tuple(map(cut, inputs)), out_specs=cut(output), check_vma=False)

  def checked(*arrays):
    for letter, size in ((letter, size) for letters, x in zip(inputs, arrays) for letter, size in zip(letters, x.shape)):
      parts = _parts(RULES[letter], dict(mesh.shape))
      if size % parts:
        raise ShardingError(f'an attention kernel on {letter}={size}, which {parts} parts of the mesh do not divide. Use '
                            'another mesh, or --attention xla.')
    return mapped(*arrays)
  return checked
