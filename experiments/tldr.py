"""Summaries of Reddit posts: the TL;DR recipe for Pythia of "The N+ Implementation Details of RLHF with PPO".

Huang et al. 2024 (2403.17031), a reproduction of Stiennon et al. 2020 (2009.01325). Data and weights come from the Hugging
Face hub: SFT and PPO on filtered TL;DR posts, the reward model on people's choices between two summaries.

    python -m experiments.tldr --mesh.runner sharded --mesh.fsdp 8
    python -m experiments.tldr --preset nano --pretrained None --sft-data DIR --comparison-data DIR     # data of your own

Hardware: 8 accelerators of 80 GB, as in the paper; not run here. Expected, published for pythia-1b / 2.8b / 6.9b:

    reward accuracy on validation pairs           .629 / .669 / .689      4 seeds, standard deviation about .004
    SFT ROUGE-L                                   .247 / .258 / .263      not measured here
    SFT summary preferred to the reference        .33 / .405 / .435       by GPT-3.5; not measured here
    PPO summary preferred to the reference        .62 .54 .22 .20 / .705 to .75 / .75 to .785      two seeds of 1b collapse

Where it differs from the recipe: the reward model's scores are brought to mean 0 and standard deviation 1 over its training
responses (the paper subtracts the mean over the demonstrations and leaves the scale, so --ppo.kl-weight is not in quite the
same unit); one limit, 53 tokens, holds for every response, those that the reward model is trained on too (paper: 169); a
prompt of more than 512 tokens loses its start, not the last lines of its post; the sum of the value
loss, which with --ppo.experience.score-slot after_end has one slot more in each response that ended
before the limit, is divided by the count of response tokens, as the policy's is (TRL divides by the
count of its own slots: its value loss is a little smaller).
"""

import dataclasses
import re

from rlhf_jax import cli
from rlhf_jax.config import DataConfig, Experiment, PPOConfig, RewardConfig, SFTConfig
from rlhf_jax.data import rows, sources
from rlhf_jax.data.encode import Limits
from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.data.text import PLAIN_TEMPLATE
from rlhf_jax.errors import DataError
from rlhf_jax.experience import ExperienceConfig
from rlhf_jax.losses.ppo import PPOLossConfig
from rlhf_jax.optimizer import OptimizerConfig
from rlhf_jax.stages.task import Task

NEEDED = ("needed are info {subreddit, title, post}, two summaries [{text}] and choice, 0 or 1; or subreddit, title, post "
          'and summary. Mend or drop the row, or pass --data.skip-bad-rows.')

POST = re.compile(r'\s*SUBREDDIT: r/(?P<subreddit>[^\n]*)\n+TITLE: (?P<title>.*?)\n+'
                  r'POST: (?P<post>.*?)\s*(TL;DR:)?\s*', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class TLDR(Experiment):
  """One run on TL;DR: SFT, reward model and PPO.

  Its data are these two, each with a split train and a split validation, which is held out:
  --data.path, --data.split, --data.held-out-split and --data.held-out-share are not read.
  """
  sft_data: str = 'vwxyzjn/summarize_from_feedback_tldr_3_filtered'  # posts with summaries: hub id, folder or file
  # The comparisons of openai/summarize_from_feedback, which itself needs a loading script that `datasets` no longer runs.
  comparison_data: str = 'vwxyzjn/summarize_from_feedback_oai_preprocessing_1711138084'  # posts with ranked summaries
  held_out_examples: int = 2048  # of each validation split


def _adamw(schedule):
  return OptimizerConfig(learning_rate=3e-6, schedule=schedule, epsilon=1e-5, weight_decay=0.01, clip_norm=None)


EXPERIMENT = TLDR(
  preset='pythia-1b',
  pretrained='EleutherAI/pythia-1b-deduped',
  dtype='bfloat16',
  data=DataConfig(skip_bad_rows=True, limits=Limits(prompt_tokens=512, response_tokens=53, too_long='truncate')),
  sft=SFTConfig(steps=911, batch_size=128, microbatches=4, optimizer=_adamw('cosine')),               # 116,722 posts, once
  reward=RewardConfig(steps=1450, batch_size=64, microbatches=4, optimizer=_adamw('cosine')),         # 92,832 pairs, once
  ppo=PPOConfig(iterations=1953, batch_size=512, epochs=4, minibatches=1, microbatches=16, temperature=0.7,   # 1M episodes
                kl_weight=0.05, samples_every=50, checkpoint_every=50, optimizer=_adamw('linear'),
                loss=PPOLossConfig(clip=0.2, value_clip=0.2, value_weight=0.1),
                experience=ExperienceConfig(kl_estimator='k1', discount=1.0, trace=0.95, score_slot='after_end',
                                            missing_end='replace', missing_end_score=1.0, whiten_rewards=False,
                                            whiten_advantages=True, bessel=True)),
)


def make_task(experiment):
  """Demonstrations and prompts of one source, comparisons of the other; both hold out their validation split."""
  posts = _load(experiment, experiment.sft_data)
  pairs = _load(experiment, experiment.comparison_data)
  return Task(demonstrations=tuple(map(sources.as_demonstrations, posts)), prompts=tuple(map(sources.as_prompts, posts)),
              chat_template=PLAIN_TEMPLATE, comparisons=tuple(map(sources.as_comparisons, pairs)))


def _load(experiment, path):
  data = experiment.data
  return tuple(load_examples(path, split, data.skip_bad_rows, limit)
               for split, limit in (('train', data.max_examples), ('validation', experiment.held_out_examples)))


def load_examples(path, split, skip_bad_rows=False, limit=None):
  """The first `limit` good examples of a split, in a layout of TL;DR or any that `rows` reads."""
  examples, skipped = sources.load_examples(path, split=split, skip_bad_rows=skip_bad_rows, limit=limit,
                                            read_row=to_example)
  said = f', {len(skipped)} bad rows skipped, the first: {skipped[0]}' if skipped else ''
  print(f'{path} {split}: {len(examples)} examples{said}')
  return examples


def to_example(row, place='') -> Example:
  """The Example of a row: two summaries compared, a post with its summary, or a layout of `rows`.

  The same post with the same summaries gives the same texts in each layout: the prompt is that of
  `query`, and a response has no space around it, for the template puts one before it.
  """
  try:
    if 'summaries' in row:
      if row['choice'] not in (0, 1) or len(row['summaries']) != 2:
        raise DataError(f'{place}: {len(row["summaries"])} summaries with choice {row["choice"]!r}; {NEEDED}')
      texts = [summary['text'].strip() for summary in row['summaries']]
      row = {'prompt': query(row['info']), 'chosen': texts[row['choice']], 'rejected': texts[1 - row['choice']]}
    elif 'post' in row:
      row = {'prompt': query(row), 'response': row['summary'].strip()}
  except (KeyError, TypeError, AttributeError) as error:
    raise DataError(f'{place}: the row is no post with a summary, nor with two of them ({type(error).__name__}: {error}); '
                    f'{NEEDED}') from error
  example = rows.to_example(row, place)
  responses = tuple(response.strip() for response in example.responses)
  if len(responses) > 1 and len(set(responses)) == 1:
    raise DataError(f'{place}: all {len(responses)} responses are equal, but for the space around '
                    f'them; {NEEDED}')
  *earlier, last = example.prompt
  prompt = (*earlier, Turn(last.role, _as_queried(last.text)))
  return dataclasses.replace(example, prompt=prompt, responses=responses)


def _as_queried(prompt):
  """A prompt that is a post, in the format of `query`; any other without the space at its end."""
  post = POST.fullmatch(prompt)
  return query(post.groupdict()) if post else prompt.rstrip()


def query(info):
  """What the policy is asked, in the format of Stiennon et al. 2020."""
  return (f'SUBREDDIT: r/{info["subreddit"].strip()}\n\nTITLE: {info["title"].strip()}\n\nPOST: {info["post"].strip()}'
          '\n\nTL;DR:')


if __name__ == '__main__':
  cli.main(EXPERIMENT, make_task, __doc__)
