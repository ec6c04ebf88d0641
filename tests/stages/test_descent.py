"""The loop of SFT and reward model: what it writes, when it stops, and what it says of what it leaves out."""

import dataclasses
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from small import assert_same_bits, copy, prepare, prompt, timeless

from rlhf_jax import processes
from rlhf_jax.checkpoint import Checkpoints, read_meta
from rlhf_jax.errors import CheckpointError, DataError, DivergedError, PreemptedError
from rlhf_jax.model.heads import initial_params
from rlhf_jax.records import Prompts
from rlhf_jax.runners import single
from rlhf_jax.stages import reward, sft
from rlhf_jax.stages.descent import check_finite

HUGE = 1e38  # a learning rate whose first update takes float32 out of its range in the next forward pass


def latest(run, name):
  with Checkpoints(run.checkpoints(name)) as checkpoints:
    return checkpoints.latest()


def test_metrics_of_every_update_and_held_out_ones_in_between(finished):
  rows = timeless(finished / 'sft')
  assert [row['step'] for row in rows if 'loss' in row] == [1, 2, 3, 4, 5, 6]
  assert [row['step'] for row in rows if 'held_out/loss' in row] == [0, 2, 4, 6]
  assert all(row['gradient_norm'] > 0 for row in rows if 'loss' in row)


@pytest.mark.parametrize('name, stage', [('sft', sft), ('reward', reward)])
def test_a_learning_rate_that_explodes_stops_at_a_step_and_keeps_batch_and_checkpoint(finished, tmp_path, name, stage):
  settings = {f'{name}__optimizer__{field}': value for field, value in
              (('learning_rate', HUGE), ('warmup_steps', 2), ('schedule', 'constant'))}
  settings |= {f'{name}__checkpoint_every': 1, f'{name}__evaluate_every': 99}
  run = prepare(copy(finished, tmp_path, 'tokenizer', *(['sft'] if name == 'reward' else [])), settings=settings)
  with pytest.raises(DivergedError, match=rf'^{name} step (\d+): (loss|gradient_norm) is (nan|inf)\. Its batch is in'
                     ) as raised:
    stage.train(run)
  step = int(str(raised.value).split()[2].rstrip(':'))
  assert latest(run, name) == step - 1 >= 1 and not run.finished(name)
  assert timeless(run.stage(name))[-1]['step'] == step - 1                      # what is not a number is not logged
  with np.load(run.stage(name) / f'bad_batch_{step}.npz') as kept:
    tokens = kept['tokens_BT' if name == 'sft' else 'tokens_BCT']
    assert tokens.shape[0] == getattr(run.experiment, name).batch_size
    assert kept['valid_BT' if name == 'sft' else 'valid_BCT'].any()


def test_infinite_parameters_stop_the_first_step(tmp_path):
  run = prepare(tmp_path)
  shapes = jax.eval_shape(lambda: initial_params(run.policy, jax.random.key(0)))
  params = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), shapes)
  params['backbone']['embedding_VD'][:] = np.inf
  with pytest.raises(DivergedError, match=r'^sft step 1: loss is nan.*bad_batch_1\.npz'):
    sft.train(dataclasses.replace(run, pretrained=lambda shardings: jax.device_put(params, shardings)))
  assert latest(run, 'sft') is None


@pytest.mark.parametrize('name', ['loss', 'gradient_norm', 'score', 'held_out/loss'])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_each_of_these_stops_a_run_alone(tmp_path, name, value):
  batch = Prompts(np.ones((2, 3), np.int32), np.ones((2, 3), bool), np.arange(2))
  check_finite(single(), tmp_path, 7, {'loss': 1.0, 'other': value}, batch)
  assert not list(tmp_path.iterdir())
  with pytest.raises(DivergedError, match=f'{tmp_path.name} step 7: {name} is {value}'):
    check_finite(single(), tmp_path, 7, {'loss': 1.0, name: value}, batch)
  with np.load(tmp_path / 'bad_batch_7.npz') as kept:
    assert set(kept) == {'tokens_BP', 'valid_BP', 'sample_B'}


def test_what_is_longer_than_the_limits_is_left_out_and_counted(tmp_path, capsys):
  run = prepare(tmp_path, settings={'sft__steps': 1, 'sft__optimizer__warmup_steps': 0})
  train, held_out = run.task.demonstrations
  long = [prompt('this and that and ' * 9, responses=('Yes.',), ranks=(0,)),
          prompt('tea', responses=('Well, well, well. ' * 9,), ranks=(0,))]
  sft.train(dataclasses.replace(run, task=dataclasses.replace(run.task, demonstrations=(train + long, held_out))))
  assert f'sft, training: 2 of {len(train) + 2} examples are longer than --data.limits allow' in \
    capsys.readouterr().out


def test_a_warm_up_of_more_than_half_of_the_stage_is_cut_and_said(tmp_path, capsys):
  settings = {'sft__steps': 3, 'sft__optimizer__learning_rate': 1e-3}
  long, short = (prepare(tmp_path / str(steps),
                         settings=settings | {'sft__optimizer__warmup_steps': steps})
                 for steps in (9, 1))
  sft.train(long)
  assert ('sft: a warm-up of 1 steps in place of 9, so that it takes at most half of 3'
          in capsys.readouterr().out)
  sft.train(short)
  assert 'warm-up' not in capsys.readouterr().out
  assert_same_bits(sft.restore(long), sft.restore(short))


def test_too_few_examples_for_a_batch(tmp_path):
  run = prepare(tmp_path, settings={'sft__batch_size': 64})
  with pytest.raises(DataError, match='40 examples do not fill one batch of 64'):
    sft.train(run)


def test_the_loss_before_is_reported_beside_the_loss_after(finished):
  run = prepare(finished)
  assert run.finished('sft') and run.finished('reward') and not run.finished('ppo')
  measured, rows = read_meta(run.checkpoints('sft'))['evaluation'], timeless(finished / 'sft')
  assert measured['loss_before'] == rows[0]['held_out/loss'] > measured['loss'] == rows[-1]['held_out/loss']
  assert measured['perplexity'] == pytest.approx(np.exp(measured['loss']))


def test_an_unfinished_stage_is_not_what_the_next_starts_from(tmp_path):
  run = prepare(tmp_path)
  with pytest.raises(CheckpointError, match=r'the stage sft is not finished in .* Run it first: add sft to --stages'):
    reward.train(run)
  with Checkpoints(run.checkpoints('sft')) as checkpoints:
    checkpoints.save(2, {'a': np.zeros(1)}, {'finished': False})
  with pytest.raises(CheckpointError, match=r'the stage sft is not finished'):
    sft.restore(run)


@pytest.fixture
def held_out(monkeypatch):
  """Counts the held-out batches that SFT reads, and sends the process SIGTERM when it comes to number `at`."""
  class HeldOut:
    count, at = 0, None

    def watch(self, batches):
      class Watched(list):
        def __iter__(_):
          for batch in batches:
            if self.count == self.at:
              os.kill(os.getpid(), signal.SIGTERM)
            self.count += 1
            yield batch
      return Watched(batches)
  found, in_order = HeldOut(), sft.batches.in_order
  monkeypatch.setattr(sft.batches, 'in_order', lambda *args, **more: found.watch(in_order(*args, **more)))
  return found


def test_a_signal_in_an_evaluation_stops_it_and_it_is_made_up_for(tmp_path, held_out):
  """Of 2 batches each, before the first update, after every second, and after the sixth, the last; step 2 is not saved."""
  settings = {'sft__batch_size': 4, 'sft__checkpoint_every': 4}
  whole = prepare(tmp_path / 'whole', settings=settings)
  sft.train(whole)
  assert held_out.count == 8
  for at, said in ((1, 'sft has not begun'), (2, 'sft step 2 is saved'), (5, 'sft step 4 is saved')):
    held_out.count, held_out.at, run = 0, at, prepare(tmp_path / str(at), settings=settings)
    with processes.joined(processes.ProcessesConfig()), pytest.raises(PreemptedError, match=said):
      sft.train(run)
    saved = copy(run.directory, tmp_path / f'{at} saved')
    sft.train(run)
    assert timeless(run.stage('sft')) == timeless(whole.stage('sft'))
    assert_same_bits(sft.restore(run), sft.restore(whole))
    # Killed after it has made up for the evaluation: the row is there, but nothing newer is saved.
    shutil.copy(run.stage('sft') / 'metrics.jsonl', saved / 'sft' / 'metrics.jsonl')
    again = prepare(saved, settings=settings)
    sft.train(again)
    assert timeless(again.stage('sft')) == timeless(whole.stage('sft'))
  held_out.count, held_out.at, run = 0, 6, prepare(tmp_path / 'last', settings=settings)
  with processes.joined(processes.ProcessesConfig()):
    sft.train(run)                                                               # ends with the stage, a moment later
    assert processes.stop_asked() and run.finished('sft')


def test_an_evaluation_that_is_made_up_for_is_held_to_the_same(tmp_path, held_out):
  settings = {'sft__evaluate_every': 1, 'sft__optimizer__learning_rate': HUGE, 'sft__optimizer__schedule': 'constant'}
  with pytest.raises(DivergedError, match=r'sft step \d: held_out/loss is nan') as raised:
    sft.train(prepare(tmp_path / 'whole', settings=settings))
  held_out.count, held_out.at, run = 0, int(str(raised.value)[9]), prepare(tmp_path / 'stopped', settings=settings)
  with processes.joined(processes.ProcessesConfig()), pytest.raises(PreemptedError, match='is saved'):
    sft.train(run)
  with pytest.raises(DivergedError, match=r'sft step \d: held_out/loss is nan') as again:
    sft.train(run)
  assert str(again.value)[:10] == str(raised.value)[:10]
