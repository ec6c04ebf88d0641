"""What is in a compiled program: kernels by kind, and how often each loop runs them.

Read off `executable.as_text()`. An instruction that runs on the device is one kernel, a fusion
too, whatever it holds; what only names memory (tuples, bitcasts, parameters) is none. Kernels are
counted by the computation that they stand in: the program itself, and the body of every loop, with
the count of its trips where the program knows it. So a layer is a body where layers are scanned,
and a share of its computation where they are not. Read next: `rlhf_jax/compiled.py`, for bytes.
"""

import collections
import dataclasses
import math
import re

from rlhf_jax.compiled import COLLECTIVES, read

KINDS = ('gemm', 'attention', 'fusion', 'copy', 'transpose', 'weight cast', 'collective', 'other')
_NO_KERNEL = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all',
              'partition-id', 'replica-id', 'opt-barrier', 'iota', 'while', 'conditional', 'call',
              'async-start', 'async-update', 'async-done'}
# What a fusion that only casts may hold: moves, and arithmetic on the index of a layer.
_MOVING = {'parameter', 'constant', 'bitcast', 'convert', 'transpose', 'copy', 'slice', 'reshape',
           'dynamic-slice', 'tuple', 'compare', 'select', 'add', 'subtract'}
_GEMM = re.compile(r'__cublas\$|__cutlass|gemm|matmul|\bdot\b', re.IGNORECASE)
_GEMM_BACKEND = re.compile(r'"kind":"__\w*gemm')  # of a fusion: not what its metadata names
_ATTENTION = re.compile(r'fmha|__cudnn\$.*attention|flash|splash|tpu_custom_call', re.IGNORECASE)
_SHAPE = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Part:
  """Kernels of the program itself or of one trip through a loop, by kind."""
  depth: int  # how many loops it is inside
  trips: int | None  # of its loop; 1: no loop; None: the data decides
  kernels: dict[str, int]

  @property
  def total(self):
    """Kernels of all kinds."""
    return sum(self.kernels.values())


def parts(text, weight_sizes=()):
  """The Parts of a compiled program, from its HLO text, each before the loops inside it.

  `weight_sizes` are the counts of numbers of arrays that are weights: a conversion from float32 to
  bfloat16 of so many numbers is a weight cast.
  """
  computations, entry = read(text)
  return list(_parts(computations, entry, 0, 1, frozenset(weight_sizes)))


def _parts(computations, name, depth, trips, sizes):
  kernels, loops = collections.Counter(), []
  _count(computations, name, sizes, kernels, loops)
  yield Part(depth, trips, {kind: kernels[kind] for kind in KINDS if kernels[kind]})
  for loop in loops:
    body = loop.called('body')[0]
    yield from _parts(computations, body, depth + 1, _trips(loop), sizes)


def _count(computations, name, sizes, kernels, loops):
  """Adds the kernels of a computation, and of those that it calls, but not of its loops."""
  types = {each.name: each.type for each in computations[name]}
  for each in computations[name]:
    if each.op == 'while':
      loops.append(each)
    elif each.op in ('call', 'conditional', 'async-start'):
      called = each.called('to_apply') or each.called('calls')
      called = called or each.called('branch_computations')[:1]
      for inner in called:
        _count(computations, inner, sizes, kernels, loops)
    elif each.op not in _NO_KERNEL and not each.op.endswith('-done'):
      kernels[_kind(each, types, computations, sizes)] += 1


def _kind(instruction, types, computations, sizes):
  op = instruction.op.removesuffix('-start')
  if op in COLLECTIVES:
    return 'collective'
  if op == 'custom-call':
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    name = target.group(1) if target else ''
    if _ATTENTION.search(name):
      return 'attention'
    return 'gemm' if _GEMM.search(name) else 'other'
  if op == 'dot':
    return 'gemm'
  if op == 'fusion':
    return _fused(instruction, types, computations, sizes)
  if op == 'copy':
    return 'copy' if _same_layout(instruction, types) else 'transpose'
  if op == 'convert':
    return 'weight cast' if _casts_weight(instruction, types, sizes) else 'other'
  return 'transpose' if op == 'transpose' else 'other'


def _fused(fusion, types, computations, sizes):
  """The kind of a fusion: by what it holds, and by the backend that it is made for."""
  inside = computations[fusion.called('calls')[0]]
  ops = {each.op for each in inside}
  if 'dot' in ops or _GEMM_BACKEND.search(fusion.rest):
    return 'gemm'
  root = next(each for each in inside if each.root)
  if 'convert' in ops and ops <= _MOVING and _casts_weight(fusion, types, sizes):
    return 'weight cast'
  if root.op == 'transpose' or 'transpose' in fusion.name:
    return 'transpose'
  return 'copy' if root.op == 'copy' else 'fusion'


def _casts_weight(instruction, types, sizes):
  """Whether float32 numbers become as many bfloat16 ones, as many as a weight has."""
  made = {math.prod(map(int, filter(None, shape.split(','))))
          for dtype, shape in _SHAPE.findall(instruction.type) if dtype == 'bf16'}
  given = [dtype for operand in instruction.operands
           for dtype, _ in _SHAPE.findall(types.get(operand, ''))]
  return bool(made & sizes) and 'f32' in given


def _same_layout(copy, types):
  layout = lambda kind: re.sub(r'.*\{([\d,]*).*', r'\1', kind)
  return layout(copy.type) == layout(types[copy.operands[0]])


def _trips(loop):
  """How often a loop runs, where the compiler says so; else None."""
  said = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
  return int(said.group(1)) if said else None


def weight_sizes(leaves, layers):
  """How many numbers the matrices among parameters have: the whole, and one layer of a stack."""
  sizes = set()
  for leaf in leaves:
    whole, stacked = math.prod(leaf.shape), leaf.shape[:1] == (layers,)
    if len(leaf.shape) - stacked > 1:
      sizes |= {whole, whole // layers} if stacked else {whole}
  return sizes
