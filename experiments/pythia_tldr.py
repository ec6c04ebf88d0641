"""The TL;DR recipe for Pythia (see tldr.py) on TPUs or a GPU, at the three sizes of the paper: 1B, 2.8B and 6.9B.

Policy, value, reference and reward model are all of that size. For the settings of each topology in `SIZES`, `--plan` says
that every program compiles and fits: see the table in README.md.

    python -m experiments.pythia_tldr --preset pythia-6.9b --plan v5p:2x2x2        what it would cost, without a TPU
    python -m experiments.pythia_tldr --preset pythia-6.9b --sized-for v5p:2x2x2   on those 8 chips
    python -m experiments.pythia_tldr --plan h100:1                                 of one GPU, without a GPU

It has been compiled for its chips but not run. Expected, published by Huang et al. 2024 (2403.17031): see tldr.py.
"""

import dataclasses

from experiments import tldr
from experiments.tldr import make_task
from rlhf_jax import cli
from rlhf_jax.config import MeshConfig

EXPERIMENT = dataclasses.replace(tldr.EXPERIMENT, remat='block', scan_layers=True,
                                 mesh=MeshConfig(runner='sharded'))

SIZES = {
  'pythia-1b': {
    'v5e:2x4': {'pretrained': 'EleutherAI/pythia-1b-deduped', 'mesh.fsdp': 8},
    # Planned with attention by XLA: JAX lets cuDNN have heads of 256 only where it sees the GPU.
    'h100:1': {'mesh.runner': 'single', 'ppo.slots': 256},
  },
  'pythia-2.8b': {'v5e:4x8': {'pretrained': 'EleutherAI/pythia-2.8b-deduped', 'mesh.fsdp': 16, 'mesh.tensor': 2}},
  'pythia-6.9b': {'v5p:2x2x2': {'pretrained': 'EleutherAI/pythia-6.9b-deduped', 'mesh.fsdp': 8}},
}

if __name__ == '__main__':
  cli.main(EXPERIMENT, make_task, __doc__, sizes=SIZES)
