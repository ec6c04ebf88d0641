"""One side of a comparison in a process of its own: `python -m experiments.peers.side WORK FILE`.

It imports what it needs, waits for a line with its limit in seconds, and only then touches the
device, so that it can be started while another side still has it. After every round it writes what
it has measured to FILE, whole each time. Seconds to the first result count from that line on: the
models are made, everything is compiled, one round is done. Compiled programs come from no cache.
"""

import json
import pathlib
import sys
import time
import traceback

import jax

from experiments import bench
from experiments.benchmarks.measuring import spread
from experiments.peers.work import DEVICES, from_json
from rlhf_jax.model.config import preset
from rlhf_jax.startup import prepare_process

_ENOUGH_S = 12  # of measured rounds: then the rest of the repeats is left out


def measure(work, make_side, limit_s, write, clock=time.perf_counter):
  """Rounds of one side; `write` hears of the results after each.

  The first round is not counted. No round begins that would not end in time, as far as the round
  before tells.
  """
  began = clock()
  side = make_side()
  side.round()
  first_s = clock() - began
  rounds, last_began = [], clock()
  while len(rounds) < work.repeats:
    rounds.append(side.round())
    now = clock()
    write(_results(work, side, rounds, first_s))
    round_s, last_began = now - last_began, now
    measured_s = now - began - first_s
    if now - began + 1.2 * round_s > limit_s or measured_s > _ENOUGH_S:
      break


def _results(work, side, rounds, first_s):
  totals = [sum(parts.values()) for parts in rounds]
  seconds = spread(totals)
  parts = {name: spread(each[name] for each in rounds)['median'] for name in rounds[0]}
  found = {'rounds': len(rounds), 'seconds': seconds, 'parts': parts, 'first_s': first_s,
           'tokens_per_second': work.tokens / seconds['median'],
           'peak_bytes': side.peak_bytes(), 'device': side.device_name()}
  if work.workload == 'sft':
    flops = bench.sft_flops(preset(work.preset), work.batch.sft_rows, work.batch.tokens)
    found['tflops'] = flops / seconds['median'] / 1e12
  return found


def maker(work):
  """A function that makes the side. What the side needs is imported here, before its turn."""
  if work.side == 'rlhf_jax':
    from experiments.peers.ours import Ours

    def make():
      jax.config.update('jax_enable_compilation_cache', False)
      config = preset(work.preset, dtype=work.dtype, **work.running)
      return Ours(work.workload, config, work.batch, work.device)
    return make

  import torch

  from experiments.peers import on_device

  # Models are imported by name when they are first made.
  config = preset(work.preset)
  on_device.import_models(config)
  place = on_device.Place(DEVICES[work.device], getattr(torch, work.dtype), work.compiled)
  return lambda: on_device.Side(work.side, work.workload, config, work.batch, place)


def main(args):
  work, path = from_json(args[0]), pathlib.Path(args[1])
  prepare_process()
  measured = {}

  def write(found):
    measured.update(found)
    unfinished = path.with_suffix('.unfinished')
    unfinished.write_text(json.dumps(found))
    unfinished.rename(path)

  try:
    make = maker(work)
    line = sys.stdin.readline()
    if not line:                                                 # who started it has gone
      return
    measure(work, make, float(line), write)
  except Exception as error:
    # Whatever a library raises is what is said of this side; the others go on.
    traceback.print_exc()
    said = str(error).strip().splitlines() or ['']
    write(measured | {'error': f'{type(error).__name__}: {said[0]}'})
    sys.exit(1)


if __name__ == '__main__':
  main(sys.argv[1:])
