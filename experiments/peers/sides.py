"""Sides of a comparison one after another on one device, each in a process with its own time limit.

A side that does not end in time is killed, with every process that it started in its group; one
that fails is shown with its error; the others go on. While one side has the device, the next
already imports its libraries and waits.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from experiments.peers.work import Work

_LEAST_S = 15  # with less time left, a side is not begun
_MODULE = 'experiments.peers.side'


class SideProcess:
  """The process of one side, which waits for `run`."""
  def __init__(self, work, folder, command=(sys.executable, '-m', _MODULE)):
    self.result, self.log_path = folder / 'result.json', folder / 'log.txt'
    with self.log_path.open('wb') as log:
      self.process = subprocess.Popen(
        [*command, work.to_json(), str(self.result)], stdin=subprocess.PIPE, stdout=log,
        stderr=subprocess.STDOUT, env=_environment(work, folder), start_new_session=True)

  def run(self, limit_s):
    """What it measured, and under 'error' why there is no more; it has ended when this returns."""
    with contextlib.suppress(BrokenPipeError):                   # it failed before its turn
      self.process.stdin.write(f'{limit_s}\n'.encode())
      self.process.stdin.flush()
    try:
      status = self.process.wait(limit_s)
    except subprocess.TimeoutExpired:
      return self._measured() | {'error': f'over {limit_s:.3g} s'}
    finally:
      self.kill()
    found = self._measured()
    if status == 0 or 'error' in found:
      return found or {'error': 'ended without a result'}
    return found | {'error': self._last_words(status)}

  def _measured(self):
    return json.loads(self.result.read_text()) if self.result.exists() else {}

  def kill(self):
    """Ends its whole process group, if there is anything left of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()

  def _last_words(self, status):
    ended = signal.Signals(-status).name if status < 0 else f'status {status}'
    lines = self.log_path.read_text(errors='replace').strip().splitlines()
    return f'ended with {ended}' + (f': {lines[-1].strip()[:300]}' if lines else '')


def _environment(work, folder):
  """The environment of a side: caches of compiled programs are its own, hence empty."""
  own = {'TORCHINDUCTOR_CACHE_DIR': str(folder / 'inductor'),
         'TRITON_CACHE_DIR': str(folder / 'triton'),
         'HF_HUB_OFFLINE': '1'}
  # JAX counts FLOPs in PyTorch's process too, where it must not take the GPU's memory.
  if work.device == 'cpu' or work.side != 'rlhf_jax':
    own['JAX_PLATFORMS'] = 'cpu'
  # JAX's share of the GPU, taken at once: by default three quarters.
  shared = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92'}
  return shared | dict(os.environ) | own


@dataclasses.dataclass(frozen=True)
class Row:
  """What is said of one workload of one side."""
  work: Work
  found: dict

  @property
  def seconds(self):
    """Median seconds of a round; None where there is none."""
    return self.found.get('seconds', {}).get('median')

  def to_json(self):
    """As plain JSON values."""
    work = {name: getattr(self.work, name) for name in
            ('side', 'workload', 'preset', 'title', 'tokens', 'device', 'dtype', 'compiled')}
    return work | self.found


def compare(works, limit_s, budget_s, say, clock=time.monotonic):
  """A Row of every Work, in their order; `say` hears of each as it comes.

  Each has `limit_s` seconds, all together `budget_s`.
  """
  began = clock()
  left_s = lambda: budget_s - (clock() - began)
  with tempfile.TemporaryDirectory(prefix='bench_peers-') as folder, contextlib.ExitStack() as stack:
    def start(i):
      own = pathlib.Path(folder) / str(i)
      own.mkdir()
      process = SideProcess(works[i], own)
      stack.callback(process.kill)
      return process

    rows, waiting = [], start(0) if works else None
    for i, work in enumerate(works):
      if left_s() < _LEAST_S:
        found = {'error': _no_time(left_s(), budget_s)}
      else:
        current = waiting
        waiting = start(i + 1) if i + 1 < len(works) else None
        found = current.run(min(limit_s, left_s()))
      rows.append(Row(work, found))
      say(rows[-1])
  return rows


def _no_time(left_s, budget_s):
  return (f'skipped: {max(0, left_s):.0f} s of --budget-s {budget_s:g} are left. Pass a larger one, '
          'or fewer workloads with --only')
