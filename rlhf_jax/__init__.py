"""RLHF in JAX: SFT, reward model and PPO on one Flax transformer, one Optax chain, Orbax checkpoints.

The names that a notebook composes; everything else is a module away. Start at `records.py` and `runners.py`.
"""

from rlhf_jax.experience import ExperienceConfig, experience
from rlhf_jax.generate import generate
from rlhf_jax.losses.language import cross_entropy
from rlhf_jax.losses.ppo import PPOLossConfig, ppo
from rlhf_jax.losses.preference import ranking
from rlhf_jax.maths.sampling import Sampling
from rlhf_jax.model.config import ModelConfig, preset
from rlhf_jax.model.heads import LanguageModel, Models, ScalarModel, initial_params
from rlhf_jax.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.records import Comparisons, Demonstrations, Experience, Mean, Prompts, Rollout, TrainState
from rlhf_jax.rewards import score_texts
from rlhf_jax.runners import pmapped, sharded, single
from rlhf_jax.step import init_state, make_eval_step, make_train_step
from rlhf_jax.update import make_update

__all__ = [
  'Comparisons', 'Demonstrations', 'Experience', 'ExperienceConfig', 'LanguageModel', 'Mean', 'ModelConfig', 'Models',
  'OptimizerConfig', 'PPOLossConfig', 'Prompts', 'Rollout', 'Sampling', 'ScalarModel', 'TrainState', 'cross_entropy',
  'experience', 'generate', 'init_state', 'initial_params', 'make_eval_step', 'make_optimizer', 'make_train_step',
  'make_update', 'pmapped', 'ppo', 'preset', 'ranking', 'score_texts', 'sharded', 'single',
]
