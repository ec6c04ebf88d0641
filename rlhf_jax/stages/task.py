"""What an experiment brings to the stages (`Task`), and what the stages share (`Run`)."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax import processes
from rlhf_jax.checkpoint import read_meta
from rlhf_jax.config import Experiment
from rlhf_jax.data.examples import Example
from rlhf_jax.errors import CheckpointError
from rlhf_jax.metrics import MetricsLog
from rlhf_jax.model.heads import LanguageModel, ScalarModel
from rlhf_jax.runners import Runner

Split = tuple[list[Example], list[Example]]  # to train on, held out


@dataclasses.dataclass(frozen=True)
class Task:
  """Data and measures of an experiment.

  `comparisons` is called with answer(prompts, samples) -> texts per prompt, which samples from the SFT policy: a world
  whose labellers rank the policy's own answers needs it, recorded rankings do not. `judge(prompts, responses)` measures
  answers beside the reward model, by name. `reward_functions` maps names to (function, weight).
  """
  demonstrations: Split
  comparisons: Callable[[Callable], Split]
  prompts: Split
  judge: Callable[[list[str], list[str]], dict[str, float]] | None = None
  reward_functions: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  chat_template: str | None = None  # in place of the tokenizer's own, or of the one that it gets where it has none
  ceiling: Callable[[list[Example]], float] | None = None  # reward accuracy that the labellers' noise allows


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of an experiment on its devices."""
  experiment: Experiment
  task: Task
  tokenizer: Any
  runner: Runner
  directory: pathlib.Path
  policy: LanguageModel
  reward: ScalarModel
  pretrained: Callable | None = None  # load(shardings=...) -> parameters to start SFT from, in place of fresh ones

  @property
  def value(self):
    """The value function: of the size of the model that it starts from."""
    return self.reward if self.experiment.ppo.value_from == 'reward' else ScalarModel(self.policy.config)

  def stage(self, name):
    """Where the stage of that name writes."""
    return self.directory / name

  def checkpoints(self, name):
    """Where the stage of that name keeps its checkpoints."""
    return self.directory / name / 'checkpoints'

  def finished(self, name):
    """Whether the stage of that name is: its newest checkpoint can be read, and is its last."""
    try:
      finished = bool(read_meta(self.checkpoints(name)).get('finished'))
    except CheckpointError:                                                     # none yet, or damaged: it goes on
      finished = False
    return bool(processes.first_says(finished))

  def require(self, name):
    """CheckpointError where the stage of that name is not finished: what it left is half trained, or nothing."""
    if not self.finished(name):
      raise CheckpointError(f'the stage {name} is not finished in {self.directory}, and what was asked for starts from the '
                            f'model that it leaves. Run it first: add {name} to --stages.')

  def say_skipped(self, name, skipped, kept):
    """One line on examples that a stage leaves out because of their length."""
    if skipped:
      print(f'{name}: {skipped} of {skipped + kept} examples are longer than --data.limits allow, and are skipped')

  def log(self, name):
    """The metrics log of the stage of that name."""
    wandb = None if self.experiment.wandb is None else {'project': self.experiment.wandb, 'group': self.directory.name,
                                                        'name': f'{self.directory.name}/{name}'}
    return MetricsLog(self.stage(name), tensorboard=self.experiment.tensorboard, wandb=wandb)
