"""What is read off programs, against sums by hand, XLA's own count and closed formulas; see test_planner.py for a run's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import compiled
from rlhf_jax.model.attention import Causal, attend

OTHERS = '''
%negated (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %n = f32[100]{0} negate(%p)
}
%twice (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %n = f32[100]{0} negate(%p)
  ROOT %m = f32[100]{0} negate(%n)
}
%cut (p: f32[100]) -> f32[10] {
  %p = f32[100]{0} parameter(0)
  ROOT %n = f32[10]{0} slice(%p), slice={[0:10]}
}
%looked_up (p: f32[100], j: s32[]) -> f32[10] {
  %p = f32[100]{0} parameter(0)
  %j = s32[] parameter(1)
  %part = f32[10]{0} dynamic-slice(%p, %j), dynamic_slice_sizes={10}
  ROOT %n = f32[10]{0} negate(%part)
}
%written (p: f32[100], q: f32[10], j: s32[]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %q = f32[10]{0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %n = f32[100]{0} dynamic-update-slice(%p, %q, %j)
}
%looked_up_inside (q: f32[100], j: s32[]) -> f32[10] {
  %q = f32[100]{0} parameter(0)
  %j = s32[] parameter(1)
  %b = f32[10,10]{1,0} bitcast(%q)
  ROOT %r = f32[10]{0} fusion(%b, %j), kind=kLoop, calls=%looked_up
}
%scattered (p: f32[800]) -> f32[100] {
  %p = f32[800]{0} parameter(0)
  ROOT %s = f32[100]{0} reduce-scatter(%p), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}
}
%goes_on (p: f32[100]) -> pred[] {
  %p = f32[100]{0} parameter(0)
  ROOT %n = pred[] custom-call(%p), custom_call_target="ask"
}
'''


def traffic(*lines, trips=(), hosts=()):
  """Of a program with these instructions; x and y have 100 numbers, part 10, i one."""
  given = ('%x = f32[100]{0} parameter(0)', '%y = f32[100]{0} parameter(1)', '%part = f32[10]{0} parameter(2)',
           '%i = s32[] parameter(3)')
  body = '\n'.join(f'  {line}' for line in (*given, *lines))
  return compiled.traffic(OTHERS + f'ENTRY %main (x: f32[100]) -> f32[100] {{\n{body}\n}}\n', trips, hosts)


@pytest.mark.parametrize('numbers, lines', [
  (300, ['ROOT %a = f32[100]{0} add(%x, %y)']),
  (200, ['ROOT %a = f32[100]{0:S(1)} add(%x, %y)']),                            # the result stays on the chip
  (150, ['ROOT %a = bf16[100]{0} negate(%x)']),
  (20, ['ROOT %a = f32[10]{0} dynamic-slice(%x, %i), dynamic_slice_sizes={10}']),
  (20, ['ROOT %a = f32[100]{0} dynamic-update-slice(%x, %part, %i)']),
  (20 + 1, ['ROOT %a = f32[10]{0} fusion(%x, %i), kind=kLoop, calls=%looked_up']),
  (20 + 1, ['ROOT %a = f32[100]{0} fusion(%x, %part, %i), kind=kLoop, calls=%written']),
  (0, ['%t = (f32[100]{0}, f32[100]{0}) tuple(%x, %y)', 'ROOT %a = f32[100]{0} get-tuple-element(%t), index=0']),
  (200, ['%c = (f32[100]{0}, f32[100]{0}, u32[]) copy-start(%x)', 'ROOT %a = f32[100]{0} copy-done(%c)']),
  (20, ['%c = ((f32[100]{0}), f32[10]{0}, u32[]) async-start(%x), calls=%cut', 'ROOT %a = f32[10]{0} async-done(%c)']),
  (200, ['ROOT %a = f32[100]{0} call(%x), to_apply=%negated']),
  (400, ['ROOT %a = f32[100]{0} conditional(%i, %x, %x), branch_computations={%negated, %twice}']),
  (400, ['ROOT %a = f32[100]{0} conditional(%i, %x, %x), true_computation=%twice, false_computation=%negated']),
  (7 * 200, ['ROOT %a = f32[100]{0} while(%x), condition=%goes_on, body=%negated, '
             'backend_config={"known_trip_count":{"n":"7"}}']),
  (3 * 200, ['ROOT %a = f32[100]{0} while(%x), condition=%goes_on, body=%negated']),
  (20 + 1, ['ROOT %a = f32[10]{0} fusion(%x, %i), kind=kCustom, calls=%looked_up_inside']),
  # Kernels of libraries, as a GPU runs them: what they work in is not read, nor is it counted as a result.
  (300, ['ROOT %a = (f32[100]{0}, s8[4194304]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm"']),
  (300, ['ROOT %a = f32[100]{0} custom-call(%x, %y), custom_call_target="__cublas$lt$matmul"']),
  (310, ['ROOT %a = (f32[100]{0}, f32[10]{0}, u8[99]{0}) custom-call(%x, %y), '
         'custom_call_target="__cudnn$fmhaScaleBiasSoftmax"']),
  (125, ['ROOT %a = s8[100]{0} custom-call(%x), custom_call_target="mine"']),
  (900, ['%s = (f32[100]{0}, f32[800]{0}) all-gather-start(%x), channel_id=3, replica_groups=[1,8]<=[8]',
         'ROOT %a = f32[800]{0} all-gather-done(%s)']),
  (1800, ['%g = f32[800]{0} all-gather(%x), channel_id=3, replica_groups=[1,8]<=[8]',
          '%s = ((f32[800]{0}), f32[100]{0}) async-start(%g), calls=%scattered',
          'ROOT %a = f32[100]{0} async-done(%s)']),
])
def test_bytes_of_memory(numbers, lines):
  assert traffic(*lines, trips=(3,)).hbm == 4 * numbers


@pytest.mark.parametrize('groups', ['[2,4]<=[8]', '{{0,1,2,3},{4,5,6,7}}', "mesh['a'=2,'b'=4] {'b'}"])
@pytest.mark.parametrize('kind, share', [('all-gather', 3), ('all-reduce', 2 * 3 / 4), ('reduce-scatter', 3 / 4),
                                         ('all-to-all', 3 / 4)])
def test_bytes_in_a_ring_of_four(kind, share, groups):
  found = traffic(f'ROOT %a = f32[100]{{0}} {kind}(%x), channel_id=1, replica_groups={groups}')
  assert (dict(found.sent), dict(found.count)) == ({kind: share * 400}, {kind: 1})


def test_a_collective_that_is_started_and_awaited_is_sent_once():
  found = traffic('%s = (f32[100]{0}, f32[800]{0}) all-gather-start(%x), channel_id=3, replica_groups=[1,8]<=[8]',
                  '%g = f32[800]{0} all-gather-done(%s)',
                  '%r = ((f32[800]{0}), f32[100]{0}) async-start(%g), calls=%scattered',
                  'ROOT %a = f32[100]{0} async-done(%r)')
  assert found.sent == {'all-gather': 7 * 400, 'reduce-scatter': 7 / 8 * 3200}
  assert found.count == {'all-gather': 1, 'reduce-scatter': 1}


@pytest.mark.parametrize('groups, expected', [
  ('{{0,1,2,3},{4,5,6,7}}', [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ('[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ('[4,2]<=[2,4]T(1,0)', [[0, 4], [1, 5], [2, 6], [3, 7]]),
  ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
  ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
])
def test_who_takes_part_in_a_collective(groups, expected):
  assert compiled._groups(f', channel_id=1, replica_groups={groups}, use_global_device_ids=true') == expected


TWO_HOSTS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize('kind, groups, share', [
  ('all-gather', '{{0,1,2,3},{4,5,6,7}}', 0),                                   # within each host
  ('all-gather', '[4,2]<=[2,4]T(1,0)', 1),                                      # one chip on each host
  ('all-reduce', '{{0,1,4,5},{2,3,6,7}}', 1 / 2),                               # two rings, each leaves from another chip
  ('reduce-scatter', '[1,8]<=[8]', 1 / 4),
  ('all-to-all', '[1,8]<=[8]', 4 / 7),                                          # of seven others, four are elsewhere
])
def test_bytes_that_leave_a_host(kind, groups, share):
  line = f'ROOT %a = f32[100]{{0}} {kind}(%x), channel_id=1, replica_groups={groups}'
  found = traffic(line, hosts=TWO_HOSTS)
  assert found.network == pytest.approx(share * found.sent[kind])
  assert traffic(line).network == 0                                             # chips that are all alike


@pytest.mark.parametrize('pairs, leaves', [('{{0,1},{1,0}}', 0), ('{{0,1},{3,4}}', 400)])
def test_bytes_that_leave_a_host_for_one_neighbour(pairs, leaves):
  found = traffic(f'ROOT %a = f32[100]{{0}} collective-permute(%x), source_target_pairs={pairs}', hosts=TWO_HOSTS)
  assert (found.sent['collective-permute'], found.network) == (400, leaves)


@pytest.mark.parametrize('line, leaves', [
  ('while(%x), condition=%goes_on, body=%joined', 3 * 400),
  ('conditional(%x, %x, %x), true_computation=%joined, false_computation=%negated', 400),
])
def test_what_leaves_a_host_in_a_loop_and_in_a_branch(line, leaves):
  joined = ('%joined (p: f32[100]) -> f32[100] {\n  %p = f32[100]{0} parameter(0)\n'
            '  ROOT %j = f32[100]{0} all-reduce(%p), replica_groups={{0,4}}\n}\n')
  text = (f'{OTHERS}{joined}ENTRY %main (x: f32[100]) -> f32[100] {{\n  %x = f32[100]{{0}} parameter(0)\n'
          f'  ROOT %a = f32[100]{{0}} {line}\n}}\n')
  assert compiled.traffic(text, (3,), TWO_HOSTS).network == leaves


def test_bytes_to_one_neighbour_and_to_nobody():
  found = traffic('ROOT %a = f32[100]{0} collective-permute(%x), source_target_pairs={{0,1}}')
  assert found.sent == {'collective-permute': 400}
  assert traffic('ROOT %a = f32[100]{0} all-reduce(%x), replica_groups={{0},{1}}').sent == {}


@pytest.mark.parametrize('fn', [lambda x, w: x @ w, lambda x, w: jax.nn.silu(x @ w) * x, lambda x, w: (x @ w).sum(0)],
                         ids=['product', 'product and more', 'product and sum'])
def test_bytes_are_those_of_xla(fn):
  executable = jax.jit(fn).lower(*(jax.ShapeDtypeStruct((256, 256), 'float32'),) * 2).compile()
  assert compiled.traffic(executable.as_text()).hbm == pytest.approx(executable.cost_analysis()['bytes accessed'], rel=0.01)


def test_a_loop_is_so_often_its_body():
  """XLA's own count takes the body once."""
  ten, sixty = (jax.jit(lambda x, w, n=n: jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)).lower(
    *(jax.ShapeDtypeStruct((256, 256), 'float32'),) * 2).compile() for n in (10, 60))
  ours, more = (compiled.traffic(executable.as_text()).hbm for executable in (ten, sixty))
  assert ours - 9 * (more - ours) / 50 == pytest.approx(ten.cost_analysis()['bytes accessed'], rel=0.01)


def operations(window=None, gradient=False):
  """(all, repeated) of a kernel: 2 sequences, 4 heads on 2, 4096 tokens, head width 64."""
  q, k = (jax.ShapeDtypeStruct((2, n, 4096, 64), 'bfloat16') for n in (4, 2))
  total = lambda q, k, v, s: attend(q.swapaxes(1, 2), k, v, Causal(s, window=window), 'splash').astype(jnp.float32).sum()
  fn = jax.grad(total, argnums=(0, 1, 2)) if gradient else total
  return compiled.flops(jax.jit(fn).trace(q, k, k, jax.ShapeDtypeStruct((2, 4096), 'int32')).jaxpr.jaxpr)


@pytest.mark.parametrize('window, computed', [(None, 8 * 9 / 2), (1200, 1 + 2 + 3 + 5 * 4)])
def test_operations_of_a_kernel(window, computed):
  """It computes blocks of 512 x 512 as a whole, of which some pair is seen."""
  slot = np.arange(4096)
  age = slot[:, None] - slot
  seen = (age >= 0) & (age < (window or 4096))
  blocks = seen.reshape(8, 512, 8, 512).any((1, 3)).sum()
  assert blocks == computed
  every, repeated = operations(window)
  assert (every, repeated) == (2 * 4 * 4 * 64 * 512 * 512 * blocks, 0)
  with_gradient, again = operations(window, gradient=True)                      # 2 products, then 7, of them 3 again
  assert with_gradient == pytest.approx(4.5 * every, rel=1e-3) and again == pytest.approx(1.5 * every, rel=1e-3)


@pytest.mark.parametrize('T, S, causal, window', [
  (512, 512, True, None), (512, 512, False, None), (565, 565, True, None), (300, 700, True, None), (1024, 1024, True, 200)])
def test_scores_of_a_kernel_of_cudnn(T, S, causal, window):
  """Those of all blocks of 128 queries and 128 keys of which some pair is seen."""
  query, key = np.arange(T)[:, None] + S - T, np.arange(S)
  seen = (key <= query if causal else np.full((T, S), True)) & (query - key < (window or S + T))
  computed = sum(block.size for rows in np.split(seen, range(128, T, 128)) for block in np.split(rows, range(128, S, 128), 1)
                 if block.any())
  assert compiled._computed(T, S, causal, window) == computed
