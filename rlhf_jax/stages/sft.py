"""Stage 1, supervised fine-tuning: the language model learns to write the demonstrations' responses."""

import functools
import math

import jax

from rlhf_jax.checkpoint import restore_part
from rlhf_jax.data import batches, encode
from rlhf_jax.losses.language import cross_entropy
from rlhf_jax.metrics import read_metrics
from rlhf_jax.model.heads import initial_params
from rlhf_jax.stages.descent import descend, save_final
from rlhf_jax.stages.task import PARTS

NAME = 'sft'
_SHOWN = 400  # characters of either end of a row that is shown


def train(run):
  """Trains and checkpoints the policy; returns held-out {'loss', 'perplexity', 'loss_before'} and the loss's metrics."""
  experiment, config = run.experiment, run.experiment.sft
  limits = experiment.data.limits
  train_rows, held_out_rows = (run.rows(NAME, encode.demonstrations, examples, part).rows
                               for examples, part in zip(run.task.demonstrations, PARTS))
  _say_what_is_trained(run, train_rows[0])
  source = batches.demonstration_batches(train_rows, batch_size=config.batch_size, length=limits.tokens,
                                         seed=experiment.seed, packed=config.packed,
                                         part=run.runner.part)
  held_out = batches.in_order(held_out_rows, config.batch_size, encode.Row([], []),
                              lambda rows: batches.collate_demonstrations(rows, limits.tokens), run.runner.part)
  state, measured = descend(run, NAME, config, model=run.policy, loss_fn=loss(run),
                            make_params=functools.partial(_start, run), batches=source, held_out=held_out, unit='tokens')
  measured['perplexity'] = math.exp(min(measured['loss'], 100.0))
  measured['loss_before'] = read_metrics(run.stage(NAME))[0]['held_out/loss']
  save_final(run, NAME, state, measured)
  return measured


def _say_what_is_trained(run, row):
  """A line with the first row as the model sees it, and one where it does not learn to end."""
  shown = run.chat.shown(row.ids, row.mask).replace('\n', '\\n')
  if len(shown) > 2 * _SHOWN:
    shown = f'{shown[:_SHOWN]} ... {shown[-_SHOWN:]}'
  print(f'{NAME}: trained on is what stands between [[ and ]], for example {shown}')
  if row.ids[-1] in run.chat.end_tokens and not row.mask[-1]:
    print(f'{NAME}: the {{% generation %}} marks of the chat template leave out the end token, so '
          'the model does not learn to end its answers. Move it inside them.')


def loss(run):
  """What this stage descends."""
  return cross_entropy(run.policy)


def restore(run):
  """Parameters of the finished stage, on this run's devices: fresh buffers at every call, so that they can be donated."""
  run.require(NAME)
  abstract = {'params': run.runner.abstract(lambda: initial_params(run.policy, jax.random.key(0)))}
  return restore_part(run.checkpoints(NAME), abstract)['params']


def _start(run):
  """The first parameters: those that the run was given, or fresh ones."""
  fresh, key = functools.partial(initial_params, run.policy), jax.random.key(run.experiment.seed)
  if run.pretrained is None:
    return run.runner.initialise(fresh, key)
  return run.pretrained(shardings=run.runner.shardings(jax.eval_shape(fresh, key), 'params'))
