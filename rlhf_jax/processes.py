"""Several processes that compute one run: how they find each other, wait for each other, and stop together.

On a TPU pod every host is a process. All run the same program and call the same compiled functions; the first alone
writes files and speaks. When one is lost, JAX's coordination service ends the others, after `lost_s` seconds at most, and
names it. Absent on purpose: which rows and weights a process holds (`runners.py`). Next: `roll_call.py`, `cli.py`.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from rlhf_jax import roll_call
from rlhf_jax.errors import ConfigError, ProcessError
from rlhf_jax.startup import prepare_process

# For the slowest thing that one process does while others wait, unless more is allowed: reading
# the data.
_MEET_S = 1800


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
  """How the processes of one run find each other."""
  coordinator: str | None = None  # None: one process; auto: as the TPU pod or SLURM says; HOST:PORT of process 0
  count: int | None = None  # HOST:PORT: how many processes there are
  index: int | None = None  # HOST:PORT: which of them this is, from 0
  join_s: int = 300  # seconds to wait until all have joined
  lost_s: int = 60  # seconds without a sign of life after which a process counts as lost, and the others end

  def __post_init__(self):
    explicit = self.coordinator not in (None, 'auto')
    if explicit and (self.count is None or self.index is None):
      raise ConfigError(f'--processes.coordinator {self.coordinator} without --processes.count and --processes.index. Say '
                        'how many processes there are and which of them this is, or pass --processes.coordinator auto.')
    if not explicit and (self.count, self.index) != (None, None):
      raise ConfigError(f'--processes.count {self.count} and --processes.index {self.index} without an address. Pass '
                        '--processes.coordinator HOST:PORT, the same for all, where process 0 runs.')
    if explicit and not 0 <= self.index < self.count:
      raise ConfigError(f'--processes.index {self.index} of --processes.count {self.count}. Indices go from 0 to count - 1.')
    if explicit and not roll_call.is_address(self.coordinator):
      raise ConfigError(f'--processes.coordinator {self.coordinator!r} is no address. Pass HOST:PORT, or auto on a TPU pod.')


@contextlib.contextmanager
def joined(config):
  """Inside, all processes of the run are there, only the first prints, and SIGTERM is noted for `stop_asked`.

  A machine that is taken away sends SIGTERM. With one process a second one ends it at once. Comes before any computing.
  """
  prepare_process()
  if config.coordinator is not None:
    _meet_all(config)
    if not is_first():
      sys.stdout = open(os.devnull, 'w')  # noqa: SIM115  for as long as the process lives
  elif threading.current_thread() is threading.main_thread():
    earlier = signal.signal(signal.SIGTERM, _note_stop)                         # with several, JAX's preemption service does
  try:
    yield
    roll_call.say_goodbye()
  finally:
    if config.coordinator is None and threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, earlier)
      _stop.clear()


def _meet_all(config):
  address, count, index = config.coordinator, config.count, config.index
  if address == 'auto':
    address, count, index = _detected(config.join_s)
  roll_call.hold(address, count, index, join_s=config.join_s, lost_s=config.lost_s)
  jax.distributed.initialize(address, count, index, initialization_timeout=config.join_s,
                             heartbeat_timeout_seconds=config.lost_s)


def _detected(join_s):
  """(address of process 0, count, index) as the TPU pod or SLURM says.

  JAX detects them in `jax.distributed.initialize`, but keeps them to itself.
  """
  try:
    found = ClusterEnv.auto_detect_unset_distributed_params(os.environ.get('JAX_COORDINATOR_ADDRESS'), None, None, None,
                                                            None, join_s)[:3]
  except (RuntimeError, OSError) as error:                                      # a host or a service that does not answer
    raise ProcessError(f'--processes.coordinator auto: {error}. Look whether that runs.') from error
  except ValueError as error:
    raise ConfigError(f'--processes.coordinator auto, but what this cluster says cannot be read ({error}). Look at its '
                      'variables, or pass HOST:PORT, --processes.count and --processes.index.') from error
  if None in found:
    raise ConfigError('--processes.coordinator auto, but nothing here says how many processes there are. On a TPU pod or '
                      'under SLURM it is found; elsewhere pass HOST:PORT, --processes.count and --processes.index.')
  if not roll_call.is_address(found[0]):
    raise ConfigError(f'--processes.coordinator auto finds {found[0]!r}, which is no address. Set JAX_COORDINATOR_ADDRESS '
                      'to HOST:PORT and JAX_COORDINATOR_PORT to a number, or neither.')
  return found


def are_several():
  """Whether the run has more processes than this one."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first():
  """Whether this process writes files and speaks."""
  return not are_several() or jax.process_index() == 0


def meet(name, wait_s=_MEET_S):
  """Returns when all processes are here; raises ProcessError where one does not come within
  `wait_s` seconds.
  """
  if not are_several():
    return
  try:
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=wait_s * 1000)
  except jax.errors.JaxRuntimeError as error:
    raise ProcessError(f'not all processes came to {name!r} ({str(error).splitlines()[0]}). Look at the output of the one '
                       'that did not, and start all of them again.') from error


def largest(number):
  """The largest of the ints that the processes pass. All call it."""
  return int(multihost_utils.process_allgather(np.int32(number)).max()) if are_several() else number


def first_says(number):
  """The int, or truth value, that the first process passes, in all of them. All call it.

  What depends on files is decided so: a shared file system may show processes different things, or one later.
  """
  return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if are_several() else number


def once(name, do, wait_s=_MEET_S):
  """do() in the first process alone; the others wait for it, so long. What it writes is there for
  all afterwards.

  Where it fails, the first process ends with the error, and the others with it.
  """
  if is_first():
    do()
  meet(name, wait_s)


def leave(status, wait_s=5):
  """Exits. From a run of several processes without the usual goodbyes: they would wait for the others, which wait for it.

  Those that leave too within `wait_s` seconds leave together. Where a lost process is the reason, JAX says so meanwhile.
  """
  if not are_several():
    sys.exit(status)
  try:
    ocp.multihost.get_barrier_sync_fn()(key='leave', timeout_ms=wait_s * 1000)
    roll_call.say_goodbye()
  except jax.errors.JaxRuntimeError:
    pass                                                                        # the others are busy, or gone
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_stop = threading.Event()  # whether this run has been asked to stop
_rounds = itertools.count(1)


def _note_stop(number, frame):
  _stop.set()
  signal.signal(signal.SIGTERM, signal.SIG_DFL)                                  # a second one ends at once


def stop_asked():
  """Whether to save and stop now: the same answer in all processes. All call it equally often, once a step at least.

  JAX agrees on it by the numbers that are passed here; nothing else may pass it others (see `checkpoint.py`).
  """
  if jax.distributed.is_initialized() and not _stop.is_set() and \
     multihost_utils.reached_preemption_sync_point(next(_rounds)):
    _stop.set()
  return _stop.is_set()
