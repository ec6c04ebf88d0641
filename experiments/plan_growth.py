"""How the cost of the 8B experiment grows with the number of chips: the same batches on 16, 64 and 256 of them.

    python -m experiments.plan_growth                    needs libtpu, no TPU; the extra `tpu` installs it

Every program of `llama3_8b` is compiled for each topology, 4 chips to `tensor` and the rest to `fsdp`. The picture shows
what one chip holds, what it sends to others, and the largest share of its peak that it could compute with (see planner.py
for what is counted and assumed).
"""

import dataclasses
import math
import pathlib
import sys

import matplotlib
import tyro

from experiments.llama3_8b import EXPERIMENT
from rlhf_jax import chips, cli, config, planner
from rlhf_jax.errors import RlhfJaxError
from rlhf_jax.startup import prepare_process

matplotlib.use('Agg')

import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Growth:
  """Which chips, and where the picture goes."""
  topologies: tuple[str, ...] = ('v5p:2x2x4', 'v5p:4x4x4', 'v5p:4x8x8')
  picture: pathlib.Path = pathlib.Path('docs/plan_growth.png')


def plans(topologies, experiment=EXPERIMENT):
  """{number of chips: Plan}."""
  found = {}
  for topology in topologies:
    devices = chips.devices(topology)
    sized = config.override(experiment, {'mesh.data': 1, 'mesh.fsdp': len(devices) // 4, 'mesh.tensor': 4})
    found[len(devices)] = planner.plan(cli.prepare_shapes(sized, devices, chips.memory_of(topology)), topology,
                                       say=lambda text: print(text, file=sys.stderr, flush=True))
  return found


def draw(found, path):
  """A picture of Plans by number of chips: what a chip holds, what it sends, and how busy it could be."""
  measures = (('GiB a chip holds', lambda made, cost: cost.total / 2**30), ('GB a chip sends', _sent),
              ('MFU at the roofline', lambda made, cost: made.mfu(cost) if made.seconds(cost) else math.nan))
  figure, panels = plt.subplots(1, 3, figsize=(12, 3.6))
  for (title, measure), panel in zip(measures, panels):
    for i, first in enumerate(next(iter(found.values())).costs):
      panel.plot(list(found), [measure(made, made.costs[i]) for made in found.values()], 'o-', label=first.name)
    panel.set(title=title, xlabel='chips', xscale='log', yscale='linear' if 'MFU' in title else 'log')
    panel.set_xticks(list(found), list(found), minor=False)
    panel.minorticks_off()
  panels[0].axhline(next(iter(found.values())).capacity / 2**30, color='grey', linestyle=':', label='a chip has')
  panels[0].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def _sent(made, cost):
  return sum(cost.sent.values()) / 1e9


def main():
  """The command line; exits with 2 on an error that the user can mend."""
  growth = tyro.cli(Growth, description=__doc__)
  prepare_process()
  try:
    found = plans(growth.topologies)
  except RlhfJaxError as error:
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    sys.exit(2)
  draw(found, growth.picture)
  for each in found.values():
    print(planner.markdown(each), end='\n\n')


if __name__ == '__main__':
  main()
