"""What a program costs, read off it before it runs: floating-point operations, bytes moved, and what chips send each other.

Products are counted in the traced program (`flops`): two operations for each multiplication and addition of every
`dot_general`, for the whole batch on all chips, loops included; nothing else is counted. An attention kernel counts the
blocks that it computes, with the half of those on the diagonal that is masked. What a backward pass computes a second time
is counted apart, also inside such a kernel, which keeps no scores.

Bytes are read off the compiled program (`traffic`), which is that of one chip. Every instruction reads its operands and
writes its result once; a slice counts as itself, not as what it is cut from, and what the compiler keeps on the chip
(a memory space other than HBM) as nothing. A collective is charged what one chip sends in a ring.

Loops multiply what is in them by the count that the program knows, or else by what the caller says in `trips`: how often
loops run whose count only the data decides, those inside others further right.
"""

import collections
import dataclasses
import math
import re

import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

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


def _products(jaxpr):
  return sum((equation.primitive.name == 'dot_general') + sum(map(_products, jaxprs_in_params(equation.params)))
             for equation in jaxpr.eqns)


# ---- the compiled program

@dataclasses.dataclass
class Traffic:
  """Bytes that one chip moves: from and to its HBM, and to other chips, by collective."""
  hbm: float = 0.0
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


def traffic(text, trips=()):
  """The Traffic of a compiled program, from its HLO text."""
  computations, entry = read(text)
  return _walked(computations, entry, 1.0, tuple(trips))


def _walked(*what):
  found = Traffic()
  _walk(*what, found)
  return found


def _add(found, more):
  found.hbm += more.hbm
  for kind in more.sent:
    found.sent[kind] += more.sent[kind]
    found.count[kind] += more.count[kind]


def _walk(computations, name, times, trips, found):
  """Adds what a computation moves that runs so many times."""
  own, sent = {each.name: each for each in computations[name]}, set()
  for each in computations[name]:
    if each.op == 'while':
      known = _count(each, computations)
      more, inner = (known, trips) if known else (trips[0], trips[1:]) if trips else (1, ())
      _walk(computations, each.called('body')[0], times * more, inner, found)
    elif each.op == 'conditional':
      branches = each.called('branch_computations') or each.called('true_computation') + each.called('false_computation')
      _add(found, max((_walked(computations, branch, times, trips) for branch in branches), key=lambda branch: branch.hbm))
    elif each.op == 'call' or each.op == 'async-start':
      for callee in each.called('to_apply') or each.called('calls'):
        _walk(computations, callee, times, trips, found)
    elif each.op not in _FREE and not each.op.endswith(('-start', '-update')) and each.op != 'async-done':
      found.hbm += times * _hbm(each, own, computations)
    for kind, inside, types in _collectives(each, own, computations):
      channel = re.search(r'channel_id=(\d+)', inside.rest)                     # one that overlaps is in several fusions
      if channel is None or channel.group(1) not in sent:
        sent |= {channel.group(1)} if channel else set()
        _send(inside, kind, sum(size(types[operand].type) for operand in inside.operands), times, found)


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


def _send(instruction, kind, given, times, found):
  """What a chip sends of the bytes that it is given, around a ring of n chips."""
  n = _group(instruction.rest)
  share = {'all-gather': n - 1, 'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1}.get(kind, (n - 1) / n)
  if n > 1 or kind == 'collective-permute':
    found.sent[kind] += times * share * given
    found.count[kind] += times


def _group(rest):
  """How many chips take part in a collective together, in any of the forms of `replica_groups`."""
  if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", rest):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
    return math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", mesh.group(2)))
  if listed := re.search(r'replica_groups=\[\d+,(\d+)\]', rest):
    return int(listed.group(1))
  spelt = re.search(r'replica_groups=\{\{([\d,]*)\}', rest)
  return len(spelt.group(1).split(',')) if spelt else 1


def _hbm(instruction, own, computations):
  """HBM bytes that an instruction reads and writes."""
  if instruction.op == 'fusion':
    return _fused(instruction, own, computations[instruction.called('calls')[0]])
  start = own[instruction.operands[0]] if instruction.op.endswith('-done') else instruction
  sources, op = [own[name].type for name in start.operands], start.op.removesuffix('-start')
  if op in ('dynamic-update-slice', 'scatter'):
    return 2 * size(sources[2 if op == 'scatter' else 1], hbm_only=True)
  written = size(instruction.type, hbm_only=True)
  if op in _PARTS:
    return written + (size(instruction.type) if size(sources[0], hbm_only=True) else 0)
  return written + sum(size(source, hbm_only=True) for source in sources)


def _fused(fusion, outer, instructions):
  """HBM bytes of a fusion: of an operand of which slices are read, these; of one that is written in place, the update."""
  users, own = collections.defaultdict(list), {each.name: each for each in instructions}
  for each in instructions:
    for operand in each.operands:
      users[operand].append(each)

  def uses(name):
    return [use for each in users[name] for use in (uses(each.name) if each.op == 'bitcast' else [(name, each)])]

  def read(parameter, outside):
    if not size(outside, hbm_only=True):
      return 0
    parts = [0 if use.op == 'dynamic-update-slice' else size(use.type) for operand, use in uses(parameter.name)
             if use.op in _PARTS and use.operands[0] == operand]
    return sum(parts) if len(parts) == len(uses(parameter.name)) else size(outside)

  def written(name):
    while own[name].op == 'bitcast':
      name = own[name].operands[0]
    return size(own[own[name].operands[1]].type) if own[name].op == 'dynamic-update-slice' else size(own[name].type)

  root = next(each for each in instructions if each.root)
  results = root.operands if root.op == 'tuple' else (root.name,)
  kept = size(fusion.type) and size(fusion.type, hbm_only=True) / size(fusion.type)
  parameters = sorted((each for each in instructions if each.op == 'parameter'), key=lambda each: int(each.inside))
  return kept * sum(map(written, results)) + sum(read(each, outer[operand].type)
                                                 for each, operand in zip(parameters, fusion.operands, strict=True))
