import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from rlhf_jax.errors import ConfigError, ShardingError
from rlhf_jax.model import partition
from rlhf_jax.runners import pmapped, sharded

MESH = {'data': 2, 'fsdp': 2, 'tensor': 4}


def _shape(*sizes):
  return np.empty(sizes, np.bool_)


def test_a_suffix_is_a_sharding():
  tree = {'params': {'blocks': {'q_LDNH': _shape(3, 8, 4, 5), 'o_bias_LD': _shape(3, 8)}, 'embedding_VD': _shape(16, 8)},
          'tokens_BT': _shape(4, 7), 'step': np.int32(1)}
  assert partition.specs(tree, MESH) == {
    'params': {'blocks': {'q_LDNH': Spec(None, 'fsdp', 'tensor', None), 'o_bias_LD': Spec(None, 'fsdp')},
               'embedding_VD': Spec(('tensor', 'fsdp'), None)},
    'tokens_BT': Spec(('data', 'fsdp'), None), 'step': Spec()}


def test_a_name_without_a_rule_is_not_replicated_by_accident():
  with pytest.raises(ShardingError, match=r"no partition rule covers 'kernel' of shape \(4, 4\)"):
    partition.specs({'kernel': _shape(4, 4)}, MESH)
  with pytest.raises(ShardingError, match=r"no partition rule covers 'q_DNH' of shape \(4, 4\)"):
    partition.specs({'q_DNH': _shape(4, 4)}, MESH)


def test_sizes_that_a_mesh_does_not_divide_are_named():
  with pytest.raises(ShardingError, match=r"blocks/q_LDNH has N=6, which mesh axis 'tensor' \(4 devices\).*Use 2 there"):
    partition.specs({'blocks': {'q_LDNH': _shape(3, 8, 6, 5)}}, MESH)
  with pytest.raises(ShardingError, match=r"tokens_BT has B=6, which mesh axis 'data' x 'fsdp' \(8 devices\)"):
    sharded(data=4, fsdp=2).place({'tokens_BT': _shape(6, 3)}, 'batch')
  with pytest.raises(ShardingError, match=r"tokens_BT has B=6, which mesh axis 'data' \(8 devices\)"):
    pmapped().place({'tokens_BT': _shape(6, 3)}, 'batch')


def test_a_mesh_that_does_not_multiply_to_the_devices():
  with pytest.raises(ShardingError, match='data=2 x fsdp=3 x tensor=1 needs 6 devices, but there are 8'):
    sharded(data=2, fsdp=3)
  with pytest.raises(ShardingError, match='data=1 x fsdp=3 x tensor=5 needs 15 devices, but there are 8'):
    sharded(fsdp=3, tensor=5)


def test_rules_can_be_changed_but_not_misspelt():
  runner = sharded(data=2, tensor=4, rules={'N': None})
  assert runner.shardings({'q_DNH': _shape(8, 6, 5)}, 'params')['q_DNH'].spec == Spec('fsdp', None, None)
  with pytest.raises(ConfigError, match=r"partition rules for \['Q'\]"):
    sharded(data=8, rules={'Q': 'tensor'})


@pytest.mark.parametrize('name, shape, rules, used, kept', [
  ('up_DF', (8, 12), None, Spec(None, 'tensor'), Spec('fsdp', 'tensor')),
  ('up_DF', (8, 12), {'D': None, 'F': ('tensor', 'fsdp')}, Spec(None, 'tensor'), Spec(None, ('tensor', 'fsdp'))),
  ('embedding_VD', (12, 8), None, Spec('tensor', None), Spec(('tensor', 'fsdp'), None)),
  ('embedding_VD', (9, 8), None, Spec(None, None), Spec(None, ('tensor', 'fsdp'))),
])
def test_a_parameter_is_gathered_and_its_gradient_laid_out_as_it_is_kept(name, shape, rules, used, kept):
  runner = sharded(data=2, fsdp=2, tensor=2, rules=rules)
  weight = {name: jax.ShapeDtypeStruct(shape, np.float32)}
  assert runner.shardings(weight, 'params')[name].spec == kept
  learn = runner.compile(jax.grad(lambda tree: (partition.gathered(tree[name], name) ** 2).sum()), inputs=('params',),
                         outputs='same')
  pins = [equation.params['sharding'].spec for equation in learn.trace(weight).jaxpr.jaxpr.eqns
          if equation.primitive.name == 'sharding_constraint']
  assert pins == [used, used, kept, Spec()]                                     # forward, the gradient twice, the result
