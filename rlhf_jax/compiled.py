"""What a program costs, read off it before it runs: floating-point operations, bytes moved, and what chips send each other.

Products are counted in the traced program (`flops`): two operations for each multiplication and addition of every
`dot_general`, for the whole batch on all chips, loops included; nothing else is counted. An attention kernel counts the
blocks that it computes, with the half of those on the diagonal that is masked. cuDNN's does not tell which those are: it is
taken to have blocks of 128. What a backward pass computes a second time is counted apart, also inside such a kernel,
which keeps no scores.

Bytes are read off the compiled program (`traffic`), which is that of one chip. Every instruction reads its operands and
writes its result once; a slice counts as itself, not as what it is cut from, and what the compiler keeps on the chip
(a memory space other than HBM) as nothing. What a library is lent to work in is not counted. A collective is charged what
one chip sends in a ring, of which a part goes to other hosts where the ring has chips of several (`_leaving`).

Loops multiply what is in them by the count that the program knows, or else by what the caller says in `trips`: how often
loops run whose count only the data decides, those inside others further right.
"""

import collections
import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from rlhf_jax.model import decode_kernel

_CUDNN_BLOCK = 128  # queries, and keys, that an attention kernel of cuDNN takes at a time
_WORKSPACES = '__cublas', '__cudnn', '__cub'  # libraries whose last result is what they work in
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


# ---- the traced program

def flops(jaxpr, trips=()):
  """(floating-point operations of all products, those of them that a backward pass repeats), on all chips together."""
  every, repeated = 0.0, 0.0
  for equation in jaxpr.eqns:
    more, again = _operations(equation, trips)
    every += more
    repeated += more if 'rematted_computation' in str(equation.source_info.name_stack) else again
  return every, repeated


def _operations(equation, trips):
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted), 0.0
  if name == 'pallas_call' and params['name'] == decode_kernel.NAME:
    return _decoding(equation)
  if name in ('dot_product_attention_fwd_wrapper', 'dot_product_attention_bwd_wrapper'):
    return _cudnn(equation)
  if name == 'while':
    times, inner = (trips[0], trips[1:]) if trips else (1, ())
    return _times(times, flops(params['body_jaxpr'].jaxpr, inner))
  inside = [flops(jaxpr, trips) for jaxpr in jaxprs_in_params(params)]
  if not inside:
    return 0.0, 0.0
  if name == 'pallas_call':
    every = _runs(equation) * inside[0][0]
    return every, _again(equation) * every
  return max(inside) if name == 'cond' else _times(_runs(equation), tuple(map(sum, zip(*inside))))


def _runs(equation):
  """How often what an equation holds is run, on all chips together."""
  params = equation.params
  match equation.primitive.name:
    case 'scan':
      return params['length']
    case 'shard_map':
      return math.prod(params['mesh'].shape.values())
    case 'pallas_call':
      return _causal_share(equation) * math.prod(params['grid_mapping'].grid)
  return 1


def _times(times, counted):
  return times * counted[0], times * counted[1]


def _causal_share(kernel):
  """Of the cells of an attention kernel's grid, blocks of queries times blocks of keys, those of which something is seen.

  T queries stand at the end of S keys. Where they see a window only, the grid has as many cells to a block of queries as
  that can span, fewer than all.
  """
  queries, keys = [x.aval.shape for x in kernel.invars
                   if jnp.issubdtype(x.aval.dtype, jnp.floating) and len(x.aval.shape) > 2][:2]
  T, S = queries[-2], keys[-2]
  mapping = kernel.params['grid_mapping']
  block_T, block_S = (block.block_shape[-2].block_size for block in mapping.block_mappings[:2])
  cells, rows = math.prod(mapping.grid) / math.prod(queries[:-2]), T // block_T
  return sum(min(-(-(S - T + row * block_T) // block_S), cells / rows) for row in range(1, rows + 1)) / cells


def _again(kernel):
  """Of the products of an attention kernel, the share that another has made before: forward, or for other gradients.

  Forward there are two, scores and output. Backward there are as many for gradients, of queries, keys, values and weights,
  before which the scores are made again: five in one kernel, or four for keys and values and three for queries.
  """
  return {3: 2 / 3, 4: 1 / 4, 5: 1 / 5}.get(_products(kernel.params['jaxpr']), 0.0)


def _decoding(attention):
  """Of one query a sequence over a cache, of which all is read: 2 products."""
  query, key = [x.aval.shape for x in attention.invars if len(x.aval.shape) == 4][:2]
  return 4.0 * math.prod(query) * key[2], 0.0


def _cudnn(attention):
  """Of cuDNN's attention: 2 products forward, and 5 backward, of which the scores are made again."""
  query, key = (x.aval.shape for x in attention.invars[:2])
  length = 2 if attention.params['layout'] else 1                   # [B, N, T, H] or [B, T, N, H]
  causal = 'CAUSAL' in str(attention.params['mask_type'])
  seen = _computed(query[length], key[length], causal, attention.params['sliding_window_length'])
  one = 2.0 * math.prod(query) / query[length] * seen
  return (5 * one, one) if 'bwd' in attention.primitive.name else (2 * one, 0.0)


def _computed(T, S, causal, window):
  """How many scores of a head are computed: those of all blocks of which some are seen."""
  queries = np.arange(-(-T // _CUDNN_BLOCK)) * _CUDNN_BLOCK
  height = np.minimum(T - queries, _CUDNN_BLOCK)
  last = np.minimum(queries + height + S - T, S) if causal else np.full_like(queries, S)
  first = np.maximum(queries + S - T - window + 1, 0) if window else np.zeros_like(queries)
  upper = np.minimum(-(-last // _CUDNN_BLOCK) * _CUDNN_BLOCK, S)
  return int(np.sum(height * (upper - first // _CUDNN_BLOCK * _CUDNN_BLOCK)))


def _products(jaxpr):
  return sum((equation.primitive.name == 'dot_general') + sum(map(_products, jaxprs_in_params(equation.params)))
             for equation in jaxpr.eqns)


# ---- the compiled program

@dataclasses.dataclass
class Traffic:
  """Bytes that one chip moves: from and to its HBM, and to other chips, by collective.

  `network` of those that it sends go to other hosts.
  """
  hbm: float = 0.0
  network: float = 0.0
  sent: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
  count: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(float))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a compiled program."""
  name: str
  type: str
  op: str
  inside: str  # what stands between its parentheses
  rest: str  # the attributes after them
  root: bool

  @property
  def operands(self):
    """Names of what it reads."""
    return tuple(re.findall(r'%[\w.-]+', self.inside))

  def called(self, attribute):
    """Names of the computations that an attribute such as 'calls' names."""
    found = re.search(rf'{attribute}=(?:\{{([^}}]*)\}}|(%[\w.-]+))', self.rest)
    return re.findall(r'%[\w.-]+', found.group(0)) if found else []


_LINE = re.compile(r'^\s*(ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$')
_HEADER = re.compile(r'^(ENTRY )?(%[\w.-]+) \(.*\{$')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_PARTS = {'slice', 'dynamic-slice', 'gather', 'dynamic-update-slice'}  # read or write a part of their first operand
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id', 'iota',
         'opt-barrier', 'call', 'conditional', 'while'}


def read(text):
  """(computations of an HLO text, {name: [Instruction]}; the name of the one that runs)."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header.group(2), [])
      entry = header.group(2) if header.group(1) else entry
    elif current is not None and (found := _LINE.match(line)):
      root, name, kind, op, rest = found.groups()
      inside, attributes = _closed(rest)
      current.append(Instruction(name, kind, op, inside, attributes, bool(root)))
  return computations, entry


def _closed(text):
  """What stands before and after the parenthesis that closes the operands."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if depth < 0:
      return text[:i], text[i + 1:]
  return text, ''


def size(kind, hbm_only=False):
  """Bytes of the arrays of an HLO type such as 'f32[2,3]{1,0}', or of a tuple of them; of those in HBM alone."""
  return sum(math.prod(int(n) for n in shape.split(',') if n) * _width(dtype)
             for dtype, shape, layout in _ARRAY.findall(kind) if not (hbm_only and re.search(r'S\([1-9]', layout)))


def _width(dtype):
  bits = re.search(r'\d+', dtype)
  return int(bits.group()) / 8 if bits else 1


def traffic(text, trips=(), hosts=()):
  """The Traffic of a compiled program, from its HLO text.

  `hosts` has the host of every chip; it is empty where the way to other hosts is that to all chips.
  """
  computations, entry = read(text)
  return _walked(computations, entry, 1.0, tuple(trips), tuple(hosts))


def _walked(*what):
  found = Traffic()
  _walk(*what, found)
  return found


def _add(found, more):
  found.hbm += more.hbm
  found.network += more.network
  for kind in more.sent:
    found.sent[kind] += more.sent[kind]
    found.count[kind] += more.count[kind]


def _walk(computations, name, times, trips, hosts, found):
  """Adds what a computation moves that runs so many times."""
  own, sent = {each.name: each for each in computations[name]}, set()
  for each in computations[name]:
    if each.op == 'while':
      known = _count(each, computations)
      more, inner = (known, trips) if known else (trips[0], trips[1:]) if trips else (1, ())
      _walk(computations, each.called('body')[0], times * more, inner, hosts, found)
    elif each.op == 'conditional':
      branches = each.called('branch_computations') or each.called('true_computation') + each.called('false_computation')
      walked = [_walked(computations, branch, times, trips, hosts) for branch in branches]
      _add(found, max(walked, key=lambda branch: branch.hbm))
    elif each.op == 'call' or each.op == 'async-start':
      for callee in each.called('to_apply') or each.called('calls'):
        _walk(computations, callee, times, trips, hosts, found)
    elif each.op not in _FREE and not each.op.endswith(('-start', '-update')) and each.op != 'async-done':
      found.hbm += times * _hbm(each, own, computations)
    for kind, inside, types in _collectives(each, own, computations):
      channel = re.search(r'channel_id=(\d+)', inside.rest)                     # one that overlaps is in several fusions
      if channel is None or channel.group(1) not in sent:
        sent |= {channel.group(1)} if channel else set()
        given = sum(size(types[operand].type) for operand in inside.operands)
        _send(inside, kind, given, times, hosts, found)


def _count(loop, computations):
  """How often a loop runs, where it says so or only counts from 0 up to a constant; else None."""
  if said := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
    return int(said.group(1))
  condition = {each.name: each for each in computations[loop.called('condition')[0]]}
  root = next(each for each in condition.values() if each.root)
  limits = [condition[name].inside for name in root.operands if condition[name].op == 'constant']
  return int(limits[0]) if root.op == 'compare' and 'direction=LT' in root.rest and limits else None


def _collectives(instruction, own, computations, within=''):
  """(kind, collective, what it names its operands from) of an instruction that is one, or of a fusion that holds some."""
  kind = instruction.op.removesuffix('-start')
  if kind in COLLECTIVES:
    # An all-reduce of which each chip keeps a part is what a TPU makes of a reduce-scatter.
    yield 'reduce-scatter' if kind == 'all-reduce' and 'scatter' in within else kind, instruction, own
  elif instruction.op == 'fusion':
    callee = instruction.called('calls')[0]
    inner = {each.name: each for each in computations[callee]}
    for each in inner.values():
      yield from _collectives(each, inner, computations, callee)


def _send(instruction, kind, given, times, hosts, found):
  """What a chip sends of the bytes that it is given, around a ring of n chips."""
  groups = _groups(instruction.rest)
  n = len(groups[0])
  if n < 2:
    return
  shares = {'all-gather': n - 1, 'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1}
  share = shares.get(kind, (n - 1) / n)
  sent = times * share * given
  found.sent[kind] += sent
  found.count[kind] += times
  if hosts:
    leaving = [_leaving(kind, [hosts[chip] for chip in group]) for group in groups]
    found.network += sent * max(leaving)


def _leaving(kind, hosts):
  """Of what a chip sends to a group with chips of these hosts, the share that goes to another host.

  There are as many rings as chips of the group on a host. Each goes around the whole group and
  leaves the host from another chip, as NCCL lays them where each chip has a network adapter.
  """
  here = min(hosts.count(host) for host in hosts)
  if here == len(hosts):
    return 0.0
  if kind == 'all-to-all':
    return (len(hosts) - here) / (len(hosts) - 1)
  return 1 / here


def _groups(rest):
  """Which chips take part in a collective together, in any of the forms in which HLO says it."""
  if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", rest):
    named = re.findall(r"'(\w+)'=(\d+)", mesh.group(1))
    axes, sizes = [name for name, _ in named], [int(n) for _, n in named]
    together = [axes.index(name) for name in re.findall(r"'(\w+)'", mesh.group(2))]
    chips = np.arange(math.prod(sizes)).reshape(sizes)
    chips = np.moveaxis(chips, together, range(-len(together), 0))
    return chips.reshape(-1, math.prod(sizes[axis] for axis in together)).tolist()
  if tiled := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest):
    shape, cut = _numbers(tiled.group(1)), _numbers(tiled.group(2))
    order = _numbers(tiled.group(3)) if tiled.group(3) else None
    return np.arange(math.prod(cut)).reshape(cut).transpose(order).reshape(shape).tolist()
  spelt = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}', rest)
  if spelt is None:
    return [[0]]
  return [_numbers(group) for group in re.findall(r'\{([\d,]+)\}', spelt.group(1))]


def _numbers(listed):
  return [int(number) for number in listed.split(',')]


def _hbm(instruction, own, computations):
  """HBM bytes that an instruction reads and writes."""
  if instruction.op == 'fusion':
    return _fused(instruction, own, computations)
  start = own[instruction.operands[0]] if instruction.op.endswith('-done') else instruction
  sources, op = [own[name].type for name in start.operands], start.op.removesuffix('-start')
  if op in ('dynamic-update-slice', 'scatter'):
    return 2 * size(sources[2 if op == 'scatter' else 1], hbm_only=True)
  written = size(instruction.type, hbm_only=True) - _workspace(instruction)
  if op in _PARTS:
    return written + (size(instruction.type) if size(sources[0], hbm_only=True) else 0)
  return written + sum(size(source, hbm_only=True) for source in sources)


def _workspace(instruction):
  """Bytes that a call of a library is lent: its last result, where that is an array of bytes."""
  target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
  if target is None or not target.group(1).startswith(_WORKSPACES):
    return 0
  dtype, shape, _ = _ARRAY.findall(instruction.type)[-1]
  return int(shape or 1) if dtype in ('s8', 'u8') and ',' not in shape else 0


def _fused(fusion, outer, computations):
  """HBM bytes of a fusion.

  Of an operand of which slices are read, these; of one that is written in place, the update.
  """
  instructions = computations[fusion.called('calls')[0]]
  own = {each.name: each for each in instructions}

  def read(parameter, outside):
    if not size(outside, hbm_only=True):
      return 0
    uses = _uses(parameter.name, instructions, computations)
    parts = [0 if use.op == 'dynamic-update-slice' else size(use.type) for operand, use in uses
             if use.op in _PARTS and use.operands[0] == operand]
    return sum(parts) if len(parts) == len(uses) else size(outside)

  def written(name):
    while own[name].op == 'bitcast':
      name = own[name].operands[0]
    return size(own[own[name].operands[1]].type) if own[name].op == 'dynamic-update-slice' else size(own[name].type)

  root = next(each for each in instructions if each.root)
  results = root.operands if root.op == 'tuple' else (root.name,)
  kept = size(fusion.type) and size(fusion.type, hbm_only=True) / size(fusion.type)
  return kept * sum(map(written, results)) + sum(
    read(parameter, outer[operand].type)
    for parameter, operand in zip(_parameters(instructions), fusion.operands, strict=True))


def _parameters(instructions):
  found = [each for each in instructions if each.op == 'parameter']
  return sorted(found, key=lambda each: int(each.inside))


def _uses(name, instructions, computations):
  """[(operand, instruction that reads it)] of a value in a fusion, through bitcasts and into fusions inside it."""
  found = []
  for each in instructions:
    if name not in each.operands:
      continue
    if each.op == 'bitcast':
      found += _uses(each.name, instructions, computations)
    elif each.op == 'fusion':
      inside = computations[each.called('calls')[0]]
      for parameter, operand in zip(_parameters(inside), each.operands, strict=True):
        if operand == name:
          found += _uses(parameter.name, inside, computations)
    else:
      found.append((name, each))
  return found
