"""HH-RLHF in small: pairs like its own, from a Hugging Face directory to one that transformers loads and lets speak."""

import gzip
import json

import numpy as np
import pytest
import torch
import transformers
from chatml import make_directory

from experiments import hh
from rlhf_jax import cli, config
from rlhf_jax.errors import DataError
from rlhf_jax.metrics import read_metrics

SETTINGS = {'data.limits.prompt_tokens': 100, 'data.limits.response_tokens': 8,
            'tensorboard': False,
            'sft.steps': 3, 'sft.batch_size': 8, 'sft.optimizer.warmup_steps': 0, 'reward.steps': 3,
            'reward.batch_size': 8, 'reward.optimizer.warmup_steps': 0,
            'ppo.iterations': 2, 'ppo.batch_size': 8, 'ppo.epochs': 2}
THINGS = ('a tent', 'bread', 'a kite', 'soup', 'a raft', 'tea', 'a lamp', 'ink', 'a sled', 'glue', 'a drum', 'jam')


def pair(thing, politely=True):
  history = f'\n\nHuman: Hello.\n\nAssistant: Hi!\n\nHuman: How do I make {thing}?\n\nAssistant:'
  chosen = ' Gladly. Look it up.' if politely else ' With care, friend.'
  return {'chosen': history + chosen, 'rejected': history + ' Why me?'}


def write(path, rows):
  with gzip.open(path, 'wt') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)


@pytest.fixture
def folder(tmp_path):
  """HH's files: 12 good rows to train on and 2 bad ones, 3 to test on."""
  path = tmp_path / 'hh'
  path.mkdir()
  bad = [pair('fire') | {'rejected': pair('fire')['chosen']}, {'chosen': 'no transcript', 'rejected': 'at all'}]
  write(path / 'train.jsonl.gz', bad + [pair(thing) for thing in THINGS])
  write(path / 'test.jsonl.gz', [pair(thing, politely=False) for thing in ('a boat', 'paper', 'a bell')])
  return path


def experiment(folder, **settings):
  return config.override(hh.EXPERIMENT, {'data.path': folder} | SETTINGS | settings)


def test_all_stages_run_from_a_hugging_face_directory_and_the_export_speaks_in_transformers(folder, tmp_path, capsys):
  start, params = make_directory(
    tmp_path / 'llama', [said for thing in THINGS for said in pair(thing).values()])
  directory = tmp_path / 'run'
  results = cli.run_stages(experiment(folder, pretrained=start), hh.make_task, directory)

  before, *_, after = [row['held_out/loss'] for row in read_metrics(directory / 'sft') if 'held_out/loss' in row]
  assert after < before and results['sft']['loss'] == pytest.approx(after)
  found = results['reward']
  assert found['pairs'] == 3 and 0 <= found['accuracy_low'] <= found['accuracy'] <= found['accuracy_high'] <= 1
  assert results['table']['SFT']['KL, nats per answer'] == 0 and np.isfinite(results['table']['PPO']['score'])
  printed = capsys.readouterr().out
  assert '12 examples, 2 bad rows skipped, the first: ' in printed
  assert (r'sft: trained on is what stands between [[ and ]], for example '
          r'<|im_start|>system\nBe brief.<|im_') in printed

  for stage in ('sft', 'ppo'):
    exported = directory / stage / 'export'
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    moved = model.model.embed_tokens.weight.detach().numpy() - params['backbone']['embedding_VD']
    assert 0 < np.abs(moved).max() < 1
    asked = tokenizer.apply_chat_template([{'role': 'user', 'content': 'How do I make tea?'}], add_generation_prompt=True,
                                          return_tensors='pt', return_dict=True)
    assert model.generation_config.eos_token_id == [2, 0]  # <|im_end|>, and the model's own
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id not in (0, 2)
    said = model.generate(**asked, max_new_tokens=5, do_sample=False)
    assert said.shape[1] > asked['input_ids'].shape[1] and isinstance(tokenizer.decode(said[0]), str)
  scorer = transformers.AutoModelForSequenceClassification.from_pretrained(directory / 'reward' / 'export')
  with torch.no_grad():
    assert scorer(**asked).logits.shape == (1, 1)


def test_what_people_chose_is_imitated_and_every_prompt_is_asked_once(folder):
  write(folder / 'train.jsonl.gz', [pair('tea'), pair('tea', politely=False), pair('ink')])
  task = hh.make_task(experiment(folder))
  assert [example.responses for example in task.demonstrations[0]] == [
    ('Gladly. Look it up.',), ('With care, friend.',), ('Gladly. Look it up.',)]
  comparisons, held_out = task.comparisons
  assert [example.responses[1] for example in comparisons] == ['Why me?'] * 3 and len(held_out) == 3
  assert [example.prompt[-1].text for example in task.prompts[0]] == ['How do I make tea?', 'How do I make ink?']
  assert len(task.prompts[0][0].prompt) == 3 and not task.prompts[0][0].responses


@pytest.mark.parametrize('as_file', [True, False])
def test_without_a_test_split_a_share_of_the_prompts_is_held_out(folder, as_file):
  (folder / 'test.jsonl.gz').unlink()
  path = folder / 'train.jsonl.gz' if as_file else folder
  begun_apart = [{name: talk.replace('Hello.', f'Hello, {thing}.')
                  for name, talk in pair(thing).items()}
                 for thing in THINGS]
  write(folder / 'train.jsonl.gz', begun_apart)
  train, held_out = hh.load(experiment(path, **{'data.held_out_share': 0.4}))
  assert len(train) + len(held_out) == 12 and len(held_out) in range(1, 10)
  assert not {example.prompt[0] for example in train} & {example.prompt[0] for example in held_out}


def test_the_test_split_that_goes_with_the_split_is_held_out(tmp_path):
  sizes = {'train_sft': 12, 'test_sft': 2, 'train_prefs': 5, 'test': 3}
  for split, size in sizes.items():
    write(tmp_path / f'{split}.jsonl.gz', [pair(thing) for thing in THINGS[:size]])

  def load(**data):
    settings = {f'data.{name}': value for name, value in data.items()}
    return tuple(map(len, hh.load(experiment(tmp_path, **settings))))
  assert load(split='train_sft') == (12, 2)
  assert load(split='train_sft', held_out_split='test') == (12, 3)
  assert load(split='train_prefs', held_out_split='train_sft') == (5, 12)
  assert sum(load(split='train_prefs', held_out_share=0.5)) == 5  # there is no test_prefs
  with pytest.raises(DataError, match=r"no file for split 'train'.*Its splits are: test, test_sft, "
                                      'train_prefs, train_sft'):
    load()


@pytest.mark.parametrize('share, message', [
  (1e-9, 'the held-out part of the demonstrations is empty: 0 of 12 prompts fell into '
         '--data.held-out-share 1e-09; raise it or name --data.held-out-split'),
  (1 - 1e-9, 'the training part of the demonstrations is empty: 12 of 12 prompts fell into .*; '
             'lower it or name')])
def test_a_share_that_leaves_a_part_empty_is_an_error(folder, share, message):
  (folder / 'test.jsonl.gz').unlink()
  with pytest.raises(DataError, match=message):
    hh.make_task(experiment(folder, **{'data.held_out_share': share}))


def test_a_part_of_which_no_example_is_what_a_stage_needs_is_named(folder):
  write(folder / 'test.jsonl.gz', [{'prompt': 'How do I make ink?'}])
  with pytest.raises(DataError, match=r'^the held-out part of the demonstrations is empty: none of '
                                      'the 1 examples has a'):
    hh.make_task(experiment(folder))
  write(folder / 'test.jsonl.gz', [{'prompt': 'How do I make ink?', 'response': 'Look it up.'}])
  with pytest.raises(DataError, match=r'^the held-out part of the comparisons is empty: none of '
                                      'the 1 examples has two'):
    hh.make_task(experiment(folder))


def test_examples_that_a_stage_cannot_use_are_counted(folder, capsys):
  rows = [pair('tea'), pair('ink'), {'prompt': 'Hello.', 'response': 'Hi!'}, {'prompt': 'Hello?'},
          {'text': pair('jam')['chosen'] + '\n\nHuman: Thanks.'}]
  write(folder / 'train.jsonl.gz', rows)
  task = hh.make_task(experiment(folder))
  assert [len(part) for part in (*task.demonstrations, *task.comparisons, *task.prompts)
          ] == [4, 3, 2, 3, 5, 3]
  # What it did not answer is cut.
  assert task.demonstrations[0][-1].responses == ('Gladly. Look it up.',)
  said = capsys.readouterr().out
  assert ('the training part of the demonstrations: 1 of 5 examples lack the responses for it, and '
          'are left out\n') in said
  assert ('the training part of the comparisons: 3 of 5 examples lack the responses for it, and '
          'are left out\n') in said
  assert 'held-out part' not in said


def test_data_without_rankings_has_demonstrations_all_the_same(folder, capsys):
  for split in ('train', 'test'):
    write(folder / f'{split}.jsonl.gz',
          [{'prompt': thing, 'response': 'Look it up.'} for thing in THINGS])
  task = hh.make_task(experiment(folder))
  assert len(task.demonstrations[0]) == 12 and task.comparisons == ([], [])
  assert 'no example has two or more ranked responses' in capsys.readouterr().out


def test_at_most_so_many_examples_of_a_split(folder):
  train, held_out = hh.load(experiment(folder, **{'data.max_examples': 2}))
  assert len(train) == 2 and len(held_out) == 2


def test_a_bad_row_stops_the_run_where_skipping_is_turned_off(folder):
  with pytest.raises(DataError, match=r"train\.jsonl\.gz row 1: 'chosen' equals 'rejected'"):
    hh.load(experiment(folder, **{'data.skip_bad_rows': False}))
