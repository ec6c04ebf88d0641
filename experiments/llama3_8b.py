"""Llama 3 8B as an assistant, on TPUs or GPUs: SFT, reward model and PPO on the HH data of Anthropic, or any chat set.

An 8B policy with an 8B value function and an 8B reference, and a 1B reward model from scratch; or 70B of each, and an 8B
reward model (on four hosts of GPUs: a value head on the policy, and a reward model of 70B). For the settings of each
topology in `SIZES`, `--plan` says that every program compiles and fits: see the table in README.md.

    python -m experiments.llama3_8b --plan v5p:4x4x4                              the cost, on a machine without TPUs
    python -m experiments.llama3_8b --plan h100:8                                 of 8 GPUs, on a machine without any
    python -m experiments.llama3_8b --sized-for v5p:4x4x4                         on those 64 chips
    python -m experiments.llama3_8b --sized-for v5p:4x4x4 --data.path DIR         data of your own: see sources.py
    python -m experiments.llama3_8b --preset llama3.1-70b --sized-for v5p:4x4x8   70B on 128 chips

It has been compiled for its chips but not run, so there is no expected number. Learning rates and KL weight are of the size
that others publish for such models. Weights come from the Hugging Face hub, where Meta gives access on request, or from a
directory: --pretrained DIR.
"""

from experiments.hh import make_task
from rlhf_jax import cli
from rlhf_jax.config import DataConfig, Experiment, MeshConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_jax.data.encode import Limits
from rlhf_jax.optimizer import OptimizerConfig


def _adamw(learning_rate, schedule='cosine', **more):
  return OptimizerConfig(learning_rate=learning_rate, schedule=schedule, warmup_steps=20, **more)


EXPERIMENT = Experiment(
  preset='llama3-8b',
  pretrained='meta-llama/Meta-Llama-3-8B',
  reward_preset='llama3.2-1b',
  dtype='bfloat16',
  remat='block',
  scan_layers=True,
  mesh=MeshConfig(runner='sharded', data=1, fsdp=16, tensor=4),
  data=DataConfig(path='Anthropic/hh-rlhf', skip_bad_rows=True,
                  limits=Limits(prompt_tokens=1024, response_tokens=512, too_long='truncate')),
  sft=SFTConfig(steps=2500, batch_size=64, optimizer=_adamw(1e-5)),
  reward=RewardConfig(steps=2500, batch_size=64, optimizer=_adamw(1e-5)),
  ppo=PPOConfig(iterations=500, batch_size=512, minibatches=4, epochs=1, kl_weight=0.05, value_from='policy',
                optimizer=_adamw(1e-6, 'constant', epsilon=1e-5)),
)

SIZES = {
  'llama3-8b': {
    'v4:4x4x4': {'mesh.fsdp': 16, 'mesh.tensor': 4},
    'v5p:4x4x4': {'mesh.fsdp': 16, 'mesh.tensor': 4},
    'v5e:8x8': {'mesh.fsdp': 16, 'mesh.tensor': 4},
    'v6e:4x8': {'mesh.fsdp': 8, 'mesh.tensor': 4},
    'tpu7x:2x2x4': {'mesh.fsdp': 8, 'mesh.tensor': 4},
    'h100:8': {'mesh.fsdp': 8, 'mesh.tensor': 1},
  },
  'llama3.1-70b': {
    'v5p:4x4x8': {'pretrained': 'meta-llama/Llama-3.1-70B', 'reward_preset': 'llama3.1-8b', 'mesh.fsdp': 16,
                  'mesh.tensor': 8},
    # The tensor axis stays on a host. A value model of 70B beside the policy would not fit.
    'h100:8x4': {'pretrained': 'meta-llama/Llama-3.1-70B', 'reward_preset': None,
                 'ppo.shared_trunk': True, 'ppo.frozen_dtype': 'bfloat16', 'mesh.fsdp': 4, 'mesh.tensor': 8},
  },
}

if __name__ == '__main__':
  cli.main(EXPERIMENT, make_task, __doc__, sizes=SIZES)
