"""An assistant becomes better by a measure that you can check, in minutes on two CPU cores. No network, no files.

A small simulated world asks for facts, sums, lists and advice, and for things that are unsafe. A hidden gold judge scores
answers by rule; a noisy labeller ranks the SFT policy's answers by that score. The policy learns first from demonstrations
of which many are sarcastic, redundant, wrong or harmful, then from the rankings, as InstructGPT did (2203.02155).

    python -m experiments.quickstart
"""

import dataclasses

from rlhf_jax import cli
from rlhf_jax.config import DataConfig, Experiment, MeshConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_jax.data import simulated
from rlhf_jax.data.encode import Limits
from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.optimizer import OptimizerConfig
from rlhf_jax.stages.task import Task


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """How much the simulated people say."""
  demonstrations: int = 20000  # answers that SFT imitates
  held_out_demonstrations: int = 200  # answers to held-out prompts, for SFT's held-out loss
  ranked_prompts: int = 8000  # prompts whose answers the labeller ranks
  held_out_rankings: int = 10  # of each held-out prompt, with new answers every time
  answers_per_prompt: int = 4  # answers of the SFT policy to each of them
  noise: float = 0.7  # of the labeller: an answer better by this much wins with odds of e to 1


@dataclasses.dataclass(frozen=True)
class Quickstart(Experiment):
  """One run in the simulated world: SFT, reward model and PPO."""
  world: WorldConfig = WorldConfig()


EXPERIMENT = Quickstart(
  preset='micro',
  mesh=MeshConfig(runner='pmap', cpu_devices=2),
  data=DataConfig(limits=Limits(prompt_tokens=18, response_tokens=28)),
  sft=SFTConfig(steps=1380, batch_size=32, packed=True, evaluate_every=690, checkpoint_every=276,
                optimizer=OptimizerConfig(learning_rate=3e-3, schedule='cosine', warmup_steps=20)),
  reward=RewardConfig(steps=550, batch_size=32, evaluate_every=275, checkpoint_every=100,
                      optimizer=OptimizerConfig(learning_rate=7e-4, schedule='cosine', warmup_steps=20)),
  # The slots are for the answers that the labeller ranks; an iteration of PPO has fewer.
  ppo=PPOConfig(iterations=45, batch_size=128, slots=256, kl_weight=0.27, held_out_answers=16, checkpoint_every=10,
                optimizer=OptimizerConfig(learning_rate=2e-4, schedule='linear', epsilon=1e-5)),
)


def make_task(experiment):
  """The simulated world as data: demonstrations, rankings of the policy's own answers, prompts, and the gold judge."""
  world, seed = experiment.world, experiment.seed
  train_prompts, held_out_prompts = simulated.prompts(seed)
  demonstrations = (simulated.demonstrations(seed, world.demonstrations),
                    simulated.held_out_demonstrations(seed, world.held_out_demonstrations))

  def comparisons(answer):
    some = [train_prompts[i % len(train_prompts)] for i in range(world.ranked_prompts)]
    ranked = simulated.label(some, answer(some, world.answers_per_prompt), seed, world.noise)
    asked = held_out_prompts * world.held_out_rankings
    held_out = simulated.label(asked, answer(asked, world.answers_per_prompt), seed + 1, world.noise)
    distinct = lambda examples: [example for example in examples if len(set(example.ranks)) > 1]
    return distinct(ranked), distinct(held_out)

  def judge(prompts, responses):
    asked = [Example((Turn('user', prompt),)) for prompt in prompts]
    found = simulated.summarise(asked, responses)
    return {'gold score': found['score_mean'], 'gold score, std': found['score_std']} | {
      name: found[name] for name in ('correct', 'correct_safe', 'sarcastic', 'redundant', 'harmful', 'broken')}

  return Task(demonstrations=demonstrations, comparisons=comparisons,
              prompts=(train_prompts, held_out_prompts), judge=judge,
              ceiling=simulated.gold_accuracy, labelled=world.answers_per_prompt)


if __name__ == '__main__':
  cli.main(EXPERIMENT, make_task, __doc__)
