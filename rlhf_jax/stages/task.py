"""What an experiment brings to the stages (`Task`), and what the stages share (`Run`)."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from rlhf_jax import processes
from rlhf_jax.checkpoint import read_meta
from rlhf_jax.config import Experiment
from rlhf_jax.data.chat import Chat
from rlhf_jax.data.encode import Encoded
from rlhf_jax.data.examples import Answer, Example, Prompt
from rlhf_jax.data.kept_rows import read_rows, rows_key, write_rows
from rlhf_jax.errors import CheckpointError, DataError
from rlhf_jax.metrics import Counter, MetricsLog
from rlhf_jax.model.heads import LanguageModel, ScalarModel
from rlhf_jax.runners import Runner

# How long the others wait while the first process encodes; if it dies, they know sooner.
_ENCODING_S = 24 * 3600
Split = tuple[list[Example], list[Example]]  # to train on, held out
PARTS = 'training', 'held-out'  # of a Split, in words


@dataclasses.dataclass(frozen=True)
class Task:
  """Data and measures of an experiment.

  `comparisons` are recorded rankings; or a function, for labellers who rank the policy's own
  answers. It is called with answer(prompts, samples) -> an `Answer` for each sample, a list a
  prompt, which samples from the SFT policy. Who ranks returns the same objects in the responses of
  its examples, so that they are compared as the tokens that were sampled. `judge(prompts,
  responses)` measures answers beside the reward model, by name: prompts are what the user said
  last, each with its `turns`; responses are texts, each with its `ids`. `reward_functions` maps
  names to (function, weight); they get the same.
  """
  demonstrations: Split
  comparisons: Split | Callable[[Callable], Split]
  prompts: Split
  judge: Callable[[Sequence[Prompt], Sequence[Answer]], dict[str, float]] | None = None
  reward_functions: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  chat_template: str | None = None  # in place of the tokenizer's own, or of the one that it gets where it has none
  ceiling: Callable[[list[Example]], float] | None = None  # reward accuracy that the labellers' noise allows
  labelled: int = 2  # where `comparisons` is a function: how many answers to a prompt are ranked, at most

  @property
  def candidates(self):
    """How many responses of a prompt are compared, at most."""
    if callable(self.comparisons):
      return self.labelled
    return max((len(example.responses) for split in self.comparisons for example in split), default=2)


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of an experiment on its devices."""
  experiment: Experiment
  task: Task
  chat: Chat
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

  def rows(self, stage: str, read: Callable[..., Encoded], examples: Sequence[Example],
           part: str) -> Encoded:
    """What `read` (of encode.py) makes of a part of a stage's examples; kept beside the run for the
    next start.

    The first process encodes for all. What is left out or cut is said.
    """
    if not examples:
      raise DataError(f'the {part} part of {stage} has no examples. Check the data path and '
                      '--data.split, or hold out a larger share.')
    data = self.experiment.data
    name = (f'{read.__name__}-'
            f'{rows_key(read, examples, self.chat, data.limits, data.skip_bad_rows)[:20]}.npz')
    path = self.directory / 'encoded' / name

    def encode():
      if read_rows(path) is not None:
        return
      with Counter(f'{stage}: encoding the {part} examples', len(examples)) as counter:
        try:
          write_rows(path, read(examples, self.chat, data.limits, skip_bad_rows=data.skip_bad_rows,
                                progress=counter.update, as_arrays=True))
        except DataError as error:
          raise DataError(f'{stage}, {part}: {error}') from error
    processes.once(f'encoded {stage} {part}', encode, wait_s=_ENCODING_S)
    encoded = read_rows(path)
    for sentence in encoded.counts.sentences():
      print(f'{stage}, {part}: {sentence}')
    return encoded

  def log(self, name):
    """The metrics log of the stage of that name."""
    wandb = None if self.experiment.wandb is None else {'project': self.experiment.wandb, 'group': self.directory.name,
                                                        'name': f'{self.directory.name}/{name}'}
    return MetricsLog(self.stage(name), tensorboard=self.experiment.tensorboard, wandb=wandb)
