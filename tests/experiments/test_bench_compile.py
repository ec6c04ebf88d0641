"""What is read off compiled programs, and the bench of compile times on devices that are here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import bench_compile
from experiments.benchmarks import kernels
from rlhf_jax.model.config import PRESETS, preset

# As XLA writes a program for a GPU: a scan over 3 layers, inside it one layer.
GPU = '''
%add (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %sum = f32[] add(%a.1, %b.1)
}
%fused_cast (p.1: f32[3,8,4], p.2: s32[]) -> bf16[1,8,4] {
  %p.1 = f32[3,8,4]{2,1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,4]{2,1,0} dynamic-slice(%p.1, %p.2, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %cast = bf16[1,8,4]{2,1,0} convert(%slice)
}
%fused_product (p.3: bf16[2,8], p.4: bf16[1,8,4]) -> bf16[2,4] {
  %p.3 = bf16[2,8]{1,0} parameter(0)
  %p.4 = bf16[1,8,4]{2,1,0} parameter(1)
  %flat = bf16[8,4]{1,0} bitcast(%p.4)
  ROOT %dot.1 = bf16[2,4]{1,0} dot(%p.3, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%fused_norm (p.5: bf16[2,8]) -> bf16[2,8] {
  %p.5 = bf16[2,8]{1,0} parameter(0)
  %wide = f32[2,8]{1,0} convert(%p.5)
  %square = f32[2,8]{1,0} multiply(%wide, %wide)
  ROOT %narrow = bf16[2,8]{1,0} convert(%square)
}
%fused_transpose (p.6: bf16[2,8]) -> bf16[8,2] {
  %p.6 = bf16[2,8]{1,0} parameter(0)
  ROOT %turned = bf16[8,2]{1,0} transpose(%p.6), dimensions={1,0}
}
%body (t: (s32[], f32[3,8,4], bf16[2,8])) -> (s32[], f32[3,8,4], bf16[2,8]) {
  %t = (s32[], f32[3,8,4]{2,1,0}, bf16[2,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = f32[3,8,4]{2,1,0} get-tuple-element(%t), index=1
  %x = bf16[2,8]{1,0} get-tuple-element(%t), index=2
  %weight = bf16[1,8,4]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%fused_cast
  %norm = bf16[2,8]{1,0} fusion(%x), kind=kLoop, calls=%fused_norm, metadata={op_name="dot_general"}
  %product = bf16[2,4]{1,0} fusion(%norm, %weight), kind=kCustom, calls=%fused_product
  %library = (bf16[2,4]{1,0}, s8[64]{0}) custom-call(%norm, %weight), custom_call_target="__cublas$gemm"
  %attention = (bf16[2,8]{1,0}, u8[0]{0}) custom-call(%norm), custom_call_target="__cudnn$fmhaSoftmax"
  %y = bf16[2,8]{1,0} get-tuple-element(%attention), index=0
  ROOT %out = (s32[], f32[3,8,4]{2,1,0}, bf16[2,8]{1,0}) tuple(%i, %w, %y)
}
%condition (t.2: (s32[], f32[3,8,4], bf16[2,8])) -> pred[] {
  %t.2 = (s32[], f32[3,8,4]{2,1,0}, bf16[2,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}
ENTRY %main (x.1: bf16[2,8], w.1: f32[3,8,4]) -> bf16[8,2] {
  %x.1 = bf16[2,8]{1,0} parameter(0)
  %w.1 = f32[3,8,4]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %kept = bf16[2,8]{1,0} copy(%x.1)
  %laid = bf16[2,8]{0,1} copy(%kept)
  %init = (s32[], f32[3,8,4]{2,1,0}, bf16[2,8]{1,0}) tuple(%start, %w.1, %kept)
  %loop = (s32[], f32[3,8,4]{2,1,0}, bf16[2,8]{1,0}) while(%init), condition=%condition, body=%body, KNOWN
  %last = bf16[2,8]{1,0} get-tuple-element(%loop), index=2
  %all = bf16[2,8]{1,0} all-reduce(%last), replica_groups={{0,1}}, to_apply=%add
  ROOT %end = bf16[8,2]{1,0} fusion(%all), kind=kInput, calls=%fused_transpose
}
'''
KNOWN = 'backend_config={"known_trip_count":{"n":"3"}}'


def test_kernels_are_counted_by_kind_and_by_loop():
  program, layer = kernels.parts(GPU.replace('KNOWN', KNOWN), {96, 32})
  assert program == kernels.Part(0, 1, {'copy': 1, 'transpose': 2, 'collective': 1})
  assert layer == kernels.Part(1, 3, {'gemm': 2, 'attention': 1, 'fusion': 1, 'weight cast': 1})
  assert (program.total, layer.total) == (4, 5)


def test_trips_that_the_data_decides_are_not_known():
  _, layer = kernels.parts(GPU.replace('KNOWN', 'metadata={op_name="while"}'))
  assert layer.trips is None


def test_a_cast_of_anything_but_a_weight_is_a_fusion():
  _, layer = kernels.parts(GPU.replace('KNOWN', KNOWN), {33})
  assert layer.kernels == {'gemm': 2, 'attention': 1, 'fusion': 2}


def test_sizes_of_weights_are_those_of_matrices_whole_and_of_a_layer():
  shapes = (3, 8, 4), (3, 8), (50, 8), (8,)                      # stacked matrix and scale; embedding
  leaves = [jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes]
  assert kernels.weight_sizes(leaves, 3) == {96, 32, 400}


def test_products_of_a_real_program_are_where_they_run():
  """Two products in each of three layers and one after them, of a scan that XLA does not unroll."""
  def layer(x, weights):
    first, second = weights
    return jnp.tanh(x @ first) @ second, None

  def fn(x, weights, last):
    x, _ = jax.lax.scan(layer, x, weights)
    return x @ last

  stack = jnp.ones((7, 256, 256))
  text = jax.jit(fn).lower(jnp.ones((256, 256)), (stack, stack), stack[0]).compile().as_text()
  found = kernels.parts(text)
  assert [(part.depth, part.trips) for part in found] == [(0, 1), (1, 7)]
  assert [part.kernels.get('gemm') for part in found] == [1, 2]


# ---- the command

NANO = preset('nano', layers=1)
FLAGS = ('--on', 'cpu:1', '--preset', 'nano')


def test_every_program_is_compiled_and_timed(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(PRESETS, 'nano', dataclasses.replace(NANO, context_length=600))
  small = dataclasses.replace(
    bench_compile.DEFAULT, dtype='float32',
    sft=dataclasses.replace(bench_compile.DEFAULT.sft, batch_size=2),
    reward=dataclasses.replace(bench_compile.DEFAULT.reward, batch_size=2))
  monkeypatch.setattr(bench_compile, 'DEFAULT', small)
  path = tmp_path / 'compile.json'
  results = bench_compile.main([*FLAGS, '--json', str(path), '--stages', 'sft', 'reward'])
  assert json.loads(path.read_text()) == results
  assert [each['program'] for each in results['programs']] == ['SFT step', 'reward step']
  for each in results['programs']:
    assert set(each['seconds_of']) == {'trace', 'lower', 'compile'}
    assert all(seconds > 0 for seconds in each['seconds_of'].values())
    assert each['seconds'] == pytest.approx(sum(each['seconds_of'].values()))
    assert each['temporary_bytes'] > 2 * 565 * 64 * 4
    assert sum(part['kernels'].get('gemm', 0) for part in each['parts']) > 0
  # On the clock, where one program comes after another: no less than all of them.
  assert results['seconds'] >= sum(each['seconds'] for each in results['programs'])
  said = capsys.readouterr().out
  assert 'SFT step: ' in said and 'nano for cpu:1, jax' in said


def test_sizes_are_those_of_the_issue_or_of_the_experiment():
  of = lambda *flags: bench_compile.experiment_of(
    bench_compile.BenchCompile(**dict(zip(flags[::2], flags[1::2]))))
  ours, quickstart = of(), of('experiment', 'quickstart', 'scan', 'yes', 'remat', 'block')
  assert (ours.preset, ours.dtype, ours.data.limits.tokens) == ('llama3.2-1b', 'bfloat16', 565)
  assert (ours.ppo.batch_size, ours.ppo.epochs, ours.ppo.minibatches) == (64, 4, 4)
  assert (quickstart.preset, quickstart.data.limits.tokens) == ('micro', 46)
  assert quickstart.scan_layers is True and quickstart.mesh.runner == 'auto'
  eight = of('experiment', 'llama3_8b')  # what is not given stays as the experiment has it
  assert eight.pretrained is None and eight.remat == 'block' and eight.scan_layers is True


@pytest.mark.parametrize('flags, match', [
  (('--on', 'z80:1'), "there is no topology 'z80:1'"),
  (('--on', 'cpu:1', '--preset', 'lama'), "there is no model preset 'lama'"),
  (('--on', 'cpu:1', '--experiment', 'bench'), '--experiment bench: module '),
  (('--on', 'cpu:1', '--experiment', 'nothing'), '--experiment nothing: No module named'),
  (('--on', 'cpu:1', '--json', '/no/such/compile.json'), '--json /no/such/compile.json: No such')])
def test_what_cannot_be_compiled_is_said(flags, match, capsys):
  with pytest.raises(SystemExit, match='2'):
    bench_compile.main(list(flags))
  assert match in capsys.readouterr().err
