"""What a run says about itself: a line of JSON per step, TensorBoard, W&B if asked for, one live line of console.

`metrics.jsonl` is the truth, and a resumed run makes it what an uninterrupted one would have written: write a step's
metrics and samples before its checkpoint, and after restoring step k call `truncate_after(k)`. Absent on purpose: what
is measured (losses and stages say that) and plots. Next: the stages.
"""

import importlib
import json
import math
import os
import pathlib
import secrets
import time

import jax
import rich.console
import rich.progress
import rich.table
import tensorboardX

from rlhf_jax.errors import ConfigError, DataError
from rlhf_jax.processes import is_first


def values(metrics):
  """{name: float} of a dict of Means and Maxes, fetched from the devices at once."""
  return {name: float(x) for name, x in jax.device_get({name: x.value() for name, x in metrics.items()}).items()}


class JsonLines:
  """A file of one JSON object a line, each with its 'step', that a kill at any moment leaves readable.

  Of several processes the first writes it.
  """

  def __init__(self, path):
    self.path = pathlib.Path(path)

  def append(self, rows):
    """Writes the rows in one go. NaN and infinities, which JSON does not have, become null."""
    if not is_first():
      return
    lines = b''.join(json.dumps(_plain(row), ensure_ascii=False).encode(errors='replace') + b'\n' for row in rows)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with self.path.open('ab') as file:
      file.truncate(self._complete_size())
      file.write(lines)

  def truncate_after(self, step):
    """Drops all rows of later steps, and what a kill left half-written; the other lines keep their bytes."""
    if is_first() and self.path.exists():
      kept = [line for line, row in self._lines() if row['step'] <= step]
      beside = self.path.with_name(self.path.name + '.tmp')
      beside.write_bytes(b''.join(line + b'\n' for line in kept))
      os.replace(beside, self.path)

  def rows(self):
    """All complete rows; none if there is no file."""
    return [row for _, row in self._lines()] if self.path.exists() else []

  def _lines(self):
    """(bytes, row) of every complete line."""
    for number, line in enumerate(self.path.read_bytes().split(b'\n')[:-1], 1):
      try:
        yield line, json.loads(line)
      except ValueError as error:
        raise DataError(f'{self.path} line {number} is not JSON ({error}). Only its last line may be incomplete. '
                        'Delete the line, or start again in another directory.') from error

  def _complete_size(self):
    """Bytes up to the end of the last complete line. The file is read only where a kill left half of one."""
    if not self.path.exists() or not self.path.stat().st_size:
      return 0
    with self.path.open('rb') as file:
      file.seek(-1, os.SEEK_END)
      if file.read() == b'\n':
        return file.tell()
    return self.path.read_bytes().rfind(b'\n') + 1


def _plain(x):
  """x with numbers of numpy and JAX as Python's, and None for what is not finite."""
  if isinstance(x, dict):
    return {key: _plain(value) for key, value in x.items()}
  if isinstance(x, list | tuple):
    return [_plain(value) for value in x]
  if hasattr(x, 'tolist'):
    return _plain(x.tolist())
  return None if isinstance(x, float) and not math.isfinite(x) else x


def _metrics(directory):
  return JsonLines(pathlib.Path(directory) / 'metrics.jsonl')


def _samples(directory):
  return JsonLines(pathlib.Path(directory) / 'samples.jsonl')


def read_metrics(directory):
  """The rows of metrics.jsonl: {'step', 'time' in seconds since the run began, name: value or None if not finite}."""
  return _metrics(directory).rows()


def append_samples(directory, step, rows):
  """Adds generated texts and whatever is known of them, one dict each, to samples.jsonl."""
  _samples(directory).append({'step': step} | row for row in rows)


def read_samples(directory):
  """The rows of samples.jsonl, each with its 'step'."""
  return _samples(directory).rows()


class MetricsLog:
  """The numbers of one stage, written to its directory and, where wanted, to TensorBoard and W&B.

  `wandb` holds the arguments of `wandb.init`, e.g. {'project': 'rlhf'}; None leaves W&B alone. A
  resumed stage goes on in its W&B run: the id is that of the arguments, or else one that is kept in
  the directory. Of the steps that are done again after a kill, W&B keeps what it had. ConfigError
  where W&B is asked for but not installed.
  """

  def __init__(self, directory, *, tensorboard=True, wandb=None):
    self.directory = pathlib.Path(directory)
    self._tensorboard, self._board, self._purge_step = tensorboard, None, None
    self._wandb = None if wandb is None or not is_first() else _start_wandb(self.directory, wandb)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()

  def truncate_after(self, step):
    """Forgets metrics and samples of later steps (-1: all), for the run goes on from here. Comes before any `write`."""
    _metrics(self.directory).truncate_after(step)
    _samples(self.directory).truncate_after(step)
    self._purge_step = step + 1

  def write(self, step, values, *, wall_s):
    """Adds {name: float} of one step; `wall_s` are the seconds since the run began. On disk when it returns."""
    _metrics(self.directory).append([{'step': step, 'time': round(wall_s, 3)} | values])
    if self._tensorboard and is_first():
      # Not before the first write, so that it knows from where on TensorBoard is to hide what a killed run wrote. The
      # process's number keeps two files of one second apart, since tensorboardX would overwrite the first.
      self._board = self._board or tensorboardX.SummaryWriter(
        str(self.directory / 'tensorboard'), purge_step=self._purge_step, flush_secs=10,
        filename_suffix=f'.{os.getpid()}')
      for name, value in values.items():
        self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)

  def close(self):
    """Writes out what TensorBoard and W&B still hold."""
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def _start_wandb(directory, arguments):
  try:
    module = importlib.import_module('wandb')
  except ImportError as error:
    raise ConfigError('W&B was asked for but is not installed. Run: pip install "rlhf-jax[wandb]", or leave it out; '
                      'metrics.jsonl has the same numbers.') from error
  directory.mkdir(parents=True, exist_ok=True)
  if arguments.get('id') is None:
    arguments = arguments | {'id': _wandb_id(directory / 'wandb_id')}
  return module.init(**{'dir': str(directory), 'resume': 'allow'} | arguments)


def _wandb_id(path):
  """The id in that file, or a new one that is kept there, whole or not at all."""
  if not path.exists():
    unfinished = path.with_suffix('.unfinished')
    unfinished.write_text(secrets.token_hex(8))
    unfinished.rename(path)
  return path.read_text()


class Progress:
  """One line on how far a stage is: live on a terminal; else printed at most every `every_s` seconds, and at the end.

      sft  120/300  loss 2.31  9.1k tokens/s  0:00:12 left

  `start` is the step that a resumed run begins at.
  """

  def __init__(self, name, *, total, start=0, console=None, every_s=10.0):
    self.name, self.total, self.every_s = name, total, every_s
    self._console = console or rich.console.Console()
    self._step, self._line, self._printed_at, self._began = start, '', -math.inf, time.monotonic()
    self._first = None                                   # (step, time) of the first update: compiling does not count
    self._bar = _bar(self._console) if self._console.is_terminal else None
    self._task = self._bar and self._bar.add_task(name, total=total, completed=start, line=f'{start}/{total}')

  def __enter__(self):
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *error):
    if self._bar:
      self._bar.stop()
    elif self._line:
      self._print()

  def update(self, step, values, rate=None):
    """`step` steps are done. Shows {name: float} and `rate`, a pair like (9100, 'tokens/s')."""
    self._step, now = step, time.monotonic()
    if self._first is None:
      self._first = step, now
      self.note(f'{self.name}: {now - self._began:.1f} s to the first step, compiling included')
    parts = [f'{step}/{self.total}', *(f'{name} {compact(value)}' for name, value in values.items())]
    parts += [f'{compact(rate[0])} {rate[1]}'] if rate else []
    self._line = '  '.join(parts + self._left(now))
    if self._bar:
      self._bar.update(self._task, completed=step, line=self._line)
    elif now - self._printed_at >= self.every_s:
      self._print()
      self._printed_at = now

  def note(self, text):
    """Prints a line of its own, above the live one."""
    self._console.print(text, markup=False, highlight=False, soft_wrap=True)

  def _print(self):
    self.note(f'{self.name}  {self._line}')
    self._line = ''                                                                  # so that it is printed once

  def _left(self, now):
    step, then = self._first
    if self._step == step:
      return []
    seconds = round((now - then) / (self._step - step) * (self.total - self._step))
    return [f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left']


class Counter:
  """How far a piece of long work is that is no stage: a bar on a terminal; else a line every
  `every_s` seconds.
  """

  def __init__(self, name, total, *, console=None, every_s=10.0):
    self.name, self.total, self.every_s = name, total, every_s
    self._console = console or rich.console.Console()
    self._printed_at = time.monotonic()
    self._bar = (rich.progress.Progress(console=self._console, transient=True)
                 if self._console.is_terminal else None)
    self._task = self._bar and self._bar.add_task(name, total=total)

  def __enter__(self):
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *error):
    if self._bar:
      self._bar.stop()

  def update(self, done):
    """`done` of all are done."""
    if self._bar:
      self._bar.update(self._task, completed=done)
    elif time.monotonic() - self._printed_at >= self.every_s:
      self._console.print(f'{self.name} {done:,}/{self.total:,}', markup=False, highlight=False,
                          soft_wrap=True)
      self._printed_at = time.monotonic()


def _bar(console):
  line = rich.progress.TextColumn('{task.fields[line]}', markup=False,
                                  table_column=rich.table.Column(no_wrap=True, overflow='ellipsis'))
  return rich.progress.Progress('{task.description}', rich.progress.BarColumn(bar_width=20), line, console=console,
                                refresh_per_second=4)


def compact(number):
  """Three significant digits, with k, M, G or T for thousands.

  >>> [compact(x) for x in (2.3149, 0.00123, 150, 9100, 999.9, 123456789, math.inf)]
  ['2.31', '0.00123', '150', '9.1k', '1k', '123M', 'inf']
  """
  for size, suffix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if 0.9995 * size <= abs(number) < math.inf:                                  # what would be rounded up to it too
      return f'{number / size:.3g}{suffix}'
  return f'{number:.3g}'
