"""One atomic step on disk holds all that a stage's future depends on: a pytree of arrays, and small things as JSON.

Orbax writes a step under a temporary name while training goes on and renames it at the end, so a crash leaves the older
steps as they were. It does not notice a flipped byte, so a step also holds a record of its leaves: shapes and dtypes,
which tell another model from a damaged file before anything is read, and digests, which no sharding changes.
Absent on purpose: choosing the best step, and restoring onto other shapes or dtypes. Next: the stages.
"""

import collections
import contextlib
import json
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlhf_jax import processes
from rlhf_jax.errors import CheckpointError, ConfigError, DamagedError

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


class _Manager(ocp.CheckpointManager):
  """One that leaves it to `processes.stop_asked` to ask whether to stop: Orbax would ask by numbers of its own."""

  def reached_preemption(self, step):
    return False


class Checkpoints:
  """The steps saved in a directory, of which the newest `keep` stay. Leaving the `with` waits until they are there."""

  def __init__(self, directory, keep=2):
    if keep < 1:
      raise ConfigError(f'keep is {keep}. A directory keeps at least one checkpoint. Pass 2 to survive a damaged one.')
    self.directory = _absolute(directory)
    self._damaged = []
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    with _writing(self.directory):
      self._manager = _Manager(self.directory, options=options)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    try:
      self.wait()
    finally:
      self._manager.close()

  def latest(self):
    """The newest complete step, or None. A step that `restore` has found damaged does not count. All processes call it."""
    newest = processes.first_says(max(set(_steps(self.directory)) - set(self._damaged), default=-1))
    return None if newest < 0 else newest

  def save(self, step, state, meta):
    """Starts writing `state` (a pytree of arrays) and `meta` (JSON) as one step, and returns when it is safe to donate.

    Waits for the previous step to be on disk, so none is skipped. `step` is newer than every one there. Raises
    CheckpointError where this or the previous step cannot be written.
    """
    self.wait()
    latest = self.latest()
    if latest is not None and step <= latest:
      raise CheckpointError(f'{self.directory} has step {latest} already, so step {step} would not be the newest. '
                            'Steps are saved in ascending order, each once. Resume from the newest, or use another '
                            'directory.')
    record = ocp.args.JsonSave(_record(state, meta))
    with _writing(self.directory):
      for damaged in self._damaged:                    # not before there is something newer to be saved in its place
        self._manager.delete(damaged)
      self._damaged = []
      self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=record))

  def wait(self):
    """Returns when the last save is on disk; raises CheckpointError if it could not be written."""
    with _writing(self.directory):
      self._manager.wait_until_finished()

  def restore(self, abstract, step=None):
    """(state, meta) of the newest step, or the one given, bit for bit, onto the shardings of `abstract`.

    `abstract` is a tree of `jax.Array` or `jax.ShapeDtypeStruct`. If the newest step is damaged it warns and takes the
    one before; the damaged one is removed at the next save. All processes take the same. Raises CheckpointError where no
    step is left, or where names, shapes or dtypes are of another model, which no older step would mend.
    """
    self.wait()
    if step is not None:
      return _read(self.directory, step, abstract)
    self._damaged, newest = [], _newest(self.directory)
    while newest is not None:
      try:
        return _read(self.directory, newest, abstract)
      except DamagedError as error:
        warnings.warn(f'{error} Trying the step before it.', stacklevel=2)
        self._damaged.append(newest)
        newest = self.latest()
    damaged, self._damaged = self._damaged, []
    raise CheckpointError(f'{self.directory} has no step that can be read; steps {damaged} are damaged. Restore the '
                          'directory from a backup, or start again in another one.')


def restore_part(directory, abstract, step=None):
  """The leaves of `abstract`, a part of the tree that was saved, of the newest step or the one given; no other is read.

  The part has the nesting of the whole: {'params': {'backbone': ...}}. Where it is damaged this raises CheckpointError
  and takes no older step by itself: who inherits parameters should know which.
  """
  return _read(directory, _newest(directory) if step is None else step, abstract, part=True)[0]


def read_meta(directory, step=None):
  """The `meta` of the newest step, or of the one given. All processes call it."""
  return _read_record(directory, _newest(directory) if step is None else step)['meta']


def _digests(leaves):
  """{name: digest} of leaves, numpy: in one program for all that lie on the same devices, instead of one a shape."""
  by_devices = collections.defaultdict(dict)
  for name, x in leaves.items():
    by_devices[frozenset(x.sharding.device_set) if isinstance(x, jax.Array) else None][name] = x
  return jax.device_get({name: each for group in by_devices.values() for name, each in _all_digests(group).items()})


@jax.jit
def _all_digests(leaves):
  return {name: digest(x) for name, x in leaves.items()}


@jax.jit
def digest(x):
  """uint32 of an array's bits and where they lie, the same for every sharding.

  A sum over words of MurmurHash3's 32-bit finaliser, applied to the word plus a multiple of its position. The finaliser
  is one to one, so a change within one word always changes the sum; others go unnoticed once in 2^32. In a plain
  position-weighted sum whole pages of equal floats cancel, because their low bits are 0.
  """
  bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
  position = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(bits.shape):
    position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  word = bits.astype(jnp.uint32) + position * np.uint32(0x9E3779B9)
  word = (word ^ word >> 16) * np.uint32(0x85EBCA6B)
  word = (word ^ word >> 13) * np.uint32(0xC2B2AE35)
  return (word ^ word >> 16).sum(dtype=jnp.uint32)


def _record(state, meta):
  """`meta` and what each leaf of `state` is, as plain JSON, with a checksum over itself."""
  digests = _digests(_leaves(state))
  leaves = {name: {'shape': x.shape, 'dtype': str(x.dtype), 'digest': int(digests[name])}
            for name, x in _leaves(state).items()}
  record = json.loads(json.dumps({'meta': meta, 'leaves': leaves}))
  return record | {'checksum': _checksum(record)}


def _checksum(record):
  return zlib.crc32(json.dumps([record['meta'], record['leaves']], sort_keys=True).encode())


def _read_record(directory, step):
  where = _absolute(directory) / str(step)
  if step not in _steps(directory):
    raise CheckpointError(f'{directory} has no complete step {step}. It has {_steps(directory)}. Ask for one of these.')
  try:
    record = ocp.JsonCheckpointHandler().restore(where / 'record')
    intact = record['checksum'] == _checksum(record)
  except (OSError, ValueError, KeyError) as error:
    raise DamagedError(f'Checkpoint {where} is damaged: its record cannot be read ({error}).') from error
  if not intact:
    raise DamagedError(f'Checkpoint {where} is damaged: its record is not the one that was written.')
  return record


def _read(directory, step, abstract, part=False):
  """(tree, meta) of a step, held against its record before reading (is it this model?) and after (is it intact?).

  What is damaged for one of several processes, or not there, is so for all.
  """
  where, found, error = _absolute(directory) / str(step), None, None
  try:
    found = _read_mine(directory, step, abstract, part)
  except CheckpointError as raised:
    error = raised
  mine = 0 if error is None else 1 if isinstance(error, DamagedError) else 2
  worst = processes.largest(mine)
  if worst == 1 > mine:
    raise DamagedError(f'Checkpoint {where} is damaged: another process cannot read it.')
  if worst == 2 > mine:
    raise CheckpointError(f'Checkpoint {where} is of no use to another process. Look at what that one says.')
  if error is not None:
    raise error
  tree, record = found
  for name, value in _digests(_leaves(tree)).items():
    if int(value) != record['leaves'][name]['digest']:
      raise DamagedError(f'Checkpoint {where} is damaged: {name} has other bits than were saved.')
  return tree, record['meta']


def _read_mine(directory, step, abstract, part):
  """(tree, record) of a step: what this process is to hold of it. Waits for no other process, as a Checkpointer would."""
  where, record = _absolute(directory) / str(step), _read_record(directory, step)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), abstract)
  _check_same_model(where, record['leaves'], _leaves(abstract), part)
  how = ocp.checkpoint_utils.construct_restore_args(abstract)
  try:
    return ocp.PyTreeCheckpointHandler().restore(
      where / 'state', args=ocp.args.PyTreeRestore(item=abstract, restore_args=how, partial_restore=part)), record
  except Exception as error:
    # Names, shapes and shardings were right, so it is the file. Orbax has a bare Exception for a truncated one.
    if type(error) is not Exception and not isinstance(error, (OSError, ValueError, KeyError)):
      raise
    raise DamagedError(f'Checkpoint {where} is damaged: it cannot be read ({_short(error)}).') from error


def _check_same_model(where, saved, wanted, part):
  """CheckpointError that names the first leaf that is missing, differs or is too much; else, all is as wanted."""
  does = 'It is a checkpoint of another model. Use the settings that it was saved with, or another directory.'
  for name, leaf in wanted.items():
    if name not in saved:
      raise CheckpointError(f'Checkpoint {where} has no {name}, which is needed here. {does}')
    has, needs = (tuple(saved[name]['shape']), saved[name]['dtype']), (leaf.shape, str(leaf.dtype))
    if has != needs:
      raise CheckpointError(f'Checkpoint {where} has {name} of shape {has[0]} and dtype {has[1]}, where {needs[0]} and '
                            f'{needs[1]} are needed. {does}')
    if leaf.sharding is not None:
      leaf.sharding.shard_shape(leaf.shape)          # JAX's ValueError where a mesh does not divide: not a damaged file
  extra = [name for name in saved if name not in wanted]
  if extra and not part:
    raise CheckpointError(f'Checkpoint {where} has {extra[0]}, for which there is no place here. {does}')


@contextlib.contextmanager
def _writing(directory):
  """CheckpointError for what cannot be written. Orbax's writer reports a full disk as a ValueError."""
  try:
    yield
  except (OSError, ValueError) as error:
    latest = max(_steps(directory), default=None)
    untouched = 'It has no complete step yet.' if latest is None else f'Step {latest} there is complete and untouched.'
    raise CheckpointError(f'Checkpoints cannot be written to {directory} ({_short(error)}). {untouched} Free some '
                          'space, or choose a directory that can be written, and start the same run again.') from error


def _short(error):
  text = ' '.join(str(error).split())
  return text if len(text) <= 300 else f'{text[:100]} ... {text[-200:]}'


def _leaves(tree):
  """{'params/backbone/norm_D': leaf}: dict keys and field names alike, so a dict can stand for a dataclass."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _absolute(directory):
  path = epath.Path(directory)
  return path if '://' in str(directory) else path.absolute()


def _steps(directory):
  return sorted(ocp.utils.checkpoint_steps(_absolute(directory)))


def _newest(directory):
  """The newest step that the first process sees. All call it."""
  newest = processes.first_says(max(_steps(directory), default=-1))
  if newest < 0:
    raise CheckpointError(f'{directory} has no complete checkpoint. Run the stage that writes it first.')
  return newest
