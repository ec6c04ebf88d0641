"""Runners: what lies where, what is copied, what is refused, and what comes back whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as Spec
from workloads import POLICY, RUNNERS, batch_of, prompts

from rlhf_jax.errors import ConfigError, ShardingError
from rlhf_jax.generate import generate
from rlhf_jax.losses.language import cross_entropy
from rlhf_jax.maths.sampling import Sampling
from rlhf_jax.model.heads import LanguageModel, initial_params
from rlhf_jax.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.runners import pmapped, sharded, single
from rlhf_jax.step import init_state, make_train_step

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, epsilon=1e-5))


def specs(runner, **shapes):
  tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  return {name: sharding.spec for name, sharding in runner.shardings(tree, 'params').items()}


class TestMeshes:
  @pytest.mark.parametrize('sizes, says', [
    ({'fsdp': 0}, 'data=8 x fsdp=0 x tensor=1 needs 0 devices, but there are 8. Choose sizes whose product is 8'),
    ({'tensor': -1}, 'tensor=-1'),
    ({'data': 0, 'fsdp': 8}, 'data=0 x fsdp=8'),
    ({'data': 2, 'fsdp': 2}, 'data=2 x fsdp=2 x tensor=1 needs 4 devices'),
    ({'fsdp': 16}, 'data=1 x fsdp=16 x tensor=1 needs 16 devices'),
  ])
  def test_sizes_that_are_no_mesh(self, sizes, says):
    with pytest.raises(ShardingError, match=says):
      sharded(**sizes)

  def test_data_takes_the_devices_that_are_left(self):
    assert dict(sharded(fsdp=2).mesh.shape) == {'data': 4, 'fsdp': 2, 'tensor': 1}
    assert dict(sharded(fsdp=2, devices=jax.devices()[:4]).mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 1}
    assert dict(pmapped(jax.devices()[2:5]).mesh.shape) == {'data': 3}
    assert list(single(jax.devices()[3]).mesh.devices.flat) == [jax.devices()[3]]

  @pytest.mark.parametrize('rules, says', [
    ({'N': 'model'}, "the partition rule for N names the mesh axis 'model'. Known: data, fsdp, tensor"),
    ({'F': ('tensor', 'expert')}, "the partition rule for F names the mesh axis 'expert'"),
    ({'embedding_VD': (None, ('fsdp', 'x'))}, "the partition rule for embedding_VD names the mesh axis 'x'"),
    ({'B': 'data'}, r"a partition rule for B \('data'\). A batch is always split over data x fsdp: size the mesh"),
    ({'q': None}, r"partition rules for \['q'\], which no array here has"),
  ])
  def test_rules_that_cannot_work(self, rules, says):
    with pytest.raises(ConfigError, match=says):
      sharded(data=8, rules=rules)

  def test_a_changed_letter_reaches_the_embedding(self):
    shapes = {'embedding_VD': (16, 8), 'unembed_DV': (8, 16)}
    assert specs(sharded(fsdp=2, tensor=2), **shapes) == {
      'embedding_VD': Spec(('tensor', 'fsdp'), None), 'unembed_DV': Spec('fsdp', 'tensor')}
    assert specs(sharded(fsdp=2, tensor=2, rules={'V': None}), **shapes) == {
      'embedding_VD': Spec(None, 'fsdp'), 'unembed_DV': Spec('fsdp', None)}
    mine = sharded(fsdp=2, tensor=2, rules={'V': None, 'embedding_VD': (None, None)})
    assert specs(mine, **shapes)['embedding_VD'] == Spec(None, None)
    assert specs(sharded(fsdp=2, tensor=2), **shapes)['unembed_DV'] == Spec('fsdp', 'tensor')  # and no other runner

  @pytest.mark.parametrize('name, shape', [('bias', (4,)), ('step', (2, 2)), ('count', (3,)), ('kernel', (2, 2))])
  def test_a_name_for_a_number_is_no_licence_to_replicate(self, name, shape):
    with pytest.raises(ShardingError, match=f"no partition rule covers '{name}'"):
      specs(sharded(fsdp=2), **{name: shape})
    assert specs(sharded(fsdp=2), **{name: ()}) == {name: Spec()}

  def test_what_is_the_same_everywhere_needs_no_name(self):
    tree = RUNNERS['fsdp']().place({'anything': np.ones((3, 5)), 'key': jax.random.key(0)}, 'same')
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(tree))


class TestPlaces:
  def test_what_lies_there_already_is_the_same_array(self):
    for make in RUNNERS.values():
      runner = make()
      tree = {'q_LDNH': np.ones((2, 8, 4, 3), np.float32), 'step': np.int32(3)}
      placed = runner.place(tree, 'params')
      again = runner.place(placed, 'params')
      assert all(x is y for x, y in zip(jax.tree.leaves(placed), jax.tree.leaves(again), strict=True))
      np.testing.assert_array_equal(runner.fetch(placed)['q_LDNH'], tree['q_LDNH'])

  def test_another_kind_or_runner_moves_it(self):
    fsdp, tensor = RUNNERS['fsdp'](), RUNNERS['tensor']()
    x_BT = np.arange(128.).reshape(8, 16)
    everywhere = fsdp.place({'x_BT': x_BT}, 'same')
    cut = fsdp.place(everywhere, 'batch')
    elsewhere = tensor.place(cut, 'batch')
    shapes = [tree['x_BT'].addressable_shards[0].data.shape for tree in (everywhere, cut, elsewhere)]
    assert shapes == [(8, 16), (1, 16), (4, 16)]
    assert elsewhere['x_BT'].sharding.mesh == tensor.mesh
    np.testing.assert_array_equal(tensor.fetch(elsewhere)['x_BT'], x_BT)

  @pytest.mark.parametrize('where', RUNNERS)
  def test_a_copy_outlives_its_source(self, where):
    runner = RUNNERS[where]()
    source = runner.place({'x_DN': np.arange(64., dtype=np.float32).reshape(8, 8)}, 'params')
    pointers = lambda tree: {shard.data.unsafe_buffer_pointer() for shard in tree['x_DN'].addressable_shards}
    copied = runner.copy(source)
    assert not pointers(copied) & pointers(source)
    assert copied['x_DN'].sharding == source['x_DN'].sharding
    run = runner.compile(lambda p, x: {'x_DN': p['x_DN'] + 1}, inputs=('params', 'batch'), outputs='params', donate=(0,))
    run(source, {'x_B': np.zeros(8)})
    assert source['x_DN'].is_deleted()
    np.testing.assert_array_equal(runner.fetch(copied)['x_DN'], np.arange(64.).reshape(8, 8))

  @pytest.mark.parametrize('where', RUNNERS)
  def test_fetched_arrays_are_whole(self, where):
    runner = RUNNERS[where]()
    placed = runner.place(batch_of('reward'), 'batch')
    fetched = runner.fetch(placed)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(fetched))
    jax.tree.map(np.testing.assert_array_equal, fetched, jax.device_get(batch_of('reward')))
    assert jax.tree.map(np.shape, placed) == jax.tree.map(np.shape, batch_of('reward'))


@pytest.fixture(scope='module')
def state():
  """Parameters and moments of the workloads' policy, cut over fsdp x tensor."""
  return RUNNERS['fsdp x tensor']().initialise(lambda key: init_state(initial_params(POLICY, key), OPTIMIZER),
                                               jax.random.key(3))


class TestInitialise:
  def test_leaves_are_cut_as_their_names_say(self, state):
    moments = state.opt_state[1]
    for tree in (state.params, moments.mu, moments.nu):
      blocks = tree['backbone']['blocks']
      assert blocks['q_LDNH'].sharding.spec == Spec(None, 'fsdp', 'tensor', None)
      assert blocks['k_LDKH'].sharding.spec == Spec(None, 'fsdp', 'tensor', None)
      assert blocks['o_LNHD'].sharding.spec == Spec(None, 'tensor', None, 'fsdp')
      assert blocks['down_LFD'].sharding.spec == Spec(None, 'tensor', 'fsdp')
      assert blocks['up_LDF'].sharding.spec == Spec(None, 'fsdp', 'tensor')
      assert blocks['attention_norm_LD'].sharding.spec == Spec(None, 'fsdp')
      assert tree['backbone']['embedding_VD'].sharding.spec == Spec(('tensor', 'fsdp'), None)
      assert tree['unembed']['unembed_DV'].sharding.spec == Spec('fsdp', 'tensor')
    assert state.step.sharding.spec == moments.count.sharding.spec == Spec()

  def test_a_device_holds_its_share(self, state):
    for path, x in jax.tree_util.tree_leaves_with_path(state):
      ways = 4 if x.ndim >= 2 and 'norm' not in str(path) else 2 if x.ndim else 1  # over data=2, all is there twice
      assert len(x.addressable_shards) == 8
      assert {shard.data.nbytes for shard in x.addressable_shards} == {x.nbytes // ways}, path
    whole = RUNNERS['fsdp']().place(state, 'params').params['backbone']['blocks']['q_LDNH']
    assert {shard.data.nbytes for shard in whole.addressable_shards} == {whole.nbytes // 8}

  def test_numbers_are_those_of_one_device(self, state):
    alone = single().initialise(functools.partial(initial_params, POLICY), jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(alone))

  def test_the_abstract_state_is_the_state(self, state):
    abstract = RUNNERS['fsdp x tensor']().abstract(lambda key: init_state(initial_params(POLICY, key), OPTIMIZER),
                                                   jax.random.key(3))
    described = lambda x: (x.shape, x.dtype, x.sharding)
    assert jax.tree.map(described, abstract) == jax.tree.map(described, state)


class TestCompile:
  @pytest.mark.parametrize('where', RUNNERS)
  def test_one_result_or_several(self, where):
    runner = RUNNERS[where]()
    x_BT, weight_D = np.arange(48., dtype=np.float32).reshape(16, 3), np.arange(8., dtype=np.float32)
    total = lambda x: x.sum() if runner.axis_name is None else jax.lax.psum(x.sum(), runner.axis_name)
    one = runner.compile(lambda p, x: {'y_BT': x['x_BT'] * p['weight_D'].sum()}, inputs=('params', 'batch'),
                         outputs='batch')
    several = runner.compile(lambda p, x, n: ({'y_BT': x['x_BT'] + n}, total(x['x_BT']), p),
                             inputs=('params', 'batch', 'same'), outputs=('batch', 'same', 'params'))
    params, batch = {'weight_D': weight_D}, {'x_BT': x_BT}
    np.testing.assert_array_equal(runner.fetch(one(params, batch))['y_BT'], x_BT * 28)
    made, number, params = runner.fetch(several(params, batch, np.float32(2)))
    np.testing.assert_array_equal(made['y_BT'], x_BT + 2)
    assert number == x_BT.sum()
    np.testing.assert_array_equal(params['weight_D'], weight_D)

  @pytest.mark.parametrize('where', RUNNERS)
  def test_results_lie_where_the_next_call_wants_them(self, where):
    runner = RUNNERS[where]()
    grow = runner.compile(lambda p, x: ({'x_DN': p['x_DN'] + 1}, x), inputs=('params', 'batch'), outputs=('params', 'batch'))
    made = params, batch = grow({'x_DN': np.zeros((8, 8), np.float32)}, {'x_BT': np.ones((8, 2), np.float32)})
    assert runner.place(params, 'params')['x_DN'] is params['x_DN']
    again, _ = runner.fetch(grow(*made))
    np.testing.assert_array_equal(again['x_DN'], np.full((8, 8), 2))
    assert 'add' in grow.lower(params, batch).as_text()

  def test_a_batch_that_the_devices_do_not_divide(self):
    for runner, says in ((sharded(data=4, fsdp=2), "x_BT has B=12, which mesh axis 'data' x 'fsdp'"),
                         (pmapped(), "x_BT has B=12, which mesh axis 'data'")):
      run = runner.compile(lambda x: x, inputs=('batch',), outputs='batch')
      with pytest.raises(ShardingError, match=rf'{says} \(8 devices\) does not divide. Use 4 there'):
        run({'x_BT': np.zeros((12, 3))})

  def test_a_cut_inside_the_model_that_the_devices_do_not_divide(self):
    """16 sequences lie well on 8 devices, but not 4 pieces of 4."""
    runner = RUNNERS['fsdp']()
    state = runner.abstract(lambda key: init_state(initial_params(POLICY, key), OPTIMIZER), jax.random.key(3))
    step = make_train_step(cross_entropy(POLICY), OPTIMIZER, microbatches=4)
    with jax.set_mesh(runner.mesh), pytest.raises(ShardingError, match=r'^4 sequences at a time, which the 8 devices'):
      jax.eval_shape(step, state, batch_of('sft'), jax.random.key(0))
    with jax.set_mesh(runner.mesh), pytest.raises(ShardingError, match=r'^4 prompts on 4 slots'):
      jax.eval_shape(functools.partial(generate, POLICY, sampling=Sampling(new_tokens=2)), state.params, prompts(rows=4),
                     jax.random.key(0))


def test_a_vocabulary_without_divisors_trains_on_a_mesh():
  """GPT-2's 50257 tokens, here 61: no mesh axis divides them, so the embedding is cut along the width."""
  model = LanguageModel(tiny.config('gpt2', vocab_size=61, context_length=16))
  batch = dataclasses.replace(batch_of('sft'), tokens_BT=batch_of('sft').tokens_BT % 61)

  def train(runner):
    state = runner.initialise(lambda key: init_state(initial_params(model, key), OPTIMIZER), jax.random.key(3))
    step = runner.compile(make_train_step(cross_entropy(model), OPTIMIZER), inputs=('params', 'batch', 'same'),
                          outputs=('params', 'same'))
    after, metrics = step(state, batch, jax.random.key(0))
    return after, runner.fetch(metrics)['loss'].value()
  (alone, loss_alone), (after, loss) = train(single()), train(sharded(data=4, fsdp=2))
  assert after.params['backbone']['embedding_VD'].addressable_shards[0].data.shape == (61, 12)
  np.testing.assert_allclose(loss, loss_alone, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), jax.device_get(after.params),
               jax.device_get(alone.params))
