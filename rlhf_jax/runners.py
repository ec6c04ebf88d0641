"""How pure functions meet devices: on one, mapped over many (`pmap`), or sharded over a mesh (`jit`).

The only file that makes meshes and knows of pmap. A function is written once, over the arrays that a device sees, and says
for each argument and result which of three kinds it is: 'params' (parameters, optimizer state: laid out by the partition
rules), 'batch' (first axis B, split over devices), 'same' (keys, metrics: the same on every device). Between calls all
arrays have their full, logical shape, whatever the runner.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.ahead import Ahead
from rlhf_jax.errors import ConfigError, ShardingError
from rlhf_jax.model import partition

Kind = Literal['params', 'batch', 'same']


@dataclasses.dataclass(frozen=True)
class Call:
  """A call of a compiled function, without its arrays: enough to ask what it needed."""
  name: str
  lower: Callable
  structure: Any
  leaves: list[tuple]  # shape, dtype and sharding of each array

  def memory(self):
    """Bytes of its arguments on a device, and of what it needs beside them."""
    args = jax.tree.unflatten(self.structure, [
      jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
      for shape, dtype, sharding in self.leaves])
    stats = self.lower(*args).compile().memory_analysis()
    results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    return stats.argument_size_in_bytes, stats.temp_size_in_bytes + results


@dataclasses.dataclass(frozen=True, eq=False)
class Runner:
  """Compiles, places and fetches. Made by `single`, `pmapped` or `sharded`; `axis_name` goes to the functions it runs."""
  name: str
  mesh: Mesh
  rules: dict[str, Any]
  axis_name: str | None = None
  constrains: bool = False  # whether activations are pinned to the mesh inside the functions
  ahead: Ahead = dataclasses.field(default_factory=Ahead, repr=False)  # compiles programs before they are called
  calls: collections.deque[Call] = dataclasses.field(  # the last one
    default_factory=functools.partial(collections.deque, maxlen=1), repr=False)
  _known: dict = dataclasses.field(default_factory=dict, repr=False)  # shardings already worked out, by structure

  @property
  def part(self):
    """(number, count): which of how many equal parts of a batch this process brings, namely the rows of its devices."""
    n, here = self.batch_parts, jax.process_index()
    rows = NamedSharding(self.mesh, PartitionSpec(self.rules['B'])).devices_indices_map((n,))
    mine = sorted({index[0].indices(n)[0] for device, index in rows.items() if device.process_index == here})
    if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine) or n % len(mine):
      raise ShardingError(f'process {here} has the parts {mine} of {n} of a batch, which is no equal share. Choose data x '
                          f'fsdp as a multiple of the {jax.process_count()} processes, or a divisor.')
    return mine[0] // len(mine), n // len(mine)

  @property
  def batch_parts(self):
    """Into how many parts a batch is cut."""
    axes = self.rules['B']
    return math.prod(self.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))

  def shardings(self, tree, kind: Kind):
    """NamedSharding of every leaf of a tree of arrays or shapes; raises ShardingError where the mesh does not divide."""
    if kind == 'same':
      return jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), tree)
    found = partition.specs(tree, dict(self.mesh.shape), self.rules)
    return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), found, is_leaf=_is_spec)

  def place(self, tree, kind: Kind):
    """The tree on the devices of this runner; arrays that lie there already are not copied, shapes learn where they would.

    Of a batch each process passes its own `part` of the rows; all else is the same in every process.
    """
    leaves, structure = jax.tree.flatten(tree)
    shapes = tuple(self._whole_shape(leaf, kind) for leaf in leaves)
    known = structure, shapes, kind
    if known not in self._known:
      whole = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
      self._known[known] = jax.tree.leaves(self.shardings(jax.tree.unflatten(structure, whole), kind))
    placed = [leaf if getattr(leaf, 'sharding', None) == sharding else _put(leaf, sharding, shape)
              for leaf, shape, sharding in zip(leaves, shapes, self._known[known], strict=True)]
    return jax.tree.unflatten(structure, placed)

  def _whole_shape(self, leaf, kind):
    """The shape of an array of which, where it is a batch, this process may hold a part only."""
    shape = np.shape(leaf)
    if kind != 'batch' or jax.process_count() == 1 or not _is_local(leaf):
      return shape
    return shape[0] * self.part[1], *shape[1:]

  def copy(self, tree):
    """A tree of arrays in buffers of its own, where they are: what a frozen model needs before its source is donated."""
    return jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=jax.tree.map(lambda x: x.sharding, tree))(tree)

  def fetch(self, tree):
    """The tree as numpy arrays of full shape, in every process."""
    here = lambda x: x if _is_local(x) or x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(jax.tree.map(here, tree))

  def initialise(self, make, *args):
    """make(*args), a tree of 'params', born sharded: no device ever holds the whole of it."""
    whole = NamedSharding(self.mesh, PartitionSpec())
    if not whole.is_fully_addressable:                                           # each process has made keys of its own
      args = jax.tree.map(lambda x: _put(x, whole, np.shape(x)) if _is_local(x) else x, args)
    shardings = self.shardings(jax.eval_shape(make, *args), 'params')
    made = jax.jit(make, out_shardings=shardings)(*args)
    return jax.block_until_ready(made)  # what does not fit is said here, and not where it is used

  def abstract(self, make, *args):
    """Shapes, dtypes and shardings of make(*args), a tree of 'params', of which nothing is computed: to restore onto."""
    shapes = jax.eval_shape(make, *args)
    return jax.tree.map(lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                        shapes, self.shardings(shapes, 'params'))

  def compile(self, fn, *, inputs: tuple[Kind, ...], outputs: tuple[Kind, ...] | Kind, donate: tuple[int, ...] = ()):
    """fn, compiled for this runner's devices. Arguments are placed where they are not yet; those of `donate` are given up.

    The result has `.trace(*args)` and `.lower(*args)`, to read the program: they take shapes too, of arrays that need not
    exist, on devices that need not be here.
    """
    name = _name(fn)
    if self.axis_name is not None:
      fn = self._mapped(fn, inputs, outputs)

    def pinned(*args):
      result = fn(*args)
      if isinstance(outputs, str):
        return self._pin(result, outputs)
      return tuple(self._pin(tree, kind) for tree, kind in zip(result, outputs, strict=True))

    pinned.__name__ = name
    jitted = jax.jit(pinned, donate_argnums=donate)

    def placed(method, *args):
      args = tuple(self.place(tree, kind) for tree, kind in zip(args, inputs, strict=True))
      if method is jitted:
        self.ahead.wait(args)
        leaves, structure = jax.tree.flatten(args)
        of_each = [(x.shape, x.dtype, x.sharding) for x in leaves]
        self.calls.append(Call(name, run.lower, structure, of_each))
      with self._laid_out() if self.constrains else contextlib.nullcontext():
        return method(*args)

    run = functools.partial(placed, jitted)
    run.trace, run.lower = functools.partial(placed, jitted.trace), functools.partial(placed, jitted.lower)
    return run

  @contextlib.contextmanager
  def _laid_out(self):
    with jax.set_mesh(self.mesh), partition.using(self.rules):
      yield

  def _pin(self, tree, kind):
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, self.shardings(tree, kind))

  def _mapped(self, fn, inputs, outputs):
    """fn under pmap: a batch goes in and comes out as [devices, B / devices, ...], everything else whole."""
    if jax.process_count() > 1:
      return self._mapped_by_all_processes(fn, inputs, outputs)
    n, axis = self.mesh.size, {'params': None, 'same': None, 'batch': 0}
    out_axes = axis[outputs] if isinstance(outputs, str) else tuple(axis[kind] for kind in outputs)
    mapped = jax.pmap(fn, axis_name=self.axis_name, in_axes=tuple(axis[kind] for kind in inputs), out_axes=out_axes,
                      devices=list(self.mesh.devices.flat))
    split = lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:])
    join = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def whole(*args):
      result = mapped(*(jax.tree.map(split, tree) if kind == 'batch' else tree for tree, kind in zip(args, inputs)))
      if isinstance(outputs, str):
        return jax.tree.map(join, result) if outputs == 'batch' else result
      return tuple(jax.tree.map(join, tree) if kind == 'batch' else tree for tree, kind in zip(result, outputs))
    return whole

  def _mapped_by_all_processes(self, fn, inputs, outputs):
    """The same, said as what pmap is made of: pmap itself takes a process's own part, not arrays of full shape."""
    spec = lambda kind: PartitionSpec(self.axis_name) if kind == 'batch' else PartitionSpec()
    out_specs = spec(outputs) if isinstance(outputs, str) else tuple(map(spec, outputs))
    return jax.shard_map(fn, mesh=self.mesh, in_specs=tuple(map(spec, inputs)), out_specs=out_specs, check_vma=False)


def _name(fn):
  """What profiles and messages call a function."""
  return getattr(fn, 'func', fn).__name__


def _is_local(x):
  """Whether this process has the whole of x: a host array, or one on its own devices."""
  return not isinstance(x, jax.Array) or x.is_fully_addressable


def _put(x, sharding, shape):
  """x, or this process's part of an array of that shape, on the devices of a sharding."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
  if sharding.is_fully_addressable or not _is_local(x):
    return jax.device_put(x, sharding)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = jax.random.key_data(x)
    return jax.random.wrap_key_data(_put(data, sharding, data.shape), impl=jax.random.key_impl(x))
  if np.shape(x) != shape:
    return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)
  return jax.make_array_from_callback(shape, sharding, lambda index: np.asarray(x)[index])


def _is_spec(x):
  return isinstance(x, PartitionSpec)


def _mesh(shape, devices):
  return Mesh(np.asarray(devices).reshape(tuple(shape.values())), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


_WHOLE = {name: tuple(None for _ in rule) if isinstance(rule, tuple) else None for name, rule in partition.RULES.items()}


def single(device=None):
  """Everything on one device: the first, unless another is given."""
  if jax.process_count() > 1:
    raise ShardingError(f'one device, but {jax.process_count()} processes. Pass --mesh.runner sharded or pmap.')
  return Runner('single', _mesh({'data': 1}, [device or jax.devices()[0]]), _WHOLE | {'B': 'data'})


def pmapped(devices=None):
  """Parameters whole on every device, the batch split over all, gradients summed by `psum` over the axis 'data'."""
  devices = jax.devices() if devices is None else devices
  return Runner('pmapped', _mesh({'data': len(devices)}, devices), _WHOLE | {'B': 'data'}, axis_name='data')


def sharded(data=None, fsdp=1, tensor=1, rules=None, devices=None):
  """Parameters and optimizer state cut over fsdp x tensor, the batch over data x fsdp; XLA inserts the collectives.

  `data` None takes the devices that are left. `rules` changes entries of `partition.RULES`.
  """
  devices = jax.devices() if devices is None else devices
  if data is None:
    data = max(1, len(devices) // max(1, fsdp * tensor))
  if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != len(devices):
    raise ShardingError(f'a mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} devices, '
                        f'but there are {len(devices)}. Choose sizes whose product is {len(devices)}.')
  unknown = set(rules or {}) - set(partition.RULES)
  if unknown:
    raise ConfigError(f'partition rules for {sorted(unknown)}, which no array here has. Known: {sorted(partition.RULES)}.')
  mesh = _mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor}, devices)
  return Runner('sharded', mesh, _changed_rules(rules or {}, mesh), constrains=True)


def largest_fsdp(params, ways, tensor=1):
  """The largest divisor of `ways` into which the partition rules can cut these parameters along the
  model width, beside `tensor`; 1 where none can.
  """
  for fsdp in range(ways, 1, -1):
    if ways % fsdp == 0 and _divides(params, {'data': 1, 'fsdp': fsdp, 'tensor': tensor}):
      return fsdp
  return 1


def _divides(params, sizes):
  try:
    partition.specs(params, sizes)
  except ShardingError:
    return False
  return True


def _changed_rules(changes, mesh):
  """partition.RULES with changes; a change of V or D also undoes the special rule of the embedding."""
  if 'B' in changes:
    raise ConfigError(f"a partition rule for B ({changes['B']!r}). A batch is always split over data x fsdp: size the mesh.")
  for name, rule in changes.items():
    axes = [axis for entry in (rule if isinstance(rule, tuple) else (rule,))
            for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis is not None]
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown:
      raise ConfigError(f'the partition rule for {name} names the mesh axis {unknown[0]!r}. '
                        f'Known: {", ".join(mesh.axis_names)}.')
  merged = partition.RULES | changes
  if {'V', 'D'} & set(changes) and 'embedding_VD' not in changes:
    del merged['embedding_VD']
  return merged
