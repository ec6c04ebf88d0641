"""What the stages take of texts: rows that are kept, answers as sampled, prompts as written."""

import dataclasses
import datetime
import functools
import json

import jax
import numpy as np
import pytest
from small import copy, experiment, prepare, prompt, task, timeless

from rlhf_jax import cli
from rlhf_jax.data import encode, kept_rows, text
from rlhf_jax.data.chat import open_chat
from rlhf_jax.data.examples import Answer, Example, Prompt, Turn
from rlhf_jax.errors import CheckpointError, ConfigError, DataError
from rlhf_jax.metrics import read_samples
from rlhf_jax.stages import ppo, reward, sft
from rlhf_jax.stages.answers import compile_ask, sampling

QUICK = {'ppo__epochs': 1, 'ppo__minibatches': 1, 'ppo__iterations': 1,
         'ppo__optimizer__schedule': 'constant'}
HISTORY = (Turn('user', 'Tea?'), Turn('assistant', 'Why?'), Turn('user', 'So!'))


# ---- rows are kept

def test_what_was_encoded_is_read_the_next_time(finished, tmp_path, monkeypatch):
  run = prepare(copy(finished, tmp_path, 'tokenizer'))
  examples = [prompt(thing, responses=('Yes.',), ranks=(0,))
              for thing in ('tea', 'a very very long thing')]
  first = run.rows('sft', encode.demonstrations, examples, 'training')
  assert first.counts.too_long == 1 and len(list((tmp_path / 'encoded').iterdir())) == 1
  monkeypatch.setattr(type(run.chat), 'conversations', None)  # now it cannot encode
  again = run.rows('sft', encode.demonstrations, list(examples), 'training')
  assert [row.ids.tolist() for row in again.rows] == [row.ids.tolist() for row in first.rows]
  assert again.counts == first.counts
  with pytest.raises(TypeError):
    run.rows('sft', encode.demonstrations, examples[:1], 'training')


def test_a_kept_file_that_is_damaged_is_made_again(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer'))
  examples = [prompt(thing, responses=('Yes.',), ranks=(0,)) for thing in ('tea', 'ink', 'jam')]
  first = run.rows('sft', encode.demonstrations, examples, 'training')
  (path,) = (tmp_path / 'encoded').iterdir()
  path.write_bytes(path.read_bytes()[:-40])
  again = run.rows('sft', encode.demonstrations, examples, 'training')
  assert [row.ids.tolist() for row in again.rows] == [row.ids.tolist() for row in first.rows]
  assert kept_rows.read_rows(path) is not None


def test_a_part_without_examples_is_called_by_its_name(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer'))
  with pytest.raises(DataError, match='the held-out part of sft has no examples'):
    run.rows('sft', encode.demonstrations, [], 'held-out')


def test_a_row_that_cannot_be_encoded_stops_the_stage_or_is_skipped(finished, tmp_path, capsys):
  bad = Example((Turn('user', 'so \ufdd0'),), ('Yes.',), (0,), 'train.jsonl row 7')

  def run(**settings):
    made = prepare(copy(finished, tmp_path / str(len(settings)), 'tokenizer'),
                   settings={'sft__steps': 1} | settings)
    train, held_out = made.task.demonstrations
    return dataclasses.replace(
      made, task=dataclasses.replace(made.task, demonstrations=([*train, bad], held_out)))
  with pytest.raises(DataError, match=r'train\.jsonl row 7: a turn of the user holds .* or pass '
                                      r'--data\.skip-bad-rows'):
    sft.train(run())
  sft.train(run(data__skip_bad_rows=True))
  assert ('sft, training: 1 of 41 examples cannot be encoded, and are skipped; the first: '
          'train.jsonl row 7') in capsys.readouterr().out


def test_a_run_says_what_is_trained_on(finished, tmp_path, capsys):
  run = prepare(copy(finished, tmp_path, 'tokenizer'), settings={'sft__steps': 1})
  first = Example(HISTORY, ('Yes.',), (0,))
  train, held_out = run.task.demonstrations
  sft.train(dataclasses.replace(
    run, task=dataclasses.replace(run.task, demonstrations=([first, *train], held_out))))
  said = [line for line in capsys.readouterr().out.splitlines()
          if line.startswith('sft: trained on is')]
  assert said == ['sft: trained on is what stands between [[ and ]], for example '
                  '<|user|>Tea?<|assistant|>[[Why?<|end|>]]'
                  '<|user|>So!<|assistant|>[[Yes.<|end|>]]']


# ---- answers stay what was sampled

def test_sampled_answers_are_compared_as_their_ids(finished, tmp_path):
  """Also those of exactly R tokens without an end, which as texts would be a token too long."""
  run, seen = prepare(
    copy(finished, tmp_path, 'tokenizer', 'sft'), settings={'reward__steps': 1}), []

  def comparisons(ask):
    examples = [prompt(thing) for thing in (
      'tea', 'ink', 'jam', 'glue', 'soup', 'a kite', 'a raft', 'a lamp', 'a sled')]
    answers = ask(examples, 3)
    ranked = [dataclasses.replace(example, responses=tuple(said), ranks=(0, 1, 2))
              for example, said in zip(examples, answers) if len({each.ids for each in said}) == 3]
    seen.extend(ranked)
    return ranked[:-1], ranked[-1:]
  run = dataclasses.replace(run, experiment=dataclasses.replace(
    run.experiment, reward=dataclasses.replace(run.experiment.reward, batch_size=2)),
    task=dataclasses.replace(run.task, comparisons=comparisons))
  reward.train(run)
  R = run.experiment.data.limits.response_tokens
  cut = [answer for example in seen for answer in example.responses if len(answer.ids) == R
         and answer.ids[-1] not in run.chat.end_tokens]
  assert cut and len(seen) > 3  # an SFT model of six updates runs on
  kept = reward._read(run.stage('reward') / 'comparisons.jsonl')
  for example, written in zip(seen, [*kept[0], *kept[1]], strict=True):
    assert ([answer.ids for answer in written.responses]
            == [answer.ids for answer in example.responses])
    assert written.responses == example.responses
  rows, counts = encode.comparisons(seen, run.chat, run.experiment.data.limits)
  assert counts.too_long == counts.refused == counts.equal == 0
  for example, ranked in zip(seen, rows, strict=True):
    (asked,) = run.chat.prompts([example.prompt])
    assert ([row.ids for row in ranked.rows]
            == [[*asked, *answer.ids] for answer in example.responses])


def test_an_answer_of_a_policy_says_what_it_sampled(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'))
  ((one, other),) = compile_ask(run)(sft.restore(run), [prompt('tea')], 3, samples=2)
  assert isinstance(one, Answer) and one.ids != other.ids
  for said in (one, other):
    ids = said.ids[:-1] if said.ids[-1] in run.chat.end_tokens else said.ids
    assert said == run.chat.tokenizer.decode(ids, skip_special_tokens=True)


# ---- judges and reward functions

def test_they_get_what_people_wrote(finished, tmp_path, capsys):
  """The user's last words, all turns and the ids of the answer; of a cut prompt, the whole."""
  asked, answered, judged = [], [], []

  def function(prompts, responses):
    asked.extend(prompts)
    answered.extend(responses)
    return [0.0] * len(responses)

  def judge(prompts, responses):
    judged.extend(prompts)
    return {'count': float(len(responses))}
  long = Example((Turn('system', 'Be kind.'), Turn('user', 'this and ' * 9), *HISTORY[1:]))
  examples = [Example(HISTORY), long] * 8
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'),
                settings=QUICK | {'data__limits__too_long': 'truncate'},
                prompts=(examples, examples[:2]), reward_functions={'f': (function, 1.0)},
                judge=judge)
  ppo.train(run)
  ppo.compare(run)
  assert len(asked) == len(answered) and set(asked) == set(judged) == {'So!'}
  assert {each.turns for each in asked} == {each.turns for each in judged} == {HISTORY, long.prompt}
  assert (all(isinstance(each, Prompt) for each in asked)
          and all(isinstance(each, Answer) for each in answered))
  samples = read_samples(run.stage('ppo'))
  assert f"  'So!' -> {samples[0]['response'][:90]!r}" in capsys.readouterr().out  # people see one
  assert {sample['prompt'] for sample in samples} == {'So!'}
  assert [['user', 'Tea?'], ['assistant', 'Why?'], ['user', 'So!']] in [
    sample['turns'] for sample in samples]


def test_each_answer_is_scored_with_its_own_prompt(finished, tmp_path):
  """A function that sees only the prompt must give each row of a batch its own number, with buckets
  too.
  """
  things = ('tea', 'jam', 'ink', 'a kite', 'a raft', 'a lamp', 'a drum', 'a sled') * 2
  examples = [prompt(thing) for thing in things]
  for lengths in (1, 3):
    seen = []

    def function(prompts, responses, seen=seen):
      seen.append([str(each) for each in prompts])
      return [float(len(each)) for each in prompts]
    run = prepare(copy(finished, tmp_path / str(lengths), 'tokenizer', 'sft'),
                  prompts=(examples, examples[:2]), settings=QUICK | {'ppo__lengths': lengths},
                  reward_functions={'f': (function, 1.0)})
    tokens = []
    with pytest.MonkeyPatch.context() as patch:
      trim = ppo._trimmed
      patch.setattr(ppo, '_trimmed', lambda rollout, lengths, tokens=tokens, trim=trim:
                    tokens.append(jax.device_get(rollout)) or trim(rollout, lengths))
      ppo.train(run)
    (rollout,) = tokens
    P = rollout.tokens_BT.shape[1] - rollout.mask_BR.shape[1]
    read = [run.chat.tokenizer.decode(ids[:P][valid[:P]])
            for ids, valid in zip(rollout.tokens_BT, rollout.valid_BT)]
    assert read == [f'<|user|>{said}<|assistant|>' for said in seen[0]] and len(set(read)) == 8
    assert timeless(run.stage('ppo'))[0]['score'] == pytest.approx(
      np.mean([len(said) for said in seen[0]]))


# ---- what a run begins with

def test_data_that_changed_since_is_refused_once_a_stage_has_begun(finished, tmp_path):
  directory = copy(finished, tmp_path)
  facts = json.loads((directory / 'data.json').read_text())
  less = lambda split: (split[0][1:], split[1])
  other = {'demonstrations': less(task(None).demonstrations), 'prompts': less(task(None).prompts)}
  for name, split in other.items():
    with pytest.raises(ConfigError, match='the data of the run in .* has changed since it began; '
                                          rf'{name}, training: '
                                          r'\d+ examples .* -> \d+ examples .*another --run-dir'):
      prepare(directory, **{name: split})
  recorded = task(None).comparisons(None)
  prepare(directory, comparisons=recorded)  # nothing was known of those before
  with pytest.raises(ConfigError,
                     match='has changed since it began; comparisons, held-out: 2 examples'):
    prepare(directory, comparisons=(recorded[0], recorded[1][:1]))
  prepare(directory, comparisons=recorded)
  assert json.loads((directory / 'data.json').read_text())['began'] == facts['began']
  prepare(copy(finished, tmp_path / 'fresh', 'tokenizer'), **other)  # no stage has begun


def test_the_date_of_a_template_is_that_of_the_runs_beginning(tmp_path):
  dated = text.TURN_TEMPLATE.replace("{% for m", "{{ strftime_now('%Y') + ' ' }}{% for m", 1)
  run = prepare(tmp_path, chat_template=dated)
  facts = json.loads((tmp_path / 'data.json').read_text())
  assert datetime.datetime.fromisoformat(facts['began']).year == datetime.datetime.now().year
  (tmp_path / 'data.json').write_text(json.dumps(facts | {'began': '1999-12-31T23:59:59'}))
  again = prepare(tmp_path, chat_template=dated)
  (ids,), (later,) = (each.chat.prompts([[Turn('user', 'Tea?')]]) for each in (run, again))
  assert run.chat.tokenizer.decode(ids).startswith(str(datetime.datetime.now().year))
  assert again.chat.tokenizer.decode(later) == '1999 <|user|>Tea?<|assistant|>'


# ---- where answers end

def test_a_policy_stops_at_every_end_token_of_the_run(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'))
  tokenizer = run.chat.tokenizer
  tokenizer.add_special_tokens({'additional_special_tokens': ['<|system|>', '<|user|>']})
  user = tokenizer.convert_tokens_to_ids('<|user|>')
  chat = open_chat(tokenizer, generation_ends=(user, 70), pad_token=0)  # 70 is a letter, no end
  assert chat.end_tokens == (tokenizer.eos_token_id, user)
  assert sampling(dataclasses.replace(run, chat=chat)).end_tokens == chat.end_tokens


def test_what_the_generation_config_says_reaches_sampling_and_exports(tmp_path, capsys):
  """A directory whose generation config names a second end token, and one that is a letter.

  Its tokenizer has a begin token, which the export is to name too.
  """
  made = prepare(tmp_path / 'made')
  sft.train(made)
  cli._export(made, 'sft')
  directory = made.stage('sft') / 'export'
  second = made.chat.tokenizer.convert_tokens_to_ids('<|system|>')
  config = json.loads((directory / 'generation_config.json').read_text())
  (directory / 'generation_config.json').write_text(
    json.dumps(config | {'eos_token_id': [second, 70]}))
  tokenizer = text.load_tokenizer(directory)
  tokenizer.bos_token = '<|user|>'
  text.save_tokenizer(tokenizer, directory)
  run = cli.prepare(experiment(pretrained=str(directory), preset='pico'), functools.partial(task),
                    tmp_path / 'run')
  assert 'names the end tokens [70], which are ordinary text' in capsys.readouterr().out
  ends = (made.chat.end_tokens[0], second)
  assert run.chat.end_tokens == sampling(run).end_tokens == ends
  sft.train(run)
  cli._export(run, 'sft')
  written = json.loads((run.stage('sft') / 'export' / 'generation_config.json').read_text())
  assert written['eos_token_id'] == list(ends) and written['pad_token_id'] not in ends
  assert written['bos_token_id'] == tokenizer.bos_token_id == run.chat.begin_token


def test_before_a_stage_has_begun_a_tokenizer_of_other_data_is_made_anew(tmp_path):
  """As where a bad row stopped the first start, and was mended."""
  old = [prompt('zzz zzz zzz', responses=('zzzz',), ranks=(0,))] * 30
  prepare(tmp_path, demonstrations=(old, old))
  run = prepare(tmp_path)
  assert run.chat.tokenizer.get_vocab() == prepare(tmp_path / 'fresh').chat.tokenizer.get_vocab()


@pytest.mark.parametrize('text', ['{"began": "2026-', '{}', '[]', '{"began": 1}',
                                  '{"began": "2026-11-26", "prompts, training": 3}'])
def test_damaged_facts_of_the_data_are_named(finished, tmp_path, text):
  directory = copy(finished, tmp_path)
  (directory / 'data.json').write_text(text)
  with pytest.raises(CheckpointError, match=r'data\.json is damaged .* Restore it, or delete it'):
    prepare(directory)


def test_facts_of_the_data_that_are_lost_are_missed(finished, tmp_path, capsys):
  directory = copy(finished, tmp_path)
  (directory / 'data.json').unlink()
  prepare(directory)
  assert 'data.json is absent, so nobody knows whether the data is that' in capsys.readouterr().out


def test_a_prompt_of_the_labellers_that_cannot_be_asked_is_named(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'),
                settings={'data__skip_bad_rows': True})
  bad = Example((Turn('user', '\ufdd0'),), place='simulated prompt 3')
  with pytest.raises(DataError, match=r'1 of 2 prompts that the policy was asked .* the first: '
                                      'simulated prompt 3'):
    compile_ask(run)(sft.restore(run), [prompt('tea'), bad], 3)


def test_a_part_that_cannot_be_encoded_is_called_by_its_name(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer'), settings={'data__skip_bad_rows': True})
  bad = Example((Turn('user', '\ufdd0'),), ('Yes.',), (0,), 'test.jsonl row 1')
  with pytest.raises(DataError, match=r'^sft, held-out: none of 1 examples is left: 1 of 1 .* '
                                      r'test\.jsonl row 1'):
    run.rows('sft', encode.demonstrations, [bad], 'held-out')


def test_the_table_scores_each_answer_with_its_own_prompt(finished, tmp_path):
  """Answers are written in the order of the prompts' lengths, which is not that of the prompts."""
  together = lambda prompts, responses: [
    len(asked) * len(said) + len(asked.turns) for asked, said in zip(prompts, responses)
  ]
  examples = [prompt(thing) for thing in ('a kite', 'tea', 'a lamp', 'ink', 'soup', 'a sled', 'jam')]
  run = prepare(
    copy(finished, tmp_path, 'tokenizer', 'sft'),
    settings=QUICK | {'ppo__batch_size': 4, 'ppo__held_out_answers': 2},
    prompts=(examples, examples),
    reward_functions={'f': (together, 1.0)},
  )
  ppo.train(run)
  table, said = ppo.compare(run)
  for name, (prompts, responses) in said.items():
    assert len(prompts) == 12 and len({str(each) for each in prompts}) == 7
    scores = [len(asked) * len(answer) + 1 for asked, answer in zip(prompts, responses)]
    assert table[name]['score'] == pytest.approx(np.mean(scores), rel=1e-5)
