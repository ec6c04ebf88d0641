"""Stage 2, the reward model: it learns to score responses as people ranked them, then its scores are normalised, once."""

import functools
import itertools
import json

import jax
import numpy as np

from rlhf_jax import handoff, processes
from rlhf_jax.checkpoint import restore_part
from rlhf_jax.data import batches, encode
from rlhf_jax.data.examples import Answer, Example, Turn
from rlhf_jax.errors import DataError
from rlhf_jax.losses.preference import beats, candidate_scores, ranking
from rlhf_jax.model.heads import initial_params
from rlhf_jax.stages import sft
from rlhf_jax.stages.answers import compile_ask
from rlhf_jax.stages.descent import descend, save_final
from rlhf_jax.stages.task import PARTS

NAME = 'reward'


def train(run):
  """Trains, normalises and checkpoints the reward model; returns held-out accuracy, its 95 % interval, and calibration."""
  experiment, config = run.experiment, run.experiment.reward
  limits = experiment.data.limits
  train_examples, held_out_examples = _comparisons(run)
  train_rows, held_out_rows = (run.rows(NAME, encode.comparisons, examples, part).rows
                               for examples, part in zip((train_examples, held_out_examples),
                                                         PARTS))
  source = batches.comparison_batches(train_rows, batch_size=config.batch_size, length=limits.tokens, seed=experiment.seed,
                                      part=run.runner.part)
  candidates = max(len(row.rows) for row in (*train_rows, *held_out_rows))
  collate = functools.partial(batches.collate_comparisons, length=limits.tokens, candidates=candidates)
  in_order = lambda rows: batches.in_order(rows, config.batch_size, encode.RankedRows([], []), collate, run.runner.part)
  held_out = in_order(held_out_rows)
  state, measured = descend(run, NAME, config, model=run.reward, loss_fn=loss(run),
                            make_params=functools.partial(_start, run), batches=source, held_out=held_out, unit='prompts')

  score = run.runner.compile(lambda params, batch: {'score_BC': candidate_scores(run.reward, params, batch),
                                                     'rank_BC': batch.rank_BC},
                             inputs=('params', 'batch'), outputs='batch')
  measured |= accuracy(*_scored(run, score, state.params, held_out))
  if run.task.ceiling is not None:
    measured['ceiling'] = run.task.ceiling(held_out_examples)
  if config.normalise:
    score_BC, rank_BC = _scored(run, score, state.params, in_order(train_rows))
    kept = score_BC[rank_BC >= 0]
    measured |= {'raw_score_mean': float(kept.mean()), 'raw_score_std': float(kept.std())}
    params = handoff.normalised(state.params, kept.mean(), max(kept.std(), 1e-6))
    state = state.replace(params=run.runner.place(params, 'params'))
  save_final(run, NAME, state, measured)
  return measured


def accuracy(score_BC, rank_BC):
  """Of held-out ordered pairs: the share that the scores order rightly, its 95 % interval, and the calibration error.

  The interval is a bootstrap over prompts, since pairs of one prompt are not independent. Calibration: the expected
  difference, over ten bins of sigmoid(score difference), between that probability and what people chose (Guo et al. 2017).
  """
  beats_BCC = np.asarray(beats(rank_BC))
  gap_BCC = score_BC[:, :, None] - score_BC[:, None, :]
  right_B, pairs_B = ((gap_BCC > 0) & beats_BCC).sum((1, 2)), beats_BCC.sum((1, 2))
  counted = pairs_B > 0
  if not counted.any():
    raise DataError('no held-out prompt has one response ranked above another, so there is no accuracy. Hold out prompts '
                    'whose responses differ in rank.')
  right, pairs = right_B[counted], pairs_B[counted]
  drawn = np.random.default_rng(0).integers(0, len(pairs), (1000, len(pairs)))
  low, high = np.percentile(right[drawn].sum(1) / pairs[drawn].sum(1), [2.5, 97.5])
  certain = 1 / (1 + np.exp(-np.abs(gap_BCC[beats_BCC])))                       # at least a half: how sure of the pair
  hit = gap_BCC[beats_BCC] > 0
  bins = np.minimum(((certain - 0.5) * 20).astype(int), 9)
  error = sum(abs((certain - hit)[bins == b].sum()) for b in range(10)) / len(hit)
  return {'accuracy': right.sum() / pairs.sum(), 'accuracy_low': low, 'accuracy_high': high, 'pairs': float(pairs.sum()),
          'calibration_error': float(error)}


def loss(run):
  """What this stage descends."""
  return ranking(run.reward, run.experiment.reward.centring_weight)


def restore(run):
  """Parameters of the finished stage, on this run's devices; None where the run has no reward model."""
  if not processes.first_says(run.checkpoints(NAME).exists()):
    return None
  run.require(NAME)
  abstract = {'params': run.runner.abstract(lambda: initial_params(run.reward, jax.random.key(0)))}
  return restore_part(run.checkpoints(NAME), abstract)['params']


def _start(run):
  key, same_size = jax.random.fold_in(jax.random.key(run.experiment.seed), 1), run.reward.config == run.policy.config
  make = lambda sft_params, key: handoff.reward_params(sft_params, initial_params(run.reward, key))
  return run.runner.initialise(make, sft.restore(run) if same_size else None, key)


def _scored(run, score, params, collated):
  """(score_BC, rank_BC) of all prompts of a list of Comparisons, as numpy."""
  known = [run.runner.fetch(score(params, batch)) for batch in collated]
  return tuple(np.concatenate([batch[name] for batch in known]) for name in ('score_BC', 'rank_BC'))


def _comparisons(run):
  """The task's comparisons: recorded ones, or those that it makes by asking the SFT policy.

  The latter are written down, so that a resumed run reads the same.
  """
  if not callable(run.task.comparisons):
    if not run.task.comparisons[0]:
      raise DataError('there are no comparisons: none of the examples has two or more ranked '
                      'responses. Use data that has them, or leave reward out of --stages.')
    return run.task.comparisons
  path = run.stage(NAME) / 'comparisons.jsonl'
  if not processes.first_says(path.exists()):
    ready = functools.lru_cache(lambda: functools.partial(compile_ask(run), sft.restore(run)))
    made = run.task.comparisons(lambda examples, samples: ready()(examples, run.experiment.seed + 1, samples))
    processes.once('comparisons made', functools.partial(_write, path, made))
  return _read(path)


def _write(path, split):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps({'held_out': held_out, 'prompt': [[turn.role, turn.text] for turn in example.prompt],
                       'responses': example.responses, 'ranks': example.ranks,
                       'place': example.place,
                       'ids': [getattr(response, 'ids', None) for response in example.responses]})
           for held_out, examples in zip((False, True), split) for example in examples]
  unfinished = path.with_suffix('.unfinished')
  unfinished.write_text('\n'.join(lines) + '\n')
  unfinished.rename(path)


def _read(path):
  split = [], []
  for row in map(json.loads, path.read_text().splitlines()):
    prompt = tuple(itertools.starmap(Turn, row['prompt']))
    sampled = row.get('ids') or [None] * len(row['responses'])
    responses = tuple(text if ids is None else Answer(text, ids)
                      for text, ids in zip(row['responses'], sampled))
    split[row['held_out']].append(Example(prompt, responses, tuple(row['ranks']), row['place']))
  return split
