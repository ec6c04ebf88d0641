"""The TL;DR recipe for Pythia (see tldr.py) on TPUs, at the three sizes of the paper: 1B, 2.8B and 6.9B.

Policy, value, reference and reward model are all of that size. For the settings of each topology in `SIZES`, `--plan` says
that every program compiles and fits: see the table in README.md.

    python -m experiments.pythia_tldr --preset pythia-6.9b --plan v5p:2x2x2        what it would cost, without a TPU
    python -m experiments.pythia_tldr --preset pythia-6.9b --sized-for v5p:2x2x2   on those 8 chips

It has been compiled for its chips but not run. Expected, published by Huang et al. 2024 (2403.17031): see tldr.py.
"""

import dataclasses

from experiments import tldr
from experiments.tldr import make_task
from rlhf_jax import cli
from rlhf_jax.config import MeshConfig

EXPERIMENT = dataclasses.replace(tldr.EXPERIMENT, attention='splash', remat=True, scan_layers=True,
                                 mesh=MeshConfig(runner='sharded'))


def _sized(size, **topologies):
  """Settings by topology, each with the weights of that size."""
  return {f'pythia-{size}': {topology: {'pretrained': f'EleutherAI/pythia-{size}-deduped'} | settings
                             for topology, settings in topologies.items()}}


SIZES = (_sized('1b', **{'v5e:2x4': {'mesh.fsdp': 8}})
         | _sized('2.8b', **{'v5e:4x4': {'mesh.fsdp': 16}})
         | _sized('6.9b', **{'v5e:8x8': {'mesh.fsdp': 16, 'mesh.tensor': 4}, 'v5p:2x2x2': {'mesh.fsdp': 8}}))

if __name__ == '__main__':
  cli.main(EXPERIMENT, make_task, __doc__, sizes=SIZES)
