"""Programs that are compiled before they are called, by threads beside the one that trains.

What a thread compiles lands in JAX's persistent compilation cache; the call that needs it traces it
again and finds it there. A call whose program is being compiled at that moment waits for it, and
one whose program has not been begun compiles it itself. What goes wrong here is said in a line, and
the run compiles the program when it needs it. Which programs: `planner.programs`. Next: `runners.py`.
"""

import atexit
import collections
import dataclasses
import os
import sys
import threading
import weakref
from collections.abc import Callable

import jax

_MOST_AT_ONCE = 4  # each compilation has threads of its own where it can


def idle_threads(platform, asked=None, cores=None):
  """How many programs to compile beside a run: as many as half of the cores.

  None at all on a CPU, which needs its cores for the run; with several processes, which share what
  they measure of GPU kernels and so wait for each other; and without the persistent cache. `asked`
  True or False overrules the first.
  """
  cache = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
  wanted = platform != 'cpu' if asked is None else asked
  if not wanted or not cache or jax.process_count() > 1:
    return 0
  cores = _cores() if cores is None else cores
  return min(_MOST_AT_ONCE, max(cores // 2, 1 if asked else 0))


def _cores():
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1  # of macOS and Windows


@dataclasses.dataclass(eq=False)
class _Job:
  name: str
  trace: Callable
  done: threading.Event = dataclasses.field(default_factory=threading.Event)


class Ahead:
  """A queue of programs, and the threads that compile them. It does nothing before `begin`."""

  def __init__(self):
    self._lock = threading.Lock()
    self._waiting = collections.deque()  # jobs that no thread has begun
    self._jobs = {}  # signature of the arguments -> a job whose program has not been called yet
    self._seen = set()  # signatures
    self._threads = self._at_once = 0
    _all.add(self)

  def begin(self, programs, at_once):
    """Compiles what `programs()` yields, with `.name`, `.args` and `.traced`, so many at once."""
    self._at_once = at_once
    if at_once:
      self._start(self._collect, programs)

  @property
  def is_on(self):
    """Whether there are threads to compile."""
    return self._at_once > 0

  def add(self, name, args, trace, first=False):
    """Has trace(), a traced program of arguments of these shapes, compiled; `first`: next."""
    key = _signature(args)
    with self._lock:
      if not self.is_on or key in self._seen:
        return
      self._seen.add(key)
      job = self._jobs[key] = _Job(name, trace)
      (self._waiting.appendleft if first else self._waiting.append)(job)
      starts = self._threads < self._at_once
      self._threads += starts
    if starts:
      self._start(self._work)

  def wait(self, args):
    """Returns when no thread is compiling a program of arguments of these shapes."""
    if not self.is_on:
      return
    with self._lock:
      self._seen.add(_signature(args))
      job = self._jobs.pop(_signature(args), None)
      if job in self._waiting:
        self._waiting.remove(job)
        job = None
    if job is not None:
      job.done.wait()

  def stop(self):
    """Begins no more; what is being compiled goes on."""
    with self._lock:
      self._at_once = 0
      self._waiting.clear()
      self._jobs.clear()

  def _start(self, do, *args):
    def run():
      try:
        do(*args)
      finally:
        _busy.discard(thread)
    thread = threading.Thread(target=run, daemon=True, name='compiling ahead')
    _busy.add(thread)
    thread.start()

  def _collect(self, programs):
    """Traces in a thread of its own, one program after another."""
    try:
      for program in programs():
        self.add(program.name, program.args, lambda program=program: program.traced)
        if not self.is_on:
          return
    except Exception as error:  # the run traces them too, and says it where it counts
      _say('the programs of later stages', error)

  def _work(self):
    while (job := self._next()) is not None:
      try:
        job.trace().lower().compile()
      except Exception as error:
        _say(job.name, error)
      finally:
        job.done.set()

  def _next(self):
    with self._lock:
      if self._waiting:
        return self._waiting.popleft()
      self._threads -= 1
      return None


def _signature(args):
  return tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(args))


def _say(what, error):
  first_line = (str(error).splitlines() or [''])[0][:200]
  print(f'{what}: not compiled ahead ({type(error).__name__}: {first_line}); it will be when it is '
        'needed', file=sys.stderr, flush=True)


_all = weakref.WeakSet()  # every Ahead
_busy = set()  # threads that trace or compile


def is_busy():
  """Whether a thread traces or compiles: a process that exits now would abort in its midst."""
  return bool(_busy)


@atexit.register
def _finish():
  for each in list(_all):
    each.stop()
  for thread in list(_busy):
    thread.join()
