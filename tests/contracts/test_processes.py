"""Two and four real processes compute what one does, stop together when one is asked to, and never wait for the dead."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from small import UNTIMED

from rlhf_jax import roll_call
from rlhf_jax.checkpoint import _read_record
from rlhf_jax.cli import clear_exits
from rlhf_jax.errors import ConfigError, ProcessError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.processes import ProcessesConfig, joined

ROOT = pathlib.Path(__file__).parent.parent.parent
# The small task as an experiment module. SFT is long, so that a signal sent early in it arrives in it, and learns slowly, so
# that the rounding of one process and of four is the same to six digits at its end.
PROGRAM = '''
import small
from rlhf_jax import cli
from rlhf_jax.model import config
config.PRESETS.update(small.PRESETS)
experiment = small.experiment(sft__steps=60, sft__checkpoint_every=25, sft__evaluate_every=30, reward__steps=2,
                              ppo__iterations=2, ppo__minibatches=1, sft__optimizer__learning_rate=0.002)
cli.main(experiment, small.task, 'The small task.')
'''
DEVICES = 4
ABSENT = {('sft', 'score'), ('sft', 'kl_nats_per_sequence'), ('reward', 'kl_nats_per_sequence'), ('ppo', 'held_out/loss')}


def free_port():
  with socket.create_server(('127.0.0.1', 0)) as door:
    return door.getsockname()[1]


def python(program, *args, devices=1, **more):
  """A process that runs a program on so many devices, with `more` in its environment."""
  # What is tested is not how well programs are compiled, of which each process does its own.
  flags = f'--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}'
  environment = os.environ | {'XLA_FLAGS': flags, 'NPROC': '16',
                              'PYTHONPATH': os.pathsep.join((str(ROOT), str(ROOT / 'tests')))} | more
  return subprocess.Popen([sys.executable, '-c', program, *args], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)


def start(directory, count, *flags, runner='sharded'):
  """`count` processes of the run in that directory, with 4 devices together."""
  address = f'127.0.0.1:{free_port()}'
  where = lambda index: () if count == 1 else (
    '--processes.coordinator', address, '--processes.count', str(count), '--processes.index', str(index),
    '--processes.lost-s', '10')
  flags = '--run-dir', str(directory), '--mesh.runner', runner, *flags
  return [python(PROGRAM, *flags, *where(index), devices=DEVICES // count) for index in range(count)]


def ends(group, timeout=180):
  """[(exit status, output)] of the processes, all of which are over afterwards."""
  try:
    said = [process.communicate(timeout=timeout)[0] for process in group]
  finally:
    for process in group:
      process.kill()
  return [(process.returncode, text) for process, text in zip(group, said, strict=True)]


def runs_to_the_end(directory, count, *flags, **more):
  found = ends(start(directory, count, *flags, **more))
  assert [status for status, _ in found] == [0] * count, found
  return found


def wait_for_rows(group, directory, count):
  """Until SFT has written the metrics of so many steps."""
  path, deadline = directory / 'sft' / 'metrics.jsonl', time.monotonic() + 120
  while not path.exists() or path.read_bytes().count(b'\n') < count:
    assert all(process.poll() is None for process in group), ends(group)
    assert time.monotonic() < deadline, f'{path} has no {count} lines after two minutes'
    time.sleep(0.005)


def timeless(directory, stage):
  return [{name: x for name, x in row.items() if name not in UNTIMED} for row in read_metrics(directory / stage)]


def leaves(directory, stage):
  """{name: shape, dtype and digest} of the last checkpoint of a stage."""
  newest = max(int(path.name) for path in (directory / stage / 'checkpoints').iterdir() if path.name.isdigit())
  return _read_record(directory / stage / 'checkpoints', newest)['leaves']


def assert_same_losses(a, b):
  for stage in ('sft', 'reward', 'ppo'):
    mine, other = timeless(a, stage), timeless(b, stage)
    assert [row['step'] for row in mine] == [row['step'] for row in other]
    for name in ('loss', 'held_out/loss', 'score', 'kl_nats_per_sequence'):
      x, y = ([row[name] for row in rows if name in row] for rows in (mine, other))
      assert len(x) == len(y) and (len(x) > 0 or (stage, name) in ABSENT)
      np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6, err_msg=f'{stage} {name}')


def test_two_processes_stop_together_and_go_on_exactly_and_four_go_on_too(tmp_path):
  alone, two, stopped = (tmp_path / name for name in ('alone', 'two', 'stopped'))
  runs_to_the_end(alone, 1, '--mesh.fsdp', '2', '--no-export')
  (_, first), (_, second) = runs_to_the_end(two, 2, '--mesh.fsdp', '2')
  assert 'sft: ' in first and 'results.json' in first
  assert 'sft' not in second and 'is gone' not in second                        # the first speaks for all
  assert_same_losses(alone, two)
  assert all((two / stage / 'export' / 'model.safetensors').exists() for stage in ('sft', 'reward', 'ppo'))

  group = start(stopped, 2, '--mesh.fsdp', '2', '--no-export')
  wait_for_rows(group, stopped, 5)
  group[1].send_signal(signal.SIGTERM)
  found = ends(group)
  assert [status for status, _ in found] == [75, 75], found
  assert 'Stopped as asked: sft step ' in found[0][1] and 'is saved' in found[0][1] and 'is gone' not in found[1][1]
  assert not (stopped / 'reward').exists()

  four = tmp_path / 'four'
  shutil.copytree(stopped, four)
  runs_to_the_end(stopped, 2, '--mesh.fsdp', '2', '--no-export', '--stages', 'sft')
  assert timeless(stopped, 'sft') == timeless(two, 'sft')
  assert leaves(stopped, 'sft') == leaves(two, 'sft')                           # to the bit
  runs_to_the_end(four, 4, '--no-export', runner='pmap')                        # more processes, another mesh
  assert_same_losses(alone, four)
  assert json.loads((four / 'experiment.json').read_text())['mesh']['runner'] == 'pmap'


def test_a_killed_process_ends_the_other_which_names_it(tmp_path):
  group = start(tmp_path, 2, '--mesh.fsdp', '1', '--sft.steps', '100000')
  wait_for_rows(group, tmp_path, 3)
  group[1].kill()
  began = time.monotonic()
  (status, said), _ = ends(group, timeout=60)
  assert status not in (0, 75)
  assert time.monotonic() - began < 40                                          # lost_s is 10, and it writes a long farewell
  assert 'tasks are unhealthy (stopped sending heartbeats):\n1\n' in said


def slurm(index, count, port):
  """What SLURM tells a process, all of which are on this machine."""
  return {'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': '127.0.0.1', 'SLURM_NTASKS': str(count), 'SLURM_PROCID': str(index),
          'SLURM_LOCALID': '0', 'JAX_COORDINATOR_PORT': str(port)}


DIES = '''
import os, signal
import jax
import numpy as np
from jax.experimental import multihost_utils
from rlhf_jax import processes
with processes.joined(processes.ProcessesConfig("auto")):
  for step in range(100000):
    multihost_utils.process_allgather(np.ones(1))
    if step == 5 and jax.process_index() == 0:
      os.kill(os.getpid(), signal.SIGKILL)
'''


def test_processes_find_each_other_and_where_the_first_dies_the_other_names_it():
  port = free_port()
  _, (status, said) = ends([python(DIES, **slurm(index, 2, port)) for index in range(2)], timeout=60)
  assert status not in (0, 75) and 'process 1: process 0 is gone' in said, said


# One process that joined, as on a slice of one host: JAX hears the signal, and Orbax saves by other numbers in between.
STOPS = '''
import os, signal, sys, tempfile, time
import numpy as np
from rlhf_jax import processes
from rlhf_jax.checkpoint import Checkpoints
config = processes.ProcessesConfig(sys.argv[1], count=1, index=0)
with processes.joined(config), Checkpoints(tempfile.mkdtemp()) as checkpoints:
  assert not any(processes.stop_asked() for _ in range(20))
  checkpoints.save(120, {"a": np.ones(3)}, {})
  os.kill(os.getpid(), signal.SIGTERM)
  for step in range(1, 100):
    if processes.stop_asked():
      print("stopped at", step)
      break
    checkpoints.save(120 + step, {"a": np.ones(3)}, {})
    time.sleep(0.05)
'''


def test_a_save_between_two_questions_hides_no_signal():
  status, said = ends([python(STOPS, f'127.0.0.1:{free_port()}')], timeout=60)[0]
  assert status == 0 and 'stopped at' in said, said


# Two processes save two steps, the newer of which is damaged before both restore.
RESTORES = '''
import os, pathlib, shutil, sys, warnings
import jax
import jax.numpy as jnp
from rlhf_jax import cli, processes, runners
from rlhf_jax.checkpoint import Checkpoints
address, index, directory, damaged = sys.argv[1:]
with processes.joined(processes.ProcessesConfig(address, count=2, index=int(index))):
  runner = runners.sharded(fsdp=2)
  make = lambda step: {"up_DF": jnp.arange(2.0 ** 16).reshape(256, 256) * step}
  with Checkpoints(directory) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, runner.initialise(lambda: make(step)), {"step": step})
  if damaged == "late":
    processes.meet("saved")
    if index == "1":
      directory = shutil.copytree(directory, directory + " as it was", ignore=shutil.ignore_patterns("2"))
    processes.meet("copied")
    with Checkpoints(directory) as checkpoints, cli.clear_exits():
      checkpoints.restore(runner.abstract(make, 1))
  if index == "0":
    os.truncate(max(pathlib.Path(directory, "2").glob(damaged), key=os.path.getsize), 100)
  processes.meet("damaged")
  with Checkpoints(directory) as checkpoints, warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    state, meta = checkpoints.restore(runner.abstract(make, 1))
    os.write(2, "\\n".join(str(each.message) for each in warned if "step before" in str(each.message)).encode())
    assert meta == {"step": 1} and (runner.fetch(state)["up_DF"] == make(1)["up_DF"]).all()
    checkpoints.save(2, runner.initialise(lambda: make(2)), {"step": 4})
  with Checkpoints(directory) as checkpoints:
    assert checkpoints.restore(runner.abstract(make, 1))[1] == {"step": 4}
'''


@pytest.mark.parametrize('damaged, says, other_says', [
  ('state/ocdbt.process_1/d/*', 'another process cannot read it', 'it cannot be read'),
  ('record/metadata', 'its record cannot be read', 'its record cannot be read'),
])
def test_what_one_process_cannot_read_none_takes(damaged, says, other_says, tmp_path):
  address = f'127.0.0.1:{free_port()}'
  found = ends([python(RESTORES, address, str(index), str(tmp_path), damaged) for index in range(2)], timeout=60)
  assert [status for status, _ in found] == [0, 0], found
  for (_, said), expected in zip(found, (says, other_says)):
    assert f'2 is damaged: {expected}' in said and 'Trying the step before it.' in said


def test_a_step_that_one_process_does_not_see_yet_ends_both_and_stays(tmp_path):
  address = f'127.0.0.1:{free_port()}'
  directory = tmp_path / 'run'
  found = ends([python(RESTORES, address, str(index), str(directory), 'late') for index in range(2)], timeout=60)
  assert [status for status, _ in found] == [2, 2], found
  assert 'process 0: CheckpointError: Checkpoint ' in found[0][1] and '2 is of no use to another process' in found[0][1]
  assert 'has no complete step 2. It has [1]' in found[1][1] and (directory / '2').exists()


FAILS = '''
import sys
import numpy as np
from jax.experimental import multihost_utils
from rlhf_jax import cli, processes
from rlhf_jax.errors import DataError
config = processes.ProcessesConfig(sys.argv[1], count=2, index=int(sys.argv[2]), lost_s=5)
with cli.clear_exits("there", config.lost_s), processes.joined(config):
  for step in range(100000):
    multihost_utils.process_allgather(np.ones(1))
    if config.index == 1 and step == 5:
      raise DataError("a bad row")
'''


def test_an_error_in_one_process_ends_the_other():
  address = f'127.0.0.1:{free_port()}'
  (first, _), (second, said) = ends([python(FAILS, address, str(index)) for index in range(2)], timeout=60)
  assert second == 2 and 'process 1: DataError: a bad row' in said
  assert first not in (0, 75)


def calls(configs):
  """What `joined` raises in a thread for each config, by index."""
  raised = {}

  def call(config):
    try:
      with joined(config):
        pass
    except ProcessError as error:
      raised[config.index] = str(error)
  threads = [threading.Thread(target=call, args=(config,)) for config in configs]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return raised


def test_who_does_not_join_is_named_to_all_who_did():
  address = f'127.0.0.1:{free_port()}'
  came = [ProcessesConfig(address, count=4, index=index, join_s=2) for index in (0, 2)]
  message = 'process 1 and 3 of 4 did not join within 2 s. Look at its own output'
  raised = calls(came)
  assert raised.keys() == {0, 2} and all(text.startswith(message) for text in raised.values()), raised


def test_who_does_not_join_is_named_where_the_cluster_says_how_many_there_are(monkeypatch):
  for name, value in slurm(0, 3, free_port()).items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ProcessError, match='process 1 and 2 of 3 did not join within 1 s'), \
       joined(ProcessesConfig('auto', join_s=1)):
    pass


def test_a_port_that_another_has_is_named():
  with roll_call._listen(0) as door:
    port = door.getsockname()[1]
    raised = calls([ProcessesConfig(f'127.0.0.1:{port}', count=2, index=0, join_s=1)])
  assert raised[0].startswith(f'process 0 cannot listen at port {port} (Address already in use')


def has_ipv6():
  with contextlib.suppress(OSError), socket.create_server(('::1', 0), family=socket.AF_INET6):
    return True
  return False


@pytest.mark.parametrize('host', ['127.0.0.1', pytest.param('[::1]', marks=pytest.mark.skipif(
  not has_ipv6(), reason='this machine has no ::1'))])
@pytest.mark.parametrize('goodbye', [True, False])
def test_the_others_say_so_where_the_first_is_gone_without_a_goodbye(goodbye, host, capfd, monkeypatch):
  address, noticed = f'{host}:{free_port()}', []
  notice = roll_call._notice_silence
  monkeypatch.setattr(roll_call, '_notice_silence', lambda *args: notice(*args) or noticed.append(args[0]))
  answers = threading.Thread(target=roll_call.hold, args=(address, 2, 1), kwargs={'join_s': 10, 'lost_s': 60})
  answers.start()
  roll_call.hold(address, 2, 0, join_s=10, lost_s=60)
  answers.join()
  if goodbye:
    roll_call.say_goodbye()
  for connection in roll_call._others:
    connection.close()
  for thread in threading.enumerate():
    if thread.name.endswith('(_watch)'):
      thread.join(10)
  assert ('process 1: process 0 is gone' in capfd.readouterr().err) == (not goodbye)
  assert noticed[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
  if hasattr(socket, 'TCP_KEEPIDLE'):
    settings = (noticed[0].getsockopt(socket.IPPROTO_TCP, getattr(socket, f'TCP_KEEP{name}'))
                for name in ('IDLE', 'INTVL', 'CNT'))
    assert list(settings) == [20, 10, 2]                                        # 40 s in all, of 60


def test_who_waits_in_vain_asks_to_be_started_again(capsys):
  with pytest.raises(SystemExit) as exit_, clear_exits(), \
       joined(ProcessesConfig(f'127.0.0.1:{free_port()}', count=2, index=0, join_s=1)):
    pass
  assert exit_.value.code == 75 and 'ProcessError: process 1 of 2 did not join within 1 s' in capsys.readouterr().err


def test_a_first_process_that_is_not_there_is_named_with_its_address():
  address = f'127.0.0.1:{free_port()}'
  raised = calls([ProcessesConfig(address, count=2, index=1, join_s=1)])
  assert raised[1].startswith(f'process 0 does not answer at {address} after 1 s.')


@pytest.mark.parametrize('settings, message', [
  ({'coordinator': 'here:1'}, '--processes.coordinator here:1 without --processes.count and --processes.index'),
  ({'count': 2, 'index': 0}, '--processes.count 2 and --processes.index 0 without an address'),
  ({'coordinator': 'auto', 'index': 0}, 'without an address'),
  ({'coordinator': 'here:1', 'count': 2, 'index': 2}, '--processes.index 2 of --processes.count 2'),
  ({'coordinator': 'here', 'count': 2, 'index': 1}, "'here' is no address"),
  ({'coordinator': ':80', 'count': 2, 'index': 1}, "':80' is no address"),
  ({'coordinator': 'here:70000', 'count': 2, 'index': 1}, "'here:70000' is no address"),
])
def test_bad_settings(settings, message):
  with pytest.raises(ConfigError, match=message):
    ProcessesConfig(**settings)


@pytest.mark.parametrize('variable, value, message', [
  ('JAX_COORDINATOR_PORT', 'abc', "auto finds '127.0.0.1:abc', which is no address. Set JAX_COORDINATOR_ADDRESS"),
  ('SLURM_NTASKS', 'two', "auto, but what this cluster says cannot be read .*'two'.*Look at its variables"),
])
def test_what_a_cluster_says_wrongly(variable, value, message, monkeypatch):
  for name, said in (slurm(0, 2, 80) | {variable: value}).items():
    monkeypatch.setenv(name, said)
  with pytest.raises(ConfigError, match=message), joined(ProcessesConfig('auto', join_s=1)):
    pass


def test_nothing_to_detect(tmp_path):
  status, said = ends(start(tmp_path, 1, '--processes.coordinator', 'auto'))[0]
  assert status == 2 and 'ConfigError: --processes.coordinator auto, but nothing here says how many processes' in said
