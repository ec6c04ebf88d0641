"""Plans for GPUs that are not here: what is refused, and what XLA's GPU compiler makes of our programs."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from rlhf_jax import chips, gpus
from rlhf_jax.errors import ConfigError

COMPILER = importlib.util.find_spec('jax_cuda13_plugin') is not None
needs_compiler = pytest.mark.skipif(not COMPILER, reason='the extra cuda is not installed here')


@pytest.mark.parametrize('topology', ['h100', 'h100:', 'h100:8x', 'h100:axb', 'h100:8x0', 'h100:8x2x2', 'b300:8'])
def test_an_unknown_topology(topology):
  with pytest.raises(ConfigError, match=re.escape(f'there is no topology {topology!r}. Known:') + '.*h100:8.*h100:8x4'):
    chips.devices(topology)


@pytest.mark.parametrize('topology, count', [('h100:16', 16), ('a100:9x2', 9), ('h200:0', 0)])
def test_more_gpus_than_a_host_has(topology, count):
  with pytest.raises(ConfigError, match=f'{topology} has {count} GPUs a host, of which there are 1 to 8: pass GPUs x hosts'):
    chips.devices(topology)


@pytest.mark.skipif(COMPILER, reason='the extra cuda is installed here')
def test_without_the_compiler_the_extra_is_named():
  says = "a plan for h100:8x4 needs the GPU compiler, which is not installed; it needs no GPU. Run pip install -e '.[cuda]'"
  with pytest.raises(ConfigError, match=re.escape(says)):
    chips.devices('h100:8x4')


@pytest.mark.parametrize('kind, gigabytes', [('h100', 80), ('h200', 141), ('a100', 80)])
def test_a_program_may_use_less_than_the_board_has(kind, gigabytes):
  assert 0.85 * gigabytes * 1e9 < chips.CHIPS[kind].hbm < 0.97 * gigabytes * 1e9
  assert chips.CHIPS[kind].hbm_speed == pytest.approx(gpus.TARGETS[kind].memory_speed, rel=0.01)


# ---- compiled for GPUs

# No two arrays have the same shape by accident; 2,048 tokens a GPU are unembedded in pieces.
SETUP = """
import collections, dataclasses, functools, json, math, re
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from rlhf_jax import chips, cli, compiled, config, planner
from rlhf_jax.model.config import PRESETS, ModelConfig

THIN = PRESETS['thin'] = ModelConfig(vocab_size=4096, width=256, layers=3, query_heads=8, kv_heads=8, head_width=64,
                                     feedforward_width=768, context_length=128)
SETTINGS = {'preset': 'thin', 'dtype': 'bfloat16', 'attention': 'cudnn', 'remat': True, 'scan_layers': True,
            'mesh.runner': 'sharded', 'mesh.fsdp': 8, 'data.limits.prompt_tokens': 64, 'data.limits.response_tokens': 64,
            'sft.batch_size': 128}


def step_of(topology, **settings):
  run = cli.prepare_shapes(config.override(config.Experiment(), SETTINGS | settings), chips.devices(topology))
  return run, next(planner.programs(run))


def text_of(fn, *shapes, devices, specs=None, out=None):
  mesh = jax.make_mesh((len(devices),), ('x',), (jax.sharding.AxisType.Auto,), devices=devices)
  place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
  args = [jax.ShapeDtypeStruct(shape, 'bfloat16', sharding=place(spec)) for shape, spec in zip(shapes, specs or [()] * 9)]
  return jax.jit(fn, out_shardings=place(out or ())).lower(*args).compile().as_text()
"""


def compiled_for_gpus(script):
  """What a script prints last, as JSON: in a process of its own, for a plan turns the compilation cache off."""
  found = subprocess.run([sys.executable, '-c', SETUP + script], capture_output=True, text=True,
                         env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  assert found.returncode == 0, found.stderr
  return json.loads(found.stdout.splitlines()[-1])


@needs_compiler
def test_an_sft_step_on_eight_gpus_replicates_nothing():
  found = compiled_for_gpus("""
run, step = step_of('h100:8')
text = step.traced.lower().compile().as_text()
computations, entry = compiled.read(text)
shapes = {tuple(int(n) for n in shape.split(',') if n) for each in sum(computations.values(), [])
          for _, shape, _ in compiled._ARRAY.findall(each.type)}
state, batch = step.args[0], step.args[1]
sent = compiled.traffic(text).sent
flops, repeated = compiled.flops(step.traced.jaxpr.jaxpr)
plain_flops, plain_repeated = compiled.flops(step_of('h100:8', attention='xla')[1].traced.jaxpr.jaxpr)
print(json.dumps({
  'given': sum(compiled.size(each.type) for each in computations[entry] if each.op == 'parameter'),
  'state': planner._bytes(state), 'batch': planner._bytes(batch),
  'whole': sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state) if x.ndim),
  'shapes': sorted(shapes), 'sent': sent, 'forward': text.count('fmhaScaleBiasSoftmax"'),
  'backward': text.count('fmhaScaleBiasSoftmaxBackward"') + text.count('fmhaSoftmaxBackward"'),
  'kernel': text.count('__cudnn$fmha'), 'flops': flops, 'repeated': repeated,
  'plain': plain_flops - plain_repeated}))
""")
  assert found['kernel'] >= 3                                                   # forward, forward again, backward
  assert found['given'] == pytest.approx(found['state'] + found['batch'], rel=0.01)
  assert found['state'] == pytest.approx(found['whole'] / 8, rel=0.01)          # parameters and both moments
  shapes = {tuple(shape) for shape in found['shapes']}
  width, layers, vocabulary, tokens = 256, 3, 4096, 128 * 128
  assert (layers, 768, width // 8) in shapes or (layers, width // 8, 768) in shapes
  assert not [shape for shape in shapes if shape[:1] == (layers,) and width in shape and 768 in shape]
  logits = [shape for shape in shapes if vocabulary in shape and set(shape) != {vocabulary, width}]
  assert max(max(rows for rows in shape if rows != vocabulary) for shape in logits if len(shape) > 1) <= tokens // 8
  assert found['sent']['reduce-scatter'] > 5 * found['sent'].get('all-reduce', 0)
  # Pieces of 128 queries and keys: all of them for T = 128, as XLA computes them too.
  assert found['flops'] - found['repeated'] == pytest.approx(found['plain'], rel=1e-3)


@needs_compiler
def test_bytes_are_those_counted_by_hand():
  found = compiled_for_gpus("""
one, eight = chips.devices('h100:1'), chips.devices('h100:8')
n = 1024
product = lambda x, w: x @ w


def attention(q, k, v):
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')


def total(q, k, v):
  return attention(q, k, v).astype(jnp.float32).sum()


def looped(x, w):
  return jax.lax.fori_loop(0, 10, lambda _, x: jax.nn.silu(x @ w), x)


def scanned(x, w):
  return jax.lax.scan(lambda x, w: (jax.nn.silu(x @ w), None), x, w)[0]


square, heads = (n, n), (2, 512, 4, 64)
texts = {
  'product': text_of(product, square, square, devices=one),
  'loop': text_of(looped, square, square, devices=one),
  'scan': text_of(scanned, square, (6, n, n), devices=one),
  'attention': text_of(attention, heads, heads, heads, devices=one),
  'gradient': text_of(jax.grad(total, (0, 1, 2)), heads, heads, heads, devices=one),
  'gather': text_of(lambda x: x * 2, square, devices=eight, specs=[('x',)]),
  'reduced': text_of(product, square, square, devices=eight, specs=[(None, 'x'), ('x',)]),
  'scattered': text_of(product, square, square, devices=eight, specs=[(None, 'x'), ('x',)], out=('x',)),
}
found = {}
for name, text in texts.items():
  moved = compiled.traffic(text)
  found[name] = {'hbm': moved.hbm, 'sent': moved.sent}
hosts = planner._hosts(jax.make_mesh((8,), ('x',), devices=chips.devices('h100:4x2')))
crossing = text_of(lambda x: x * 2, square, devices=chips.devices('h100:4x2'), specs=[('x',)])
found['hosts'], found['network'] = hosts, compiled.traffic(crossing, (), hosts).network
print(json.dumps(found))
""")
  square, heads, sums = 2 * 1024 ** 2, 2 * 2 * 512 * 4 * 64, 4 * 2 * 4 * 512     # bfloat16, bfloat16, float32
  assert found['product']['hbm'] == 3 * square
  # Of each round the product, and silu of it; before them x is copied. A scan cuts out the matrix of a round.
  assert found['loop']['hbm'] == pytest.approx((10 * (3 + 2) + 2) * square, rel=1e-4)
  assert found['scan']['hbm'] == pytest.approx((6 * (2 + 3 + 2) + 2) * square, rel=1e-4)
  # Queries, keys, values and the output; backward its gradient and the sums of weights too, and three gradients.
  assert found['attention']['hbm'] == 4 * heads
  assert found['gradient']['hbm'] == (4 * heads + sums) + heads + (8 * heads + sums)
  assert found['gather']['sent'] == {'all-gather': 7 / 8 * square}
  assert found['reduced']['sent'] == {'all-reduce': 2 * 7 / 8 * square}
  assert found['scattered']['sent'] == {'reduce-scatter': 7 / 8 * square}
  assert found['hosts'] == [0, 0, 0, 0, 1, 1, 1, 1]
  assert found['network'] == pytest.approx(7 / 8 * square / 4)                  # of four GPUs, each sends a quarter out


PLAN = ['--preset', 'nano', '--pretrained', 'None', '--reward-preset', 'None', '--dtype', 'float32',
        '--stages', 'sft', '--data.limits.prompt-tokens', '64', '--data.limits.response-tokens', '64',
        '--sft.batch-size', '32', '--mesh.data', '4', '--mesh.fsdp', '2', '--mesh.tensor', '1']


def planned(topology, *flags):
  """The finished process of a plan of a small model."""
  command = [sys.executable, '-m', 'experiments.llama3_8b', '--plan', topology, *PLAN, *flags]
  return subprocess.run(command, capture_output=True, text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})


@needs_compiler
@pytest.mark.parametrize('topology, leaves', [('a100:8', False), ('a100:2x4', True)])
def test_a_plan_says_what_goes_over_nvlink_and_what_over_the_network(topology, leaves):
  made = json.loads(planned(topology, '--attention', 'xla', '--json').stdout)
  [row] = made['programs']
  sent, network = sum(row['sent_bytes_per_chip'].values()), row['sent_to_other_hosts_bytes_per_chip']
  assert set(row['seconds']) == {'compute', 'hbm', 'nvlink', 'network'}
  assert row['seconds']['network'] == pytest.approx(network / 25e9)
  assert row['seconds']['nvlink'] == pytest.approx((sent - network) / 300e9)
  assert bool(network) == leaves and network < sent
  assert any('XLA_PYTHON_CLIENT_MEM_FRACTION=0.9' in sentence for sentence in made['assumptions'])


@needs_compiler
def test_what_does_not_fit_is_mended_by_settings_that_were_compiled():
  found = compiled_for_gpus("""
from rlhf_jax import gpus, remedies
import dataclasses
[step] = planner.plan(step_of('h100:8')[0], 'h100:8', only=['SFT step']).costs
chips.CHIPS['h100'] = dataclasses.replace(chips.CHIPS['h100'], hbm=0.9 * step.total)
experiment = config.override(config.Experiment(), SETTINGS)
prepare = lambda experiment: cli.prepare_shapes(experiment, chips.devices('h100:8'))
made = planner.plan(prepare(experiment), 'h100:8', ['sft'])
print(json.dumps({'too_large': [cost.name for cost in made.too_large],
                  'suggestion': remedies.suggest(experiment, made, prepare, config.override, 8, ['sft'])}))
""")
  assert found['too_large'] == ['SFT step']
  assert found['suggestion'] == {'sft.microbatches': 2}


@needs_compiler
def test_a_kernel_for_tpus_is_refused():
  found = planned('h100:8', '--attention', 'splash')
  assert found.returncode == 2
  says = '--attention splash: it is for TPUs, and the device here is a GPU. Choose another: --attention auto would take xla.'
  assert says in found.stderr


# ---- one GPU: what is in the programs

ONE_GPU = """
import functools
from rlhf_jax.model import forward
from rlhf_jax.model.device import describe
from rlhf_jax.model.heads import LanguageModel, initial_params
from rlhf_jax.generate import generate
from rlhf_jax.maths.sampling import Sampling
from rlhf_jax.records import Prompts

[gpu] = chips.devices('h100:1')
place = SingleDeviceSharding(gpu)
at = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
B, T = 4, 128


def model(**changes):
  # Three layers, heads of 64 numbers; no other array has two axes of 128 slots.
  settings = {'dtype': 'bfloat16', 'device': describe(gpu, 80 * 10**9), 'context_length': 2048} | changes
  return LanguageModel(dataclasses.replace(THIN, **settings))


def params(model):
  shapes = jax.eval_shape(functools.partial(initial_params, model), jax.random.key(0))
  return jax.tree.map(lambda x: at(x.shape, x.dtype), shapes)


def gradient(model, start=1, packed=False):
  # Of log-probabilities from a slot on: of SFT, or of PPO's responses.
  def total(p, tokens, valid, *segments):
    segment = segments[0] if segments else None
    return forward.next_logprobs(model, p, tokens, valid, start=start, segment_BT=segment)[0].sum()
  args = at((B, T), 'int32'), at((B, T), 'bool'), *([at((B, T), 'int32')] if packed else [])
  return jax.jit(jax.grad(total)).lower(params(model), *args).compile().as_text()


def kernels(text):
  forward = sum(text.count(f'custom_call_target="__cudnn$fmha{name}"') for name in ('Softmax', 'ScaleBiasSoftmax'))
  backward = text.count('custom_call_target="__cudnn$fmha') - forward
  masks = len(re.findall(r'(?:pred|bf16|f32)\\[(?:\\d+,)*128,128\\]', text))
  return {'forward': forward, 'backward': backward, 'biased': text.count('ScaleBiasSoftmax'), 'masks': masks}
"""


@needs_compiler
def test_a_gradient_has_one_kernel_forward_and_one_backward_and_no_mask():
  """In the compiled loop over layers; 'block' has the one forward twice."""
  found = compiled_for_gpus(ONE_GPU + """
print(json.dumps({
  'sft': kernels(gradient(model(remat='dots'))),
  'ppo': kernels(gradient(model(remat='dots'), start=65)),
  'auto': kernels(gradient(model())),
  'block': kernels(gradient(model(remat='block'))),
  'packed': kernels(gradient(model(remat='dots'), packed=True)),
  'window': kernels(gradient(model(remat='dots', window=32)))}))
""")
  once = {'forward': 1, 'backward': 1, 'biased': 0, 'masks': 0}
  assert found['sft'] == found['ppo'] == found['auto'] == found['window'] == once
  assert found['block'] == once | {'forward': 2}
  assert (found['packed']['forward'], found['packed']['backward']) == (1, 1)
  assert found['packed']['biased'] >= 2 and found['packed']['masks']


@needs_compiler
def test_answers_are_decoded_by_one_kernel_a_layer():
  """Three layers, unrolled in the loop; heads of a width that Triton does not load are left to XLA."""
  found = compiled_for_gpus(ONE_GPU + """
def decoder(**changes):
  made = model(**changes)
  prompts = Prompts(at((B, 64), 'int32'), at((B, 64), 'bool'), at((B,), 'int32'))
  run = lambda p, prompts, seed: generate(made, p, prompts, jax.random.key(seed), Sampling(new_tokens=64))
  text = jax.jit(run).lower(params(made), prompts, at((), 'int32')).compile().as_text()
  return {'triton': text.count('custom_call_target="__gpu$xla.gpu.triton"'), **kernels(text)}


print(json.dumps({'kernel': decoder(), 'plain': decoder(attention='xla'), 'width': decoder(head_width=48)}))
""")
  assert found['kernel']['triton'] == 3 + found['plain']['triton']
  assert (found['kernel']['forward'], found['kernel']['backward']) == (1, 0)    # of the prompts, scanned
  assert found['width']['triton'] == found['plain']['triton'] and found['width']['forward'] == 1
  assert found['plain']['forward'] == 0
