"""The command line: a run directory, its stages, what is left there for others to load, and what is said of a mistake."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import torch
import transformers
from small import copy, experiment, prepare, presets, task  # noqa: F401  presets: a fixture

from rlhf_jax import cli, processes
from rlhf_jax.errors import CheckpointError, ConfigError, DataError, PreemptedError
from rlhf_jax.model import forward, huggingface
from rlhf_jax.runners import Runner
from rlhf_jax.stages import ppo, reward, sft

QUICK = {'ppo__epochs': 1, 'ppo__minibatches': 1, 'ppo__iterations': 2}


def run(directory, *, stages=('sft', 'reward', 'ppo'), restart=False, export=False, settings=None, **changes):
  """What the command does, less the reading of flags."""
  return cli.run_stages(experiment(**QUICK | (settings or {})), functools.partial(task, **changes), directory,
                        cli.Command(stages=stages, restart=restart, export=export))


def main(directory, *flags, make_task=task):
  """The command itself, on the small experiment; flags with dots and dashes as on a command line."""
  return cli.main(experiment(**QUICK), make_task, 'A test.', args=['--run-dir', str(directory), *map(str, flags)])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(run directory, results, what was printed) of all three stages with their exports."""
  directory = tmp_path_factory.mktemp('cli') / 'run'
  return directory, run(directory, export=True)


# ---- a finished run

def test_it_leaves_results_answers_and_a_picture(whole):
  directory, results = whole
  assert json.loads((directory / 'results.json').read_text()) == json.loads(json.dumps(results, default=float))
  assert set(results) == {'sft', 'reward', 'ppo', 'table'} and set(results['table']) == {'SFT', 'PPO'}
  answers = [json.loads(line) for line in (directory / 'answers.jsonl').read_text().splitlines()]
  assert len(answers) == 16 and set(answers[0]) == {'prompt', 'SFT', 'PPO'}
  assert (directory / 'report.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  picture = matplotlib.image.imread(directory / 'report.png')
  assert picture.shape[0] > 400 and picture.shape[1] > 800 and picture.std() > 0.05
  assert json.loads((directory / 'experiment.json').read_text())['preset'] == 'pico'
  assert not list(directory.rglob('*.unfinished'))


def test_the_same_command_again_skips_what_is_finished_and_ends_in_the_same(whole, tmp_path, capsys):
  directory, results = whole
  again = run(copy(directory, tmp_path))
  said = capsys.readouterr().out
  assert [f'{name}: finished before, skipped' in said for name in ('sft', 'reward', 'ppo')] == [True] * 3
  assert again == json.loads(json.dumps(results, default=float))
  assert 'Reward model: ' in said and '16 answers to 2 held-out prompts' in said


def test_an_export_that_a_kill_prevented_is_made_up_for(whole, tmp_path):
  directory, _ = whole
  copy(directory, tmp_path)
  shutil.rmtree(tmp_path / 'sft' / 'export')
  run(tmp_path, export=True, stages=('sft',))
  found, expected = (huggingface.load(where, huggingface.read_config(where))
                     for where in (tmp_path / 'sft' / 'export', directory / 'sft' / 'export'))
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_stages_run_in_their_order(whole, tmp_path, capsys):
  results = run(copy(whole[0], tmp_path, 'tokenizer', 'sft', 'reward'), stages=('reward', 'sft'))
  assert list(results) == ['sft', 'reward']
  said = capsys.readouterr().out
  assert said.index('sft: finished before') < said.index('reward: finished before')


# ---- exports

def test_a_signal_during_an_export_ends_it_and_it_is_made_up_for(whole, tmp_path, monkeypatch):
  directory, _ = whole
  copy(directory, tmp_path)
  shutil.rmtree(tmp_path / 'sft' / 'export')
  fetched, fetch = [], Runner.fetch

  def third_is_signalled(runner, tree):
    fetched.append(tree)
    if len(fetched) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return fetch(runner, tree)
  monkeypatch.setattr(Runner, 'fetch', third_is_signalled)
  with processes.joined(processes.ProcessesConfig()), \
       pytest.raises(PreemptedError, match='sft is finished, its export will be written again'):
    run(tmp_path, export=True, stages=('sft',))
  assert len(fetched) == 3 and not (tmp_path / 'sft' / 'export').exists()
  run(tmp_path, export=True, stages=('sft',))
  written, expected = ((where / 'sft' / 'export' / 'model.safetensors').read_bytes() for where in (tmp_path, directory))
  assert written == expected


def small_run(directory):
  """The Run of a finished run directory."""
  return prepare(directory, settings=QUICK)


@pytest.mark.parametrize('stage', ['sft', 'ppo'])
def test_transformers_generates_with_the_exported_policy(whole, stage):
  exported, ours = whole[0] / stage / 'export', small_run(whole[0])
  model = transformers.AutoModelForCausalLM.from_pretrained(exported)
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  messages = [[{'role': 'user', 'content': text}] for text in ('Want tar?', 'Want an oar?')]
  asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', return_dict=True,
                                        padding=True)
  said = model.generate(**asked, max_new_tokens=6, do_sample=False)
  assert asked['input_ids'].shape[1] < said.shape[1] <= asked['input_ids'].shape[1] + 6
  assert tokenizer.eos_token_id == ours.chat.end_tokens[0] == model.generation_config.eos_token_id

  params = sft.restore(ours) if stage == 'sft' else ppo.restore(ours)['policy']
  tokens_BT, valid_BT = asked['input_ids'].numpy(), asked['attention_mask'].numpy().astype(bool)
  logits_BTV = forward.logits(ours.policy, params, jnp.asarray(tokens_BT), jnp.asarray(valid_BT))
  with torch.no_grad():
    np.testing.assert_allclose(np.asarray(logits_BTV)[valid_BT], model(**asked).logits.numpy()[valid_BT], atol=1e-4)


def test_transformers_scores_with_the_exported_reward_model(whole):
  """Its logits plus the score_bias of config.json are our scores, whatever the padding."""
  directory, _ = whole
  exported = directory / 'reward' / 'export'
  model = transformers.AutoModelForSequenceClassification.from_pretrained(exported)
  assert transformers.AutoTokenizer.from_pretrained(exported).padding_side == 'right'
  assert transformers.AutoTokenizer.from_pretrained(whole[0] / 'sft' / 'export').padding_side == 'left'
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  texts = ['<|user|>Want tar?<|assistant|>Yes.<|end|>', '<|user|>Want an oar?<|assistant|>No, no!<|end|>', '<|user|>A']
  batch = tokenizer(texts, return_tensors='pt', padding=True)
  with torch.no_grad():
    theirs = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits[:, 0].numpy()
  bias = json.loads((exported / 'config.json').read_text())['score_bias']
  found = small_run(directory)
  ours = forward.scores(found.reward, reward.restore(found), jnp.asarray(batch['input_ids'].numpy()),
                        jnp.asarray(batch['attention_mask'].numpy().astype(bool)))
  assert bias != 0 and np.ptp(theirs) > 1e-3
  np.testing.assert_allclose(theirs + bias, ours, atol=1e-4)


def test_an_exported_directory_is_a_model_to_start_from(whole, tmp_path):
  """SFT goes on where the exported policy stands, so its first held-out loss is the other run's last."""
  directory, results = whole
  again = run(tmp_path / 'run', stages=('sft',), settings={'pretrained': str(directory / 'sft' / 'export'), 'sft__steps': 3})
  assert again['sft']['loss_before'] == pytest.approx(results['sft']['loss'], rel=1e-5)
  assert again['sft']['loss'] != again['sft']['loss_before']


# ---- mistakes

def test_a_directory_of_another_config_names_what_differs(whole, tmp_path):
  run(copy(whole[0], tmp_path, 'tokenizer', 'sft'), stages=('sft',))
  with pytest.raises(ConfigError, match=r'holds a run of another config: ppo\.kl_weight: 0\.05 -> 0\.1; seed: 0 -> 3\. '
                                        'Pass the same flags .*--restart'):
    run(tmp_path, settings={'ppo__kl_weight': 0.1, 'seed': 3})


def test_before_any_stage_has_begun_the_config_may_be_corrected(tmp_path):
  """A start that failed on its data leaves nothing that matters, so the corrected command just works."""
  def no_data(experiment):
    raise DataError('nothing there')
  with pytest.raises(DataError):
    cli.run_stages(experiment(), no_data, tmp_path / 'run')
  (tmp_path / 'run' / 'tokenizer').mkdir()                                      # of other data, perhaps
  with pytest.raises(ConfigError, match='nothing to score'):
    run(tmp_path / 'run', stages=('sft', 'ppo'), settings={'seed': 1})
  assert json.loads((tmp_path / 'run' / 'experiment.json').read_text())['seed'] == 1


def test_restart_deletes_the_run(whole, tmp_path):
  directory = copy(whole[0], tmp_path / 'run', 'tokenizer', 'sft')
  run(directory, stages=('sft',))
  (directory / 'sft' / 'mine.txt').write_text('x')
  run(directory, stages=('sft',), restart=True, settings={'seed': 5})
  assert not (directory / 'sft' / 'mine.txt').exists()
  assert json.loads((directory / 'experiment.json').read_text())['seed'] == 5


def test_restart_deletes_nothing_but_a_run(tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')
  with pytest.raises(ConfigError, match=r'holds files but no experiment\.json, so it is not a run directory'):
    run(tmp_path, restart=True)
  assert (tmp_path / 'thesis.tex').read_text() == 'years of work'


@pytest.mark.parametrize('restart', [False, True])
def test_a_directory_that_cannot_be_written(tmp_path, restart):
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match=r'cannot write to the run directory .*/file/run: Not a directory\. Choose'):
    run(tmp_path / 'file' / 'run', restart=restart)
  with pytest.raises(CheckpointError, match='cannot write to the run directory'):
    run(tmp_path / 'file', restart=restart)


def test_a_damaged_experiment_file(whole, tmp_path):
  (copy(whole[0], tmp_path, 'sft') / 'experiment.json').write_text('{"seed": ')
  with pytest.raises(ConfigError, match=r'experiment\.json is not JSON .* nobody knows which run this is'):
    run(tmp_path)


def test_ppo_needs_sft(tmp_path):
  with pytest.raises(CheckpointError, match=r'the stage sft is not finished in .* Run it first: add sft to --stages'):
    run(tmp_path, stages=('ppo',))


def test_a_stage_that_does_not_exist(tmp_path):
  with pytest.raises(ConfigError, match=r"there is no stage 'dpo'\. Choose from: sft, reward, ppo"):
    run(tmp_path, stages=('sft', 'dpo'))


def test_weights_that_are_cut_short_stop_the_command_before_a_stage_begins(whole, tmp_path, capsys):
  start = copy(whole[0] / 'sft' / 'export', tmp_path / 'model') / 'model.safetensors'
  start.write_bytes(start.read_bytes()[:-1])
  with pytest.raises(SystemExit, match='2'):
    main(tmp_path / 'run', '--pretrained', start.parent)
  assert f'CheckpointError: {start} is damaged' in capsys.readouterr().err
  assert not (tmp_path / 'run' / 'sft').exists()


def test_a_checkpoint_of_another_model(whole, tmp_path):
  """The config says one model, the checkpoint is of another: someone copied a stage from elsewhere."""
  with pytest.raises(CheckpointError, match=r'has params/backbone/\S+ of shape .* It is a checkpoint of another model'):
    run(copy(whole[0], tmp_path, 'sft'), stages=('sft', 'reward'), settings={'preset': 'smaller'})


def test_a_tokenizer_too_large_for_the_model(whole, tmp_path):
  with pytest.raises(ConfigError, match='the policy model has a vocabulary of 290, but the tokenizer has ids up to 299'):
    prepare(copy(whole[0], tmp_path, 'tokenizer'), settings={'preset': 'smaller'})


def test_sequences_longer_than_the_context(tmp_path):
  with pytest.raises(ConfigError, match='sequences of 50 tokens, but the model has context_length=32'):
    prepare(tmp_path, settings={'data__limits__prompt_tokens': 40})


# ---- the process

@pytest.mark.parametrize('flags, match', [
  (('--stages', 'ppo'), 'CheckpointError: the stage sft is not finished'),
  (('--preset', 'nanoo'), "ConfigError: there is no model preset 'nanoo'. Choose one of: nano"),
  (('--mesh.runner', 'pmap', '--ppo.slots', '12'), 'ConfigError: --ppo.slots is 12, which does not divide over the 8 parts'),
  (('--mesh.cpu-devices', '3'), 'ConfigError: 3 CPU devices are asked for, but this process has 8'),
  (('--attention', 'splash'),
   'ConfigError: --attention splash: it is for TPUs, and the device here is a CPU. Choose another: '
   '--attention auto would take xla.'),
  (('--attention', 'cudnn', '--dtype', 'bfloat16'),
   'ConfigError: --attention cudnn: it is for GPUs, and the device here is a CPU. Choose another: '
   '--attention auto would take xla.'),
  (('--ppo.frozen-dtype', 'bfloat16'), 'ConfigError: --ppo.frozen-dtype bfloat16 with --dtype float32'),
  (('--attention', 'cudnn'), "ConfigError: model attention='cudnn' with dtype='float32'"),
])
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, flags, match):
  with pytest.raises(SystemExit) as exit_:
    main(tmp_path / 'run', *flags)
  said = capsys.readouterr().err
  assert exit_.value.code == 2
  assert match in said and said.count('\n') == 1 and 'Traceback' not in said


@pytest.mark.parametrize('flags, match', [
  (('--stages', 'dpo'), 'dpo'),
  (('--ppo.kl-wieght', 0.1), '--ppo.kl-weight'),
  (('--ppo.kl-weight', 'much'), 'much'),
  (('--sft.steps', 0), 'SFTConfig steps=0. It must be at least 1'),
])
def test_flags_are_checked_before_anything_is_written(tmp_path, capsys, flags, match):
  with pytest.raises(SystemExit) as exit_:
    main(tmp_path / 'run', *flags)
  assert exit_.value.code == 2 and match in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()


def test_weights_of_another_model_than_the_preset(tmp_path, capsys):
  default = dataclasses.replace(experiment(), pretrained='someone/pico')
  for more in ([], ['--sized-for', 'v5e:2x2']):
    with pytest.raises(SystemExit) as exit_:
      cli.main(default, task, 'A test.', args=['--preset', 'smaller', '--run-dir', str(tmp_path / 'run'), *more],
               sizes={'smaller': {'v5e:2x2': {'mesh.fsdp': 4}}})
    assert exit_.value.code == 2 and not (tmp_path / 'run').exists()
    assert '--preset smaller, but the weights are those of someone/pico' in capsys.readouterr().err
  for more in (['--pretrained', 'None'], ['--pretrained', 'someone/smaller'], ['--plan', 'cpu:1']):
    changed, _ = cli._parse(default, 'A test.', ['--preset', 'smaller', *more], {})
    assert changed.preset == 'smaller'


def test_a_full_disk_is_one_line_and_status_2(tmp_path, capsys):
  def full(experiment):
    raise OSError(28, 'No space left on device', str(tmp_path / 'run' / 'sft' / 'metrics.jsonl'))
  with pytest.raises(SystemExit) as exit_:
    main(tmp_path / 'run', make_task=full)
  said = capsys.readouterr().err
  assert exit_.value.code == 2 and said.count('\n') == 1
  assert 'No space left on device' in said and 'the same command goes on from there' in said


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path):
  def wrong(experiment):
    raise FileNotFoundError(2, 'No such file', 'x')
  with pytest.raises(FileNotFoundError):
    main(tmp_path / 'run', make_task=wrong)
