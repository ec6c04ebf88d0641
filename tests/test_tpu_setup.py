"""The commands of tpu_setup against a stand-in gcloud, which records its calls, runs what is sent to the workers in
directories of this machine, and fails on demand. The real one was never called for them."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

SETUP = pathlib.Path(__file__).parents[1] / 'tpu_setup'
COMMANDS = sorted(path for path in SETUP.glob('*.sh') if path.name not in ('gcloud.sh', 'worker.sh'))

# Slices are directories of WORLD: a file `state`, one `flags` of how it was created, and a home for each worker. `failures`
# has rows of [words of a call, status, text, how many times still].
GCLOUD = f'''#!{sys.executable} -IS
import fcntl, json, os, pathlib, subprocess, sys

world, words = pathlib.Path(os.environ['WORLD']), sys.argv[1:]
with open(world / 'lock', 'w') as lock:                       # sweep.sh calls it at the same time
  fcntl.flock(lock, fcntl.LOCK_EX)
  with open(world / 'calls', 'a') as calls:
    calls.write(json.dumps(words) + '\\n')
  failures = json.loads((world / 'failures').read_text())
  for row in failures:
    if row[3] > 0 and all(word in ' '.join(words) for word in row[0].split()):
      row[3] -= 1
      (world / 'failures').write_text(json.dumps(failures))
      sys.exit(print('ERROR: ' + row[2], file=sys.stderr) or row[1])

kind, verb, name = words[2], words[3], (words[4:] + [''])[0]
if verb == 'scp':
  name = words[5].partition(':')[0]
flags = dict(word.partition('=')[::2] for word in words[4:] if word.startswith('--'))
slice, queue = world / name, world / f'{{name}}.queue'
if verb == 'create':
  slice.mkdir()
  for number in range(int((world / 'workers').read_text())):
    python = slice / str(number) / 'rlhf_jax/.venv/bin/python'
    python.parent.mkdir(parents=True)
    python.symlink_to(world / 'bin/experiment')
  (slice / 'flags').write_text(json.dumps({{**flags, 'queue': kind == 'queued-resources'}}))
  (slice / 'state').write_text('READY')
  if kind == 'queued-resources':
    queue.write_text((world / 'queue').read_text())
elif verb == 'describe' and kind == 'queued-resources':
  state, _, later = queue.read_text().partition(' ')
  print(state)
  queue.write_text(later or state)
elif verb == 'delete' and slice.exists():
  deleted = slice.rename(world / f'{{name}}.deleted')           # at once, as far as its watcher can see
  for worker in deleted.glob('*/rlhf_jax/tpu_setup/worker.sh'):
    subprocess.run([worker, 'terminate', '0'])
  subprocess.run(['rm', '-r', deleted])
  queue.unlink(missing_ok=True)
elif not slice.exists() or queue.exists() and queue.read_text() == 'SUSPENDED':
  sys.exit(print("ERROR: NOT_FOUND: Resource 'nodes/" + name + "' was not found", file=sys.stderr) or 1)
elif verb == 'describe':
  made = json.loads((slice / 'flags').read_text())
  print((slice / 'state').read_text(), len([*slice.glob('[0-9]*')]), made['--accelerator-type'],
        made.get('--version') or made['--runtime-version'], 'True' if '--spot' in made else '',
        'projects/p/locations/z/queuedResources/' + name if made['queue'] else '', sep=',')
elif (slice / 'state').read_text() != 'READY':
  sys.exit(print('ERROR: TPU is in state PREEMPTED', file=sys.stderr) or 1)
else:
  homes = sorted(slice.glob('[0-9]*')) if flags['--worker'] == 'all' else [slice / flags['--worker']]
  if verb == 'scp':
    for home in homes:
      (home / words[5].partition(':')[2]).write_bytes(pathlib.Path(words[4]).read_bytes())
    sys.exit()
  started = [subprocess.Popen(['bash', '-c', flags['--command']], cwd=home,
                              env={{**os.environ, 'HOME': str(home), 'NUMBER': home.name}}) for home in homes]
  sys.exit(next((status for status in [process.wait() for process in started] if status), 0))
'''

# Python on a worker. An experiment takes the first word of its worker's plan: a status to end with, `save` to wait for
# SIGTERM and end with 75, `die` by SIGKILL, or `preempted`.
EXPERIMENT = f'''#!{sys.executable} -IS
import json, os, pathlib, signal, sys, time

world, home, words = pathlib.Path(os.environ['WORLD']), pathlib.Path(os.environ['HOME']), sys.argv[1:]
if words[0] == '-c' or words[1] == 'pip':
  sys.exit()
print('experiment says', *words)
plan = world / f'plan-{{home.name}}'
todo, _, later = plan.read_text().partition(' ')
plan.write_text(later)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with open(world / 'starts', 'a') as starts:
  starts.write(json.dumps([home.parent.name, home.name, words, todo]) + '\\n')
if todo == 'save':
  time.sleep(60)
elif todo == 'die':
  os.kill(os.getpid(), signal.SIGKILL)
elif todo == 'preempted':
  queue = world / f'{{home.parent.name}}.queue'                  # a slice of the queue is gone then
  if queue.exists():
    queue.write_text('SUSPENDED')
  else:
    (home.parent / 'state').write_text('PREEMPTED')
  os.kill(os.getpid(), signal.SIGKILL)                           # with its machine: it never ends by itself
else:
  sys.exit(int(todo))
'''

TOOLS = {
  'gcloud': GCLOUD,
  'experiment': EXPERIMENT,
  'curl': '#!/bin/sh\necho "$NUMBER"\n',  # the metadata server, which knows the number of a worker
  'mountpoint': '#!/bin/sh\ntest -e launch/mounted\n',
  'findmnt': '#!/bin/sh\ncat launch/mounted\n',
  'gcsfuse': '#!/bin/sh\nfor word; do bucket=$last; last=$word; done\necho "$bucket" >> launch/mounted\n',
}


class Cloud:
  """A world of slices on this machine, and the commands of a checkout run against it."""

  def __init__(self, world, checkout):
    self.world, self.checkout = world, checkout
    (world / 'bin').mkdir()
    for name, text in TOOLS.items():
      (world / 'bin' / name).write_text(text)
      (world / 'bin' / name).chmod(0o755)
    (world / 'failures').write_text('[]')
    self.settings(workers=1, queue='ACTIVE')
    self.path = f'{world / "bin"}:/usr/bin:/bin'

  def settings(self, **files):
    for name, text in files.items():
      (self.world / name.replace('_', '-')).write_text(str(text))

  def fail(self, call, status, text, times=1000):
    rows = json.loads((self.world / 'failures').read_text())
    (self.world / 'failures').write_text(json.dumps([*rows, [call, status, text, times]]))

  def begin(self, command, *flags, name='rlhf'):
    words = [self.checkout / f'tpu_setup/{command}.sh', *(['--name', name, '--zone', 'z'] if name else []), *map(str, flags)]
    return subprocess.Popen(words, env={'PATH': self.path, 'WORLD': str(self.world), 'HOME': str(self.world)}, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def run(self, command, *flags, status=0, name='rlhf'):
    """What the command printed, stdout and stderr; it must end with that status."""
    process = self.begin(command, *flags, name=name)
    self.out, self.err = process.communicate(timeout=50)
    assert process.returncode == status, self.out + self.err
    return self.out + self.err

  def launch(self, *flags, status=0):
    return self.run('launch', '--pause', 0, *flags, '--', 'experiments.quickstart', '--seed', 7, status=status)

  def ready(self, workers=1, *create, bootstrap=()):
    """A slice that is created and prepared; the calls for it are forgotten."""
    self.settings(workers=workers)
    self.run('create', '--type', 'v5litepod-16', *create)
    self.run('bootstrap', *bootstrap)
    (self.world / 'calls').unlink()

  def home(self, number, name='rlhf'):
    return self.world / name / str(number) / 'rlhf_jax'

  def _lines(self, name):
    path = self.world / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def calls(self, verb=''):
    return [call for call in self._lines('calls') if not verb or verb in call]

  def starts(self):
    return self._lines('starts')


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """A repository with the commands as they are now, and with two commits."""
  checkout = tmp_path_factory.mktemp('checkout')
  shutil.copytree(SETUP, checkout / 'tpu_setup')
  (checkout / 'early.py').touch()
  _git(checkout, 'init', '--quiet')
  for version in ('early', 'late'):
    (checkout / 'early.py').rename(checkout / f'{version}.py')
    _git(checkout, 'add', '--all')
    _git(checkout, '-c', 'user.name=me', '-c', 'user.email=me@example.com', 'commit', '--quiet', '--message', version)
  return checkout


def _git(checkout, *words):
  return subprocess.run(['git', *words], cwd=checkout, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def cloud(tmp_path, checkout):
  cloud = Cloud(tmp_path, checkout)
  yield cloud
  for worker in tmp_path.glob('*/*/rlhf_jax/tpu_setup/worker.sh'):  # what a test that failed half-way left running
    subprocess.run([worker, 'terminate', '0'], check=True)


# ---- the commands themselves

def test_shellcheck_has_nothing_to_say():
  shellcheck = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')
  assert shellcheck, "shellcheck is missing: pip install -e '.[test]' brings it"
  found = subprocess.run([shellcheck, '-x', *SETUP.glob('*.sh')], cwd=SETUP.parent, capture_output=True, text=True)
  assert found.returncode == 0, found.stdout


def test_help_and_wrong_flags_of_every_command(cloud):
  for command in (path.stem for path in COMMANDS):
    assert f'usage: tpu_setup/{command}.sh' in cloud.run(command, '--help', name=None) and not cloud.err
    for wrong in (['--bogus'], ['--name'], ['--zone', '--dry-run'], ['bogus']):
      cloud.run(command, *wrong, status=2, name=None)
      assert f'usage: tpu_setup/{command}.sh' in cloud.err and not cloud.out
  for flags in (['--restarts', 'x'], ['--pause', '1.5'], []):
    cloud.run('launch', *flags, status=2)
  cloud.run('create', '--type', 'v3-8', status=2)
  assert not cloud.calls()


@pytest.mark.parametrize('command, flags', [
  ('create', ['--type', 'v4-32', '--spot']), ('create', ['--type', 'v6e-8', '--queued', '--project', 'p q']),
  ('bootstrap', ['--commit', 'HEAD']), ('status', []), ('logs', ['--worker', 0]), ('stop', ['--wait', 5]),
  ('delete', ['--yes']), ('launch', ['--', 'experiments.quickstart', '--name', "it's $HOME"]),
], ids=lambda value: value if isinstance(value, str) else '')
def test_dry_run_prints_what_is_run_and_calls_nothing(cloud, command, flags):
  printed = cloud.run(command, '--dry-run', *flags) and cloud.out
  assert not cloud.calls()
  expected = [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith('gcloud')]
  assert expected
  if command == 'launch':                                       # what it would add for several workers is printed too
    expected = [call for call in expected if 'coordinator' not in str(call) and 'installed' not in str(call)]
  cloud.settings(plan_0='0 0')
  if command != 'create':
    cloud.ready()
  if command == 'logs':
    cloud.launch()
    (cloud.world / 'calls').unlink()
  cloud.run(command, *(['--pause', 0] if command == 'launch' else []), *flags)
  made = [call for call in cloud.calls() if 'scp' not in call]   # the archive lies in another temporary directory
  unique = [call for number, call in enumerate(made) if call not in made[:number]]               # it may poll more than once
  assert unique == [call for call in expected if 'scp' not in call]


def test_sweep_and_jobset_have_a_dry_run(cloud):
  cloud.run('sweep', '--slices', 2, '--dry-run', '--', 'quickstart', '--seeds', 0, 1)
  assert 'rlhf-0' in cloud.out and 'rlhf-1' in cloud.out and '--index 1' in cloud.out
  assert not cloud.calls()


@pytest.mark.parametrize('text, advice', [
  ("RESOURCE_EXHAUSTED: Quota 'TPUV5sPodPerProjectPerZone' exhausted. Limit 0 in zone z", 'quota'),
  ('There is no more capacity in the zone "z"', '--queued'),
  ('You do not currently have an active account selected. Please run: $ gcloud auth login', 'not logged in'),
  ('PERMISSION_DENIED: tpu.nodes.create', 'roles/tpu.admin'),
  ('ALREADY_EXISTS: nodes/rlhf', 'taken'),
  ('a thing nobody foresaw', 'failed with status 7'),
])
def test_failures_of_gcloud_are_told_with_what_to_do(cloud, text, advice):
  cloud.fail('create', 7, text)
  assert advice in cloud.run('create', '--type', 'v5p-8', status=69)
  assert text in cloud.err


def test_without_gcloud(cloud, tmp_path):
  for tool in ('bash', 'dirname', 'basename', 'mktemp', 'rm'):
    (tmp_path / 'bare').mkdir(exist_ok=True)
    (tmp_path / 'bare' / tool).symlink_to(shutil.which(tool))
  cloud.path = tmp_path / 'bare'
  assert 'no gcloud on PATH' in cloud.run('create', '--type', 'v5p-8', status=69)


# ---- create, bootstrap, delete

def test_create_waits_in_the_queue(cloud):
  cloud.settings(queue='WAITING_FOR_RESOURCES PROVISIONING ACTIVE')
  cloud.run('create', '--type', 'v5p-8', '--queued', '--spot', '--pause', 0)
  assert len(cloud.calls('describe')) == 3
  [call] = cloud.calls('create')
  assert {'--node-id=rlhf', '--runtime-version=v2-alpha-tpuv5', '--spot', '--accelerator-type=v5p-8'} <= set(call)


def test_create_ends_where_the_queue_gives_up(cloud):
  cloud.settings(queue='PROVISIONING FAILED')
  assert 'FAILED' in cloud.run('create', '--type', 'v4-16', '--queued', '--pause', 0, status=69)


def test_delete_asks_first(cloud):
  cloud.ready()
  assert 'nothing was deleted' in cloud.run('delete', status=2)
  assert not cloud.calls()
  cloud.run('delete', '--yes')
  assert not (cloud.world / 'rlhf').exists()


def test_bootstrap_replaces_files_and_keeps_runs(cloud, checkout):
  cloud.ready(2, bootstrap=['--commit', 'HEAD~1'])
  (cloud.home(1) / 'runs').mkdir()
  (cloud.home(1) / 'runs/kept').touch()
  for commit, file in (('HEAD~1', 'early.py'), ('HEAD', 'late.py')):
    cloud.run('bootstrap', '--commit', commit)
    for home in map(cloud.home, (0, 1)):
      assert [path.name for path in home.glob('*.py')] == [file] and (home / '.venv/bin/python').exists()
      assert (home / 'launch/commit').read_text() == _git(checkout, 'rev-parse', commit)
  assert (cloud.home(1) / 'runs/kept').exists()
  cloud.run('bootstrap', '--commit', 'nonsense', status=2)


def test_bucket_is_mounted_once(cloud):
  cloud.ready(2, bootstrap=['--bucket', 'mine'])
  cloud.run('bootstrap', '--bucket', 'mine')
  cloud.run('bootstrap')
  assert [(cloud.home(number) / 'launch/mounted').read_text() for number in (0, 1)] == ['mine\n'] * 2
  assert 'something else' in cloud.run('bootstrap', '--bucket', 'other', status=69)


def test_bucket_without_gcsfuse(cloud):
  cloud.run('create', '--type', 'v4-16')
  (cloud.world / 'bin/gcsfuse').unlink()
  assert 'apt-get install -y gcsfuse' in cloud.run('bootstrap', '--bucket', 'mine', status=69)


def test_bucket_does_not_hide_runs(cloud):
  cloud.ready()
  (cloud.home(0) / 'runs').mkdir()
  (cloud.home(0) / 'runs/one').touch()
  assert 'Move them away' in cloud.run('bootstrap', '--bucket', 'mine', status=69)
  assert not (cloud.home(0) / 'launch/mounted').exists()


# ---- launch

def test_launch_on_one_worker(cloud):
  cloud.ready()
  cloud.settings(plan_0='0')
  assert '[worker 0] experiment says -m experiments.quickstart --seed 7\n' in cloud.launch()
  assert cloud.starts() == [['rlhf', '0', ['-m', 'experiments.quickstart', '--seed', '7'], '0']]
  assert (cloud.home(0) / 'runs/quickstart.logs/rlhf/worker-0.log').exists()
  assert '[worker 0] experiment says' in cloud.run('logs')
  assert 'READY,1,' in cloud.run('status') and 'worker 0: exited 0' in cloud.out


def test_workers_run_together_on_shared_runs_only(cloud):
  cloud.ready(2)
  cloud.settings(plan_0='0', plan_1='0')
  assert '--bucket' in cloud.launch(status=2)
  assert not cloud.starts()
  cloud.run('bootstrap', '--bucket', 'mine')
  cloud.launch()
  assert sorted(worker for _, worker, _, _ in cloud.starts()) == ['0', '1']
  assert all(words[-2:] == ['--processes.coordinator', 'auto'] for _, _, words, _ in cloud.starts())


def test_a_run_dir_of_the_user_counts_as_shared(cloud):
  cloud.ready(2)
  cloud.settings(plan_0='0', plan_1='0')
  cloud.run('launch', '--pause', 0, '--', 'experiments.hh', '--run-dir', cloud.world / 'shared/hh')
  assert len(cloud.starts()) == 2
  assert len([*(cloud.world / 'shared/hh.logs/rlhf').iterdir()]) == 2


def test_saved_runs_are_started_again_so_many_times(cloud):
  cloud.ready()
  cloud.settings(plan_0='75 75 75 0')
  assert '--restarts' in cloud.launch('--restarts', 1, status=75)
  assert len(cloud.starts()) == 2
  cloud.launch('--restarts', 1)
  assert [todo for _, _, _, todo in cloud.starts()] == ['75', '75', '75', '0']


def test_errors_are_not_started_again(cloud):
  cloud.ready(2, bootstrap=['--bucket', 'mine'])
  cloud.settings(plan_0='1 0 130', plan_1='1 2 130')
  for number, status in enumerate((1, 2, 130), 1):
    cloud.launch(status=status)
    assert len(cloud.starts()) == 2 * number


def test_a_worker_that_dies_takes_the_others_along(cloud):
  cloud.ready(2, bootstrap=['--bucket', 'mine'])
  cloud.settings(plan_0='save 0', plan_1='die 0')
  cloud.launch()
  assert sorted((worker, todo) for _, worker, _, todo in cloud.starts()) == \
    [('0', '0'), ('0', 'save'), ('1', '0'), ('1', 'die')]


def test_a_lost_connection_is_looked_at_again(cloud):
  cloud.ready()
  cloud.settings(plan_0='0')
  cloud.fail('ssh poll', 255, 'ssh: connect to host port 22: Connection timed out', times=2)
  cloud.launch('--restarts', 2)
  assert len(cloud.starts()) == 1


def test_workers_that_never_answer(cloud):
  cloud.ready()
  cloud.settings(plan_0='0')
  cloud.fail('ssh poll', 255, 'ssh: connect to host port 22: Connection timed out')
  assert 'do not answer' in cloud.launch('--restarts', 2, status=69)
  assert len([call for call in cloud.calls('ssh') if 'poll' in str(call)]) == 3


def test_ssh_is_down_at_the_start(cloud):
  cloud.ready()
  cloud.fail('ssh', 255, 'ssh: connect to host port 22: Connection timed out')
  assert 'port 22' in cloud.launch(status=69)


def test_a_preempted_slice_is_not_created_again_unasked(cloud):
  cloud.ready(1, '--spot', bootstrap=['--bucket', 'mine'])
  cloud.settings(plan_0='preempted 0')
  assert '--recreate' in cloud.launch(status=75)
  assert not cloud.calls('create') and not cloud.calls('delete')
  assert 'not READY' in cloud.launch(status=75)


@pytest.mark.parametrize('queued', [[], ['--queued']])
def test_a_preempted_slice_is_created_again_as_it_was(cloud, queued):
  cloud.ready(2, '--spot', *queued, bootstrap=['--commit', 'HEAD~1', '--bucket', 'mine'])
  made = json.loads((cloud.world / 'rlhf/flags').read_text())
  cloud.settings(plan_0='preempted 0', plan_1='save 0')
  cloud.launch('--recreate')
  assert json.loads((cloud.world / 'rlhf/flags').read_text()) == made
  assert [len(cloud.calls(verb)) for verb in ('delete', 'create', 'scp')] == [1, 1, 1]
  assert (cloud.home(1) / 'early.py').exists()
  assert (cloud.home(1) / 'launch/mounted').read_text() == 'mine\n'
  assert [todo for _, _, _, todo in cloud.starts()][2:] == ['0', '0']


def test_a_slice_that_was_deleted_stays_deleted(cloud):
  cloud.ready(1, '--queued', bootstrap=['--bucket', 'mine'])
  cloud.settings(plan_0='save')
  watching = cloud.begin('launch', '--pause', 0, '--recreate', '--', 'experiments.quickstart')
  _wait_for(cloud.starts)
  cloud.run('delete', '--queued', '--yes')
  watching.communicate(timeout=50)
  assert watching.returncode == 75
  assert not cloud.calls('create')


def test_recreate_needs_runs_that_outlive_the_slice(cloud):
  cloud.ready(1, '--spot')
  assert '--bucket' in cloud.launch('--recreate', status=2)
  assert not cloud.starts()


def test_stop_saves_and_is_not_undone_by_the_one_who_watches(cloud):
  cloud.ready(2, bootstrap=['--bucket', 'mine'])
  cloud.settings(plan_0='save 0', plan_1='save 0')
  watching = cloud.begin('launch', '--pause', 0, '--', 'experiments.quickstart')
  _wait_for(lambda: len(cloud.starts()) == 2)
  assert cloud.run('stop').count(': stopped') == 2
  _, err = watching.communicate(timeout=50)
  assert watching.returncode == 75 and 'stop.sh' in err
  assert len(cloud.starts()) == 2
  assert [(cloud.home(number) / 'launch/status').read_text() for number in (0, 1)] == ['75\n'] * 2
  cloud.launch()                                                # and the same command goes on
  assert len(cloud.starts()) == 4


def test_a_second_launch_watches_and_another_experiment_is_refused(cloud):
  cloud.ready()
  cloud.settings(plan_0='save')
  watching = cloud.begin('launch', '--pause', 0, '--', 'experiments.quickstart')
  _wait_for(cloud.starts)
  watching.send_signal(signal.SIGINT)
  _, err = watching.communicate(timeout=50)
  assert watching.returncode == 130 and 'goes on' in err
  assert 'another experiment runs here' in cloud.run('launch', '--', 'experiments.hh', status=69)
  assert 'stop.sh it first' in cloud.run('bootstrap', status=69)
  again = cloud.begin('launch', '--pause', 0, '--', 'experiments.quickstart')
  assert again.stdout.readline() == 'worker 0: it runs already\n'
  cloud.run('stop')
  again.communicate(timeout=50)
  assert len(cloud.starts()) == 1


def _wait_for(condition):
  for _ in range(500):
    if condition():
      return
    time.sleep(0.02)
  raise AssertionError('it did not happen within 10 s')


# ---- sweep, GKE

def test_sweep_runs_one_index_on_each_slice(cloud):
  for index in range(2):
    cloud.run('create', '--type', 'v6e-4', name=f'rlhf-{index}')
    cloud.run('bootstrap', name=f'rlhf-{index}')
  cloud.settings(plan_0='0 2')
  cloud.run('sweep', '--slices', 2, '--pause', 0, '--', 'quickstart', '--seeds', 0, 1, status=2)
  assert sorted((slice, words) for slice, _, words, _ in cloud.starts()) == [
    (f'rlhf-{index}', ['-m', 'experiments.sweep', 'quickstart', '--seeds', '0', '1', '--index', str(index)])
    for index in range(2)]


# What the public schema of JobSet v1alpha2, and of the Job and Pod in it, knows of the levels that the manifest has.
KNOWN = {
  '': {'apiVersion', 'kind', 'metadata', 'spec'},
  'spec': {'coordinator', 'failurePolicy', 'managedBy', 'network', 'replicatedJobs', 'startupPolicy', 'successPolicy',
           'suspend', 'ttlSecondsAfterFinished', 'volumeClaimPolicies'},
  'spec.failurePolicy': {'maxRestarts', 'restartStrategy', 'rules'},
  'spec.failurePolicy.rules': {'action', 'name', 'onJobFailureMessagePatterns', 'onJobFailureReasons',
                               'targetReplicatedJobs'},
  'spec.replicatedJobs': {'dependsOn', 'groupName', 'name', 'replicas', 'template'},
  'spec.replicatedJobs.template.spec': {
    'activeDeadlineSeconds', 'backoffLimit', 'backoffLimitPerIndex', 'completionMode', 'completions', 'managedBy',
    'manualSelector', 'maxFailedIndexes', 'parallelism', 'podFailurePolicy', 'podReplacementPolicy', 'selector',
    'successPolicy', 'suspend', 'template', 'ttlSecondsAfterFinished'},
  'spec.replicatedJobs.template.spec.podFailurePolicy.rules': {'action', 'onExitCodes', 'onPodConditions'},
  'spec.replicatedJobs.template.spec.podFailurePolicy.rules.onExitCodes': {'containerName', 'operator', 'values'},
}


def _levels(value, path=''):
  if isinstance(value, list):
    for part in value:
      yield from _levels(part, path)
  elif isinstance(value, dict):
    yield path, set(value)
    for key, part in value.items():
      yield from _levels(part, f'{path}.{key}'.lstrip('.'))


@pytest.mark.parametrize('topology, hosts', [('4x4', 4), ('2x2x4', 4), ('2x2', 1)])
def test_jobset(cloud, topology, hosts):
  said = 'say "hi" \\ $HOME & {a: b}'
  flags = ['--image', 'docker.io/me/rlhf:1', '--accelerator', 'tpu-v5p-slice', '--topology', topology, '--bucket', 'mine']
  cloud.run('jobset', '--name', 'rlhf', *flags, '--dry-run', '--', 'experiments.hh', '--note', said, name=None)
  manifest = yaml.safe_load(cloud.out)
  assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert '__' not in str(manifest)
  levels = dict(_levels(manifest))
  assert KNOWN.keys() <= levels.keys()
  assert not {path: levels[path] - known for path, known in KNOWN.items() if levels[path] - known}
  policy, job = manifest['spec']['failurePolicy'], manifest['spec']['replicatedJobs'][0]['template']['spec']
  assert policy['maxRestarts'] == 5
  assert policy['rules'][0]['action'] == 'FailJobSet' and policy['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
  assert job['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [2]
  assert (job['parallelism'], job['completions'], job['backoffLimit']) == (hosts, hosts, 0)
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never' and pod['containers'][0]['resources']['limits'] == {'google.com/tpu': 4}
  together = ['--processes.coordinator', 'auto'] if hosts > 1 else []
  assert pod['containers'][0]['command'] == ['python', '-m', 'experiments.hh', '--note', said, *together]
