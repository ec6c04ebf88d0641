"""What a run writes about itself, what a resumed run makes of it, and what the console shows."""

import io
import json
import math
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from tensorboardX.proto.event_pb2 import Event

from rlhf_jax.errors import ConfigError, DataError
from rlhf_jax.metrics import (
  JsonLines,
  MetricsLog,
  Progress,
  append_samples,
  compact,
  read_metrics,
  read_samples,
  values,
)
from rlhf_jax.records import Max, Mean


def _events(directory):
  """Every TensorBoard event, file by file in order of their names: length, checksum, bytes, checksum."""
  for path in sorted((directory / 'tensorboard').iterdir()):
    content, start = path.read_bytes(), 0
    while start < len(content):
      size = int.from_bytes(content[start:start + 8], 'little')
      yield Event.FromString(content[start + 12:start + 12 + size])
      start += size + 16


def _run(directory, steps, resume=None):
  with MetricsLog(directory, tensorboard=False) as log:
    if resume is not None:
      log.truncate_after(resume)
    for step in steps:
      log.write(step, {'loss': 2.5 / step, 'kl': 0.1 * step}, wall_s=1.5 * step)
      append_samples(directory, step, [{'response': f'{step} “até”\u2028\n', 'score': step / 7}, {'response': ''}])


def test_values_divides_once():
  metrics = {'loss': Mean(jnp.float32(5), jnp.float32(2)), 'ratio': Max(np.float32(1.25)),
             'none': Mean(np.float32(0), np.float32(0))}
  assert values(metrics) == {'loss': 2.5, 'ratio': 1.25, 'none': 0.0}
  assert all(type(value) is float for value in values(metrics).values())


def test_a_line_per_step_is_on_disk_at_once(tmp_path):
  log = MetricsLog(tmp_path / 'sft', tensorboard=False)
  log.write(1, {'loss': 2.5, 'accuracy': np.float32(0.25)}, wall_s=0.12345)
  log.write(2, {'loss': math.nan, 'accuracy': -math.inf}, wall_s=1)
  lines = (tmp_path / 'sft' / 'metrics.jsonl').read_text().splitlines()
  assert lines == ['{"step": 1, "time": 0.123, "loss": 2.5, "accuracy": 0.25}',
                   '{"step": 2, "time": 1, "loss": null, "accuracy": null}']
  assert read_metrics(tmp_path / 'sft') == [json.loads(line) for line in lines]
  assert read_metrics(tmp_path / 'absent') == []


@pytest.mark.parametrize('torn', [b'', b'{"step": 5, "ti', b'{"step": 5}'], ids=['clean', 'half a line', 'no newline'])
def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path, torn):
  _run(tmp_path / 'whole', range(1, 9))
  _run(tmp_path / 'killed', range(1, 5))
  for name in ('metrics.jsonl', 'samples.jsonl'):
    with (tmp_path / 'killed' / name).open('ab') as file:
      file.write(torn)
  assert len(read_metrics(tmp_path / 'killed')) == 4
  _run(tmp_path / 'killed', range(4, 9), resume=3)
  for name in ('metrics.jsonl', 'samples.jsonl'):
    assert (tmp_path / 'killed' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
  assert [row['step'] for row in read_samples(tmp_path / 'killed')][:3] == [1, 1, 2]
  assert read_samples(tmp_path / 'killed')[0]['response'] == '1 “até”\u2028\n'


def test_starting_over_forgets_everything(tmp_path):
  _run(tmp_path, range(3, 5))
  with MetricsLog(tmp_path, tensorboard=False) as log:
    log.truncate_after(-1)
  assert read_metrics(tmp_path) == read_samples(tmp_path) == []


def test_half_a_line_is_not_glued_to_the_next(tmp_path):
  lines = JsonLines(tmp_path / 'x.jsonl')
  for torn, kept in ((b'{"st', []), (b'{"step": 1}\n{"st', [{'step': 1}])):
    lines.path.write_bytes(torn)
    assert lines.rows() == kept
    lines.append([{'step': 2, 'text': 'lone \ud83d', 'logprobs': np.array([-0.5, np.nan])}])
    assert lines.rows() == [*kept, {'step': 2, 'text': 'lone ?', 'logprobs': [-0.5, None]}]


def test_a_broken_line_is_named(tmp_path):
  lines = JsonLines(tmp_path / 'x.jsonl')
  lines.path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
  with pytest.raises(DataError, match=r'x\.jsonl line 2 is not JSON'):
    lines.truncate_after(1)


def test_tensorboard_hides_what_a_killed_run_wrote(tmp_path):
  with MetricsLog(tmp_path) as log:
    for step in (1, 2, 3):
      log.write(step, {'loss': 2.5 / step}, wall_s=step)
  first = list(_events(tmp_path))
  assert [(e.step, e.summary.value[0].tag) for e in first if e.summary.value] == [(1, 'loss'), (2, 'loss'), (3, 'loss')]
  for path in (tmp_path / 'tensorboard').iterdir():
    path.rename(path.with_name('events.out.tfevents.0'))                       # as if from another second
  with MetricsLog(tmp_path) as log:
    log.truncate_after(2)
    log.write(3, {'loss': math.nan}, wall_s=3)
  second = list(_events(tmp_path))[len(first):]
  assert [e.step for e in second if e.HasField('session_log')] == [3]
  assert math.isnan(second[-1].summary.value[0].simple_value)


def test_nothing_is_left_where_tensorboard_is_not_wanted(tmp_path):
  _run(tmp_path, range(1, 3))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['metrics.jsonl', 'samples.jsonl']


def test_wandb_that_is_not_installed_is_an_error_only_where_asked_for(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  MetricsLog(tmp_path).close()
  with pytest.raises(ConfigError, match=r'W&B was asked for but is not installed.*rlhf-jax\[wandb\]'):
    MetricsLog(tmp_path, wandb={'project': 'rlhf'})


@pytest.fixture
def wandb_calls(monkeypatch):
  """What a stand-in for the package W&B, which is not installed, was called with."""
  calls = []
  run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append('end'))
  init = lambda **arguments: calls.append(arguments) or run
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  return calls


def test_wandb_gets_every_step(tmp_path, wandb_calls):
  with MetricsLog(tmp_path, tensorboard=False, wandb={'project': 'rlhf', 'id': 'mine'}) as log:
    log.write(7, {'loss': 2.5}, wall_s=1)
  started = {'dir': str(tmp_path), 'resume': 'allow', 'project': 'rlhf', 'id': 'mine'}
  assert wandb_calls == [started, (7, {'loss': 2.5}), 'end']


def test_a_resumed_stage_goes_on_in_its_wandb_run(tmp_path, wandb_calls):
  for stage in ('sft', 'sft', 'ppo', 'ppo', 'sft'):
    MetricsLog(tmp_path / stage, tensorboard=False, wandb={'project': 'rlhf'})
  first, again, other, other_again, last = (arguments['id'] for arguments in wandb_calls)
  assert first == again == last != other == other_again
  assert re.fullmatch(r'[0-9a-f]{16}', first)  # W&B allows letters, digits, - and _
  assert all(arguments['resume'] == 'allow' for arguments in wandb_calls)
  assert [path.name for path in (tmp_path / 'sft').iterdir()] == ['wandb_id']


def test_a_kill_while_the_wandb_id_is_written_does_no_harm(tmp_path, wandb_calls):
  (tmp_path / 'wandb_id.unfinished').write_text('12')
  for _ in range(2):
    MetricsLog(tmp_path, tensorboard=False, wandb={})
  assert wandb_calls[0] == wandb_calls[1] and len(wandb_calls[0]['id']) == 16


def test_a_wandb_id_that_is_passed_comes_first(tmp_path, wandb_calls):
  for wandb in ({}, {'id': 'mine', 'resume': 'must'}, {'id': None}):
    MetricsLog(tmp_path, tensorboard=False, wandb=wandb)
  kept = (tmp_path / 'wandb_id').read_text()
  assert [(arguments['id'], arguments['resume']) for arguments in wandb_calls] == [
    (kept, 'allow'), ('mine', 'must'), (kept, 'allow')]
  MetricsLog(tmp_path / 'other', tensorboard=False, wandb={'id': 'mine'})
  assert not (tmp_path / 'other' / 'wandb_id').exists()


@pytest.mark.parametrize('number, shown', [
  (0, '0'), (2.3149, '2.31'), (-0.0123456, '-0.0123'), (1.23e-5, '1.23e-05'), (999.4, '999'), (999.6, '1k'),
  (-9100, '-9.1k'), (12_345, '12.3k'), (999_600, '1M'), (7.89e9, '7.89G'), (4e12, '4T'), (np.float32(0.1), '0.1'),
  (-math.inf, '-inf'),
])
def test_compact(number, shown):
  assert compact(number) == shown


def _console(**settings):
  return rich.console.Console(file=io.StringIO(), width=100, **settings)


def test_lines_without_a_terminal(capsys):
  with Progress('sft', total=300, start=100) as progress:
    progress.update(110, {'loss': 2.3149, 'a_metric_with_a_rather_long_name': 1e-5, 'another_of_some_length': 0.5},
                    rate=(9_123, 'tokens/s'))
    for step in range(111, 201):
      progress.update(step, {'loss': 1.5})                                     # too soon to be printed
    progress.note('sampled [bold]40[/] responses')
  began, first, note, last = capsys.readouterr().out.splitlines()
  assert re.fullmatch(r'sft: 0\.\d s to the first step, compiling included', began)
  assert first == ('sft  110/300  loss 2.31  a_metric_with_a_rather_long_name 1e-05  another_of_some_length 0.5  '
                   '9.12k tokens/s')
  assert note == 'sampled [bold]40[/] responses'
  assert re.fullmatch(r'sft  200/300  loss 1\.5  0:00:0\d left', last)


def test_each_line_is_printed_once():
  console = _console()
  with Progress('ppo', total=3, console=console, every_s=0) as progress:
    for step in (1, 2, 3):
      progress.update(step, {})
  assert re.findall(r'ppo  (\d)/3', console.file.getvalue()) == ['1', '2', '3']
  with Progress('ppo', total=3, start=3, console=console):
    pass                                                                       # nothing left to do: nothing to say
  assert console.file.getvalue().count('ppo  ') == 3


def test_time_left_does_not_count_compiling(monkeypatch):
  console, clock = _console(), iter([990.0, 1000.0, 1002.0, 1030.0])
  monkeypatch.setattr('rlhf_jax.metrics.time.monotonic', lambda: next(clock))
  with Progress('sft', total=4003, console=console, every_s=0) as progress:
    for step in (1, 2, 16):
      progress.update(step, {})
  assert re.findall(r'\d:\d\d:\d\d left', console.file.getvalue()) == ['2:13:22 left', '2:12:54 left']
  assert 'sft: 10.0 s to the first step, compiling included' in console.file.getvalue()


def test_a_live_line_on_a_terminal():
  console = _console(force_terminal=True)
  with Progress('reward', total=300, console=console) as progress:
    progress.update(120, {'loss': 2.3149}, rate=(9_100, 'tokens/s'))
    progress.note('a line [of] its own')
    progress.update(121, {'loss': 2.25})
  shown = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', console.file.getvalue())
  lines = [line.rstrip() for line in re.split(r'[\r\n]+', shown)]
  assert 'a line [of] its own' in lines
  assert re.search(r'reward ━+\S* +121/300  loss 2\.25  0:00:0\d left', shown)
  assert '\x1b[?25h' in console.file.getvalue()                                # the cursor is back
