"""The host loop that SFT and reward model share: batches in, updates, metrics, evaluations and checkpoints out.

It resumes from the newest checkpoint, and goes on exactly as if it had never stopped: batches and keys are functions of
(seed, step), the checkpoint holds the rest.
"""

import dataclasses
import functools
import time

import jax
import numpy as np

from rlhf_jax import processes
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.errors import DivergedError, PreemptedError
from rlhf_jax.metrics import MetricsLog, Progress, read_metrics, values
from rlhf_jax.model.heads import initial_params
from rlhf_jax.optimizer import make_optimizer
from rlhf_jax.stages.task import Run
from rlhf_jax.step import init_state, make_eval_step, make_train_step


def compile_step(runner, loss_fn, config):
  """(optimizer, step): the update of a stage with that config, compiled, and what made it."""
  optimizer = make_optimizer(dataclasses.replace(
    config.optimizer, total_steps=config.optimizer.total_steps or config.steps,
    warmup_steps=warmup_steps(config)))
  step = make_train_step(loss_fn, optimizer, axis_name=runner.axis_name, microbatches=config.microbatches)
  return optimizer, runner.compile(step, inputs=('params', 'batch', 'same'), outputs=('params', 'same'), donate=(0,))


def warmup_steps(config):
  """Steps of a stage's warm-up: at most half of the stage, for a short trial run is still a run."""
  return min(config.optimizer.warmup_steps, config.steps // 2)


def descend(run, name, config, *, model, loss_fn, make_params, batches, held_out, unit):
  """State after config.steps updates, and the last evaluation; the stage's last checkpoint is left to `save_final`.

  `make_params()` gives the first parameters of `model`, as the runner lays them out, and is not called where there is a
  checkpoint. `batches` is a `Batches`; `held_out` a list of batches to evaluate on, before the first update and every
  config.evaluate_every.
  `unit` is what a loss counts, for the speed that is shown. Returns (state, evaluation).
  """
  runner, key = run.runner, jax.random.key(run.experiment.seed)
  if warmup_steps(config) < config.optimizer.warmup_steps:
    print(f'{name}: a warm-up of {warmup_steps(config)} steps in place of '
          f'{config.optimizer.warmup_steps}, so that it takes at most half of {config.steps}')
  optimizer, step = compile_step(runner, loss_fn, config)
  evaluate = _evaluation(runner, loss_fn, held_out)
  abstract = functools.partial(
    runner.abstract, lambda: init_state(initial_params(model, key), optimizer))
  if runner.ahead.is_on:
    _compile_ahead(runner, name, step, abstract(), batches, key)
  with Checkpoints(run.checkpoints(name)) as checkpoints, run.log(name) as log:
    start = checkpoints.latest()
    if start is None:
      state, start = runner.initialise(lambda params: init_state(params, optimizer), make_params()), 0
      log.truncate_after(-1)
      measured = None
    else:
      state, meta = checkpoints.restore(abstract())
      start, measured = int(state.step), meta['evaluation']
      log.truncate_after(start)
    if measured is None:                                                        # not done yet, or stopped in the middle
      measured = evaluate(state.params)
      if measured is None:
        raise PreemptedError(f'{name} step {start} is saved' if start else f'{name} has not begun')
      if start:
        check_finite(runner, run.stage(name), start, _prefixed(measured), next(iter(batches.read(start - 1, start))))
      if not any(row['step'] == start and _prefixed(measured).keys() <= row.keys() for row in read_metrics(run.stage(name))):
        log.write(start, _prefixed(measured), wall_s=0.0)                       # a kill may have left it there
    with Progress(name, total=config.steps, start=start) as progress:
      watch = _Watch(run, name, unit, log, progress)
      _say(progress, name, start, measured)
      for number, batch in enumerate(batches.read(start, config.steps), start):
        state, metrics = step(state, batch, jax.random.fold_in(key, number))
        done = number + 1
        watch.see(done, metrics, batch)
        stops = processes.stop_asked()
        last, evaluates, saves = done == config.steps, done % config.evaluate_every == 0, done % config.checkpoint_every == 0
        if last or evaluates or saves or stops:
          watch.settle()
        if last or evaluates:
          measured = evaluate(state.params, to_the_end=last)
          if measured is None:
            stops = True
          else:
            check_finite(runner, run.stage(name), done, _prefixed(measured), batch)
            log.write(done, _prefixed(measured), wall_s=watch.seconds)
            _say(progress, name, done, measured)
        if (saves or stops) and not last:
          checkpoints.save(done, state, {'finished': False, 'evaluation': measured})
          if stops:
            raise PreemptedError(f'{name} step {done} is saved')
    return state, measured


def _compile_ahead(runner, name, step, state, batches, key):
  """Has the step compiled for every length of its batches, while the stage begins."""
  for batch in reversed(batches.of_each_length()):  # each is put before those that wait
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    args = state, runner.place(shapes, 'batch'), key
    runner.ahead.add(f'{name} step', args, functools.partial(step.trace, *args), first=True)


def save_final(run, name, state, measured, **more):
  """The stage's last checkpoint: what the next stage starts from, and the sign that this one is finished."""
  with Checkpoints(run.checkpoints(name)) as checkpoints:
    checkpoints.save(int(state.step), state, {'finished': True, 'evaluation': measured, **more})


def _evaluation(runner, loss_fn, held_out):
  """evaluate(parameters): {metric: mean} over the batches, or None where the run is asked to stop in the middle."""
  measure = runner.compile(make_eval_step(loss_fn, axis_name=runner.axis_name),
                           inputs=('params', 'batch', 'same'), outputs='same')

  def evaluate(params, to_the_end=False):
    sums = None
    for batch in held_out:
      if not to_the_end and processes.stop_asked():
        return None
      metrics = runner.fetch(measure(params, batch, jax.random.key(0)))
      sums = metrics if sums is None else {name: sums[name] + metrics[name] for name in sums}
    return values(sums or {})
  return evaluate


def _say(progress, name, step, measured):
  progress.note(f'{name} {step}: held-out ' + '  '.join(f'{k} {v:.4g}' for k, v in measured.items()))


def _prefixed(measured):
  return {f'held_out/{name}': value for name, value in measured.items()}


@dataclasses.dataclass
class _Watch:
  """Writes and shows the metrics of updates, each while the next one runs; stops the stage where they are not finite."""
  run: Run
  name: str
  unit: str
  log: MetricsLog
  progress: Progress
  began: float = dataclasses.field(default_factory=time.monotonic)
  counted: float = 0.0  # units that the updates so far have seen
  waiting: tuple | None = None  # (step, metrics, batch) of the update that may still run

  @property
  def seconds(self):
    """Since the first update of this process."""
    return time.monotonic() - self.began

  def see(self, step, metrics, batch):
    """Settles the update before this one, and remembers this one."""
    self.settle()
    self.waiting = step, metrics, batch

  def settle(self):
    """Reads the metrics of the last update; raises DivergedError if they are not finite, keeping the batch."""
    if self.waiting is None:
      return
    (step, metrics, batch), self.waiting = self.waiting, None
    metrics = self.run.runner.fetch(metrics)
    known = values(metrics)
    check_finite(self.run.runner, self.run.stage(self.name), step, known, batch)
    self.counted += float(metrics['loss'].weight)
    self.log.write(step, known, wall_s=self.seconds)
    self.progress.update(step, {'loss': known['loss']} | {k: known[k] for k in ('accuracy',) if k in known},
                         rate=(self.counted / self.seconds, f'{self.unit}/s'))


def check_finite(runner, directory, step, known, batch):
  """Raises DivergedError where loss or gradient is not finite, and keeps the batch for inspection."""
  bad = [name for name in ('loss', 'gradient_norm', 'score', 'held_out/loss') if not np.isfinite(known.get(name, 0.0))]
  if not bad:
    return
  path = directory / f'bad_batch_{step}.npz'
  fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
  fields = runner.fetch(runner.place(fields, 'batch'))
  processes.once('bad batch', lambda: np.savez(path, **{key: value for key, value in fields.items() if value is not None}))
  raise DivergedError(f'{directory.name} step {step}: {bad[0]} is {known[bad[0]]}. Its batch is in {path}; the last '
                      'checkpoint is untouched. Lower the learning rate or clip_norm, or look at the batch.')
