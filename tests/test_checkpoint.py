"""What is saved comes back bit for bit, on any devices; what is damaged or of another model is said to be."""

import gc
import os
import pathlib
import resource
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from workloads import POLICY, RUNNERS

from rlhf_jax.checkpoint import Checkpoints, digest, read_meta, restore_part
from rlhf_jax.errors import CheckpointError, ConfigError
from rlhf_jax.model.heads import initial_params
from rlhf_jax.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.records import TrainState

META = {'kl_weight': 0.1 + 0.2, 'seed': 7, 'digest': 'a1b2', 'sizes': [3, 5]}


@pytest.fixture(scope='module')
def state():
  """Parameters, optimizer state and counts of a small model, with all kinds of bits: bfloat16, negative zeros, NaNs."""
  params = jax.jit(initial_params, static_argnums=0)(POLICY, jax.random.key(3))
  opt_state = make_optimizer(OptimizerConfig(moment_dtype='bfloat16')).init(params)
  leaves, tree = jax.tree.flatten(opt_state)
  rng = np.random.default_rng(11)
  leaves = [jnp.asarray(rng.normal(size=x.shape), x.dtype) if x.ndim else x + 41 for x in leaves]
  odd = jnp.array([-0.0, jnp.nan, 1e-42])
  params['backbone']['embedding_VD'] = params['backbone']['embedding_VD'].at[0, :3].set(odd)
  return TrainState(jnp.int32(41), params, jax.tree.unflatten(tree, leaves))


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _abstract_on(runner, state):
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
                      runner.shardings(state, 'params'))


def _save(directory, *steps_and_states, **options):
  with Checkpoints(directory, **options) as checkpoints:
    for step, state in steps_and_states:
      checkpoints.save(step, state, META | {'step': step})


def _plus(state, number):
  """The same state, one step's worth different."""
  return state.replace(step=state.step + number)


def _assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert x.tobytes() == y.tobytes()


def _largest_file(step_directory):
  return max((path for path in pathlib.Path(step_directory).rglob('*') if path.is_file()), key=os.path.getsize)


def _flip_a_bit(path, *, everywhere=False):
  content = bytearray(path.read_bytes())
  for place in range(0, len(content), 500) if everywhere else [len(content) // 2]:
    content[place] ^= 4
  path.write_bytes(content)


def _change_the_seed(path):
  path.write_text(path.read_text().replace('"seed": 7', '"seed": 8'))


def test_round_trip_is_bit_identical(tmp_path, state):
  with Checkpoints(tmp_path / 'run') as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.save(41, state, META)
    checkpoints.wait()
    assert checkpoints.latest() == 41
  with Checkpoints(tmp_path / 'run') as checkpoints:
    restored, meta = checkpoints.restore(_abstract(state))
  _assert_same_bits(restored, state)
  assert meta == META == read_meta(tmp_path / 'run')
  assert isinstance(restored.opt_state[1], optax.ScaleByAdamState)
  assert restored.opt_state[1].count.dtype == jnp.int32
  assert restored.opt_state[1].mu['backbone']['embedding_VD'].dtype == jnp.bfloat16


def test_a_relative_directory_will_do(tmp_path, state, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _save('run', (1, state))
  assert read_meta('run')['step'] == 1
  assert (tmp_path / 'run' / '1').is_dir()


def test_what_one_mesh_saved_another_restores(tmp_path, state):
  fsdp = RUNNERS['fsdp']()
  _save(tmp_path, (1, fsdp.place(state, 'params')))
  for name in ('tensor', 'single'):
    abstract = _abstract_on(RUNNERS[name](), state)
    with Checkpoints(tmp_path) as checkpoints:
      restored, _ = checkpoints.restore(abstract)
    _assert_same_bits(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)


def test_a_mesh_that_does_not_divide_is_no_damage(tmp_path):
  _save(tmp_path, (1, {'x_D': jnp.arange(12.)}))
  sharding = RUNNERS['fsdp']().shardings({'x_D': jnp.zeros(16)}, 'params')['x_D']
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match='evenly divide') as error:
    checkpoints.restore({'x_D': jax.ShapeDtypeStruct((12,), jnp.float32, sharding=sharding)})
  assert not isinstance(error.value, CheckpointError)


def test_saving_goes_on_while_the_state_is_donated(tmp_path):
  step = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.5 + 1, state), donate_argnums=0)
  start = np.random.default_rng(5).normal(size=(4, 1 << 18)).astype(np.float32)
  state, seen = {'x_CD': jnp.asarray(start.copy())}, {}
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    for number in range(3):
      seen[number] = np.array(state['x_CD'])
      checkpoints.save(number, state, {})
      state = step(state)
    for number, expected in seen.items():
      restored, _ = checkpoints.restore(_abstract(state), number)
      np.testing.assert_array_equal(restored['x_CD'], expected)
  np.testing.assert_array_equal(seen[0], start)


def test_keeps_the_newest_and_saves_each_step_once(tmp_path, state):
  _save(tmp_path, *((step, _plus(state, step)) for step in (1, 2, 5)), keep=2)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '5']
    for number in (5, 4):
      with pytest.raises(CheckpointError, match=f'has step 5 already, so step {number} would not be the newest'):
        checkpoints.save(number, state, {})
    restored, meta = checkpoints.restore(_abstract(state), 2)
    assert (restored.step, meta['step']) == (43, 2)
    with pytest.raises(CheckpointError, match=r'no complete step 1\. It has \[2, 5\]'):
      checkpoints.restore(_abstract(state), 1)
  with pytest.raises(ConfigError, match='keep is 0'):
    Checkpoints(tmp_path, keep=0)


def test_an_empty_directory_says_so(tmp_path, state):
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match='has no complete checkpoint'):
    checkpoints.restore(_abstract(state))
  with pytest.raises(CheckpointError, match='has no complete checkpoint'):
    restore_part(tmp_path / 'absent', {})
  with pytest.raises(CheckpointError, match='has no complete checkpoint'):
    read_meta(tmp_path)


class TestDamage:
  """The newest of two steps is damaged, each time in another way."""
  # Orbax forgets its other coroutines when one of them meets a damaged file; collected here, they are heard of here.
  pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

  @pytest.fixture(autouse=True)
  def _collect_coroutines(self):
    yield
    gc.collect()

  @pytest.fixture
  def run(self, tmp_path, state):
    _save(tmp_path / 'run', (1, _plus(state, 1)), (2, _plus(state, 2)))
    return tmp_path / 'run'

  @pytest.mark.parametrize('damage, says', [
    (lambda step: _flip_a_bit(_largest_file(step)), 'other bits than were saved|cannot be read'),
    (lambda step: os.truncate(_largest_file(step), os.path.getsize(_largest_file(step)) // 2), 'cannot be read'),
    (lambda step: _largest_file(step).unlink(), 'cannot be read'),
    (lambda step: os.truncate(step / 'state/_METADATA', 50), 'cannot be read'),
    (lambda step: epath.Path(step / 'state').rmtree(), 'cannot be read'),
    (lambda step: epath.Path(step / 'record').rmtree(), 'its record cannot be read'),
    (lambda step: os.truncate(step / 'record/metadata', 50), 'its record cannot be read'),
    (lambda step: _change_the_seed(step / 'record/metadata'), 'its record is not the one that was written'),
  ], ids=['flipped', 'truncated', 'absent', 'metadata', 'state', 'record', 'record truncated', 'record changed'])
  def test_falls_back_to_the_step_before(self, run, state, damage, says):
    damage(run / '2')
    with Checkpoints(run) as checkpoints:
      with pytest.warns(UserWarning, match=f'2 is damaged: .*({says}).*the step before'):
        restored, meta = checkpoints.restore(_abstract(state))
      _assert_same_bits(restored, _plus(state, 1))
      assert meta['step'] == checkpoints.latest() == 1
      checkpoints.save(2, _plus(state, 2), META)                             # the run comes to the same step again
    with Checkpoints(run) as checkpoints, warnings.catch_warnings():
      warnings.simplefilter('error', UserWarning)
      _assert_same_bits(checkpoints.restore(_abstract(state))[0], _plus(state, 2))

  def test_none_left_is_an_error(self, run, state):
    for step in (1, 2):
      _flip_a_bit(_largest_file(run / str(step)))
    with Checkpoints(run) as checkpoints, pytest.warns(UserWarning), \
         pytest.raises(CheckpointError, match=r'no step that can be read; steps \[2, 1\] are damaged'):
      checkpoints.restore(_abstract(state))

  def test_who_asked_for_the_damaged_step_gets_no_other(self, run, state):
    for path in (run / '2').rglob('d/*'):                                        # in which of them what lies, varies
      _flip_a_bit(path, everywhere=True)
    with Checkpoints(run) as checkpoints, pytest.raises(CheckpointError, match='2 is damaged'):
      checkpoints.restore(_abstract(state), 2)
    with pytest.raises(CheckpointError, match='2 is damaged'):
      restore_part(run, {'params': _abstract(state.params)})
    assert restore_part(run, {'step': _abstract(state.step)}, 1)['step'] == 42


def _without(tree, name):
  return {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize('change, says', [
  (lambda p: p | {'bias_D': jnp.zeros(3)}, 'has no params/unembed/bias_D, which is needed here'),
  (lambda p: p | {'unembed_DV': jnp.zeros((6, 5))}, r'params/unembed/unembed_DV of shape \(6, 7\) .* \(6, 5\)'),
  (lambda p: p | {'unembed_DV': jnp.zeros((6, 7), jnp.bfloat16)}, 'dtype float32, where .* bfloat16 are needed'),
  (lambda p: _without(p, 'unembed_DV'), 'has params/unembed/unembed_DV, for which there is no place'),
], ids=['missing', 'shape', 'dtype', 'extra'])
def test_another_model_is_named_by_its_first_leaf(tmp_path, change, says):
  def of(unembed):
    return {'params': {'unembed': unembed}}
  saved = {'unembed_DV': jnp.ones((6, 7))}
  _save(tmp_path, (1, of(saved)), (2, of(saved)))
  with Checkpoints(tmp_path) as checkpoints, warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)                                           # and no older step is tried
    with pytest.raises(CheckpointError, match=f'{says}.*checkpoint of another model'):
      checkpoints.restore(of(change(saved)))


def test_a_part_needs_no_optimizer(tmp_path, state):
  _save(tmp_path, (1, RUNNERS['fsdp']().place(state, 'params')), (2, _plus(state, 2)))
  wanted = {'params': {'backbone': state.params['backbone']}}
  abstract = _abstract_on(RUNNERS['tensor'](), wanted)
  for step in (None, 1):
    part = restore_part(tmp_path, abstract, step)
    _assert_same_bits(part, wanted)
    assert jax.tree.map(lambda x: x.sharding, part) == jax.tree.map(lambda x: x.sharding, abstract)
  assert restore_part(tmp_path, {'step': state.step})['step'] == 43
  with pytest.raises(CheckpointError, match='has no params/head/scale_D'):
    restore_part(tmp_path, {'params': {'head': {'scale_D': jnp.zeros(3)}}})


def test_the_digest_is_of_the_bits_and_of_where_they_lie(state):
  x_CD = np.random.default_rng(2).normal(size=(8, 48)).astype(np.float32)
  expected = digest(x_CD)
  for name in RUNNERS:
    placed = RUNNERS[name]().place({'x_FD': x_CD}, 'params')['x_FD']
    assert digest(placed) == expected, name
  for place in ((0, 0), (7, 47), (3, 20)):
    changed = x_CD.copy()
    changed.view(np.uint32)[place] ^= 1
    assert digest(changed) != expected
  assert digest(x_CD[::-1]) != expected
  assert digest(x_CD.reshape(48, 8)) == expected                              # the shape is in the record
  assert digest(np.ones(4096, np.float32)) != digest(np.zeros(4096, np.float32))
  assert digest(np.array(0.0, np.float32)) != digest(np.array(-0.0, np.float32))
  bools = [True, False, False], [False, True, False], [True, True, False]
  assert len({int(digest(np.array(x))) for x in bools}) == 3


CHILD = '''
import os, pathlib, signal, sys, time
import numpy as np, jax.numpy as jnp
from rlhf_jax.checkpoint import Checkpoints

directory, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
state = {'x_D': jnp.asarray(np.random.default_rng(0).random(1 << 23, np.float32))}   # 32 MiB that do not compress
checkpoints = Checkpoints(directory)
checkpoints.save(1, state, {})
checkpoints.wait()
checkpoints.save(2, {'x_D': state['x_D'] + 1}, {})
while moment == 'writing' and not any(directory.glob('2.*/state*')) and not (directory / '2').exists():
  time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.mark.parametrize('moment', ['started', 'writing'])
def test_killed_while_saving_the_step_before_is_there(tmp_path, moment):
  child = subprocess.run([sys.executable, '-c', CHILD, tmp_path, moment], cwd=pathlib.Path(__file__).parents[1],
                         timeout=300, check=False)
  assert child.returncode == -9
  assert moment == 'started' or any(tmp_path.glob('2.*')), 'the save was over before the kill'
  x_D = np.random.default_rng(0).random(1 << 23, np.float32)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 1
    restored, _ = checkpoints.restore({'x_D': jnp.zeros_like(x_D)})
    np.testing.assert_array_equal(restored['x_D'], x_D)
    checkpoints.save(2, restored, {})
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']        # and nothing half-written is left


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('not a directory')
  with pytest.raises(CheckpointError, match=r'cannot be written to .*file/below .*no complete step yet'):
    Checkpoints(tmp_path / 'file' / 'below')


def test_a_full_disk_leaves_the_last_step(tmp_path):
  """Files may not grow beyond a limit, which writers meet like a full disk."""
  state = {'x_D': jnp.asarray(np.random.default_rng(0).random(1 << 18, np.float32))}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
      checkpoints.save(2, jax.tree.map(jnp.negative, state), {})
      with pytest.raises(CheckpointError, match=f'cannot be written to {tmp_path} .*Step 1 there is complete'):
        checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _assert_same_bits(checkpoints.restore(_abstract(state))[0], state)
    checkpoints.save(3, state, {})                                             # space was freed
  assert read_meta(tmp_path, 3) == {}


def test_what_could_not_be_written_is_heard_of_at_the_end(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
  try:
    with pytest.raises(CheckpointError, match='no complete step yet'), Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, {'x_D': np.random.default_rng(0).random(1 << 18, np.float32)}, {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
