"""What one side of a comparison is asked to do, as it is told to the side's process."""

import dataclasses
import json
from typing import Any, Literal

from experiments.bench import BatchConfig

Workload = Literal['sft', 'ppo', 'generate', 'reward']
DEVICES = {'gpu': 'cuda', 'cpu': 'cpu'}  # our names and those of PyTorch
# In the order of importance, and on each the sides in the order in which they run.
DONE_BY = {'sft': ('rlhf_jax', 'PyTorch'), 'ppo': ('rlhf_jax', 'PyTorch'),
           'generate': ('rlhf_jax', 'PyTorch', 'transformers'), 'reward': ('rlhf_jax', 'PyTorch')}


@dataclasses.dataclass(frozen=True)
class Work:
  """One workload of one side."""
  side: str
  workload: Workload
  preset: str
  batch: BatchConfig
  device: Literal['gpu', 'cpu'] = 'gpu'
  dtype: Literal['bfloat16', 'float32'] = 'bfloat16'
  compiled: bool = True  # PyTorch: torch.compile
  running: dict[str, Any] = dataclasses.field(default_factory=dict)  # ours: fields of ModelConfig
  repeats: int = 5  # rounds that count

  @property
  def title(self):
    """The workload and its sizes."""
    sizes = self.batch
    prompt, new = sizes.of_ppo
    return f'{self.preset}: ' + {
      'sft': f'SFT {sizes.sft_rows} x {sizes.tokens}',
      'reward': f'reward {sizes.reward_pairs} pairs x {sizes.of_reward}',
      'generate': f'generate {sizes.generate_prompts} x ({sizes.prompt_tokens} + {sizes.new_tokens})',
      'ppo': f'PPO {sizes.ppo_prompts} x ({prompt} + {new}), {sizes.epochs} x {sizes.minibatches}',
    }[self.workload]

  @property
  def tokens(self):
    """Tokens of a round: learnt from, or written; those of PPO are the tokens of responses."""
    sizes = self.batch
    return {'sft': sizes.sft_rows * sizes.tokens,
            'reward': 2 * sizes.reward_pairs * sizes.of_reward,
            'generate': sizes.generate_prompts * sizes.new_tokens,
            'ppo': sizes.ppo_prompts * sizes.of_ppo[1]}[self.workload]

  def to_json(self):
    """The Work as one line."""
    return json.dumps(dataclasses.asdict(self))


def from_json(text):
  """The Work of a line that `to_json` wrote."""
  values = json.loads(text)
  return Work(**values | {'batch': BatchConfig(**values['batch'])})
