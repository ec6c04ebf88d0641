"""Sources: each kind of file, folder and set, their splits, what a stage takes, what errors say."""

import dataclasses
import gzip
import importlib
import json
import re
import sys

import datasets
import pytest

from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.data.sources import (
  as_comparisons,
  as_demonstrations,
  as_prompts,
  held_out,
  held_out_split,
  load_examples,
  splits,
)
from rlhf_jax.errors import ConfigError, DataError

HI, YO, WHY = Turn('user', 'Hi?'), Turn('assistant', 'Yo.'), Turn('user', 'Why?')
BRIEF = Turn('system', 'Be brief.')
ROW = {'prompt': 'Hi?', 'response': 'Yo.'}
EXAMPLE = Example((HI,), ('Yo.',), (0,))
USER, GOOD = {'role': 'user', 'content': 'Hi?'}, {'role': 'assistant', 'content': 'Good.'}


# ---- files

def lines(*rows):
  return '\n'.join(json.dumps(row) for row in rows) + '\n'


def write(path, *rows):
  path.write_text(lines(*rows))
  return path


def prompts(path, **settings):
  return [example.prompt[-1].text for example in load_examples(path, **settings)[0]]


def asks(*texts):
  return [{'prompt': text, 'response': 'Yo.'} for text in texts]


def test_jsonl(tmp_path):
  path = write(tmp_path / 'train.jsonl', ROW, {'prompt': 'Who?'})
  examples, skipped = load_examples(path)
  assert examples == [Example((HI,), ('Yo.',), (0,), f'{path} row 1'),
                      Example((Turn('user', 'Who?'),), place=f'{path} row 2')]
  assert skipped == []


def test_jsonl_of_windows(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(b'\xef\xbb\xbf' + '{"prompt": "Größe?"}\r\n\r\n{"prompt": "木"}'.encode())
  examples, _ = load_examples(str(path))
  assert [(example.prompt[0].text, example.place) for example in examples] == [
    ('Größe?', f'{path} row 1'), ('木', f'{path} row 3')]                          # rows as an editor counts them


def test_only_a_newline_ends_a_row(tmp_path):
  (tmp_path / 'x.jsonl').write_text('{"prompt": "a\u2028b\x85c"}\n', newline='')
  assert prompts(tmp_path / 'x.jsonl') == ['a\u2028b\x85c']


@pytest.mark.parametrize('name', ['x.jsonl.gz', 'x.jsonl'])                       # whatever the name says
def test_gzip(tmp_path, name):
  (tmp_path / name).write_bytes(gzip.compress(lines(*asks('a', 'b')).encode()))
  assert prompts(tmp_path / name) == ['a', 'b']


@pytest.mark.parametrize('text', [json.dumps(asks('a', 'b'), indent=1), '\ufeff' + json.dumps(asks('a', 'b')),
                                  lines(*asks('a', 'b'))])
def test_json(tmp_path, text):
  (tmp_path / 'x.json').write_text(text, encoding='utf-8')
  assert prompts(tmp_path / 'x.json') == ['a', 'b']
  assert load_examples(tmp_path / 'x.json')[0][1].place == f'{tmp_path / "x.json"} row 2'


def test_parquet(tmp_path):
  path = tmp_path / 'x.parquet'
  datasets.Dataset.from_list([{'messages': [USER, GOOD]}, {'messages': [USER]}]).to_parquet(path)
  assert load_examples(path)[0] == [Example((HI,), ('Good.',), (0,), f'{path} row 1'),
                                    Example((HI,), place=f'{path} row 2')]


def test_limit_counts_good_examples(tmp_path):
  path = write(tmp_path / 'x.jsonl', *asks('a'), {'prompt': ''}, *asks('b', 'c'))
  assert prompts(path, limit=2, skip_bad_rows=True) == ['a', 'b']
  assert prompts(path, limit=1) == ['a']                                          # the bad row is never read
  with pytest.raises(ConfigError, match=r'limit is 0. Needed is 1 or more'):
    load_examples(path, limit=0)


def test_bad_rows_are_skipped_and_reported(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(lines(ROW, {'prompt': ''}).encode() + b'{"prompt": \n"\xff"\n' + lines(ROW, [3]).encode())
  examples, skipped = load_examples(path, skip_bad_rows=True)
  assert [example.place for example in examples] == [f'{path} row 1', f'{path} row 5']
  assert [message.split(': ')[0] for message in skipped] == [f'{path} row {number}' for number in (2, 3, 4, 6)]
  for message, part in zip(skipped, ["'prompt' is empty", 'invalid JSON', 'not UTF-8', 'the row is [3]']):
    assert part in message
  with pytest.raises(DataError, match=r"x.jsonl row 2: 'prompt' is empty"):
    load_examples(path)


def test_all_rows_bad(tmp_path):
  path = write(tmp_path / 'x.jsonl', {'a': 1}, {'b': 2})
  with pytest.raises(DataError, match=r'x.jsonl \(train\): each of its 2 rows is bad, first: .* row 1: the fields are'):
    load_examples(path, skip_bad_rows=True)


DAMAGED = {
  'empty': ('x.jsonl', b'', r'x\.jsonl \(train\): it has no rows. Check that the path'),
  'blank': ('x.jsonl', b'\n \n', r'it has no rows'),
  'empty list': ('x.json', b'[]', r'it has no rows'),
  'invalid JSON': ('x.jsonl', b'{"prompt": "a"}\n{"prompt": \n', r"row 2: '{\"prompt\": .*' is invalid JSON, Expec"),
  'cut list': ('x.json', b'[{"prompt": "a"},', r'x.json as a list of rows: .* is invalid JSON'),
  'not an object': ('x.jsonl', b'["a"]\n', r"row 1: the row is \['a'\]; needed is an object"),
  'UTF-16': ('x.jsonl', '{"prompt": "a"}'.encode('utf-16'), r'row 1: byte 0xff is not UTF-8. Save the file as UTF-8'),
  'cut gzip': ('x.jsonl.gz', gzip.compress(lines(*asks('a')).encode())[:-9], r'is gzip, damaged or cut off after row'),
  'bad gzip': ('x.jsonl.gz', b'\x1f\x8bnonsense', r'x.jsonl.gz is gzip, damaged or cut off after row 0'),
  'bad parquet': ('x.parquet', b'PAR1 nonsense', r'x.parquet is not parquet, or damaged after row 0'),
  'other kind': ('x.csv', b'prompt\na\n', r'x.csv is a file of unknown kind. Needed is a .jsonl'),
}


@pytest.mark.parametrize('name, content, message', DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=message):
    load_examples(tmp_path / name)


NOWHERE = ['./nowhere', '../nowhere', '/nowhere', '~/nowhere', 'nowhere.jsonl', 'a/b/nowhere', 'nowhere.csv']


@pytest.mark.parametrize('path', NOWHERE)
def test_no_such_path(path):
  with pytest.raises(DataError, match=re.escape(path) + r' does not exist, seen from /.*Needed is a .jsonl'):
    load_examples(path)


def test_a_file_has_one_split(tmp_path):
  write(tmp_path / 'test_1.jsonl', ROW)
  assert prompts(tmp_path / 'test_1.jsonl', split='test') == prompts(tmp_path / 'test_1.jsonl') == ['Hi?']
  write(tmp_path / 'train.jsonl', ROW)
  with pytest.raises(DataError, match=r"train.jsonl is one file, and split 'test' was asked of it. Name the file"):
    load_examples(tmp_path / 'train.jsonl', split='test')
  write(tmp_path / 'testing.jsonl', ROW)
  with pytest.raises(DataError,
                     match=r"testing.jsonl is one file, and split 'test' was asked of it"):
    load_examples(tmp_path / 'testing.jsonl', split='test')


# ---- folders

def test_folder_of_files(tmp_path):
  write(tmp_path / 'train-2.jsonl', *asks('b'))
  write(tmp_path / 'train-1.jsonl', *asks('a'))
  (tmp_path / 'test.jsonl.gz').write_bytes(gzip.compress(lines(*asks('c')).encode()))
  datasets.Dataset.from_list(asks('d')).to_parquet(tmp_path / 'validation-00000-of-00001.parquet')
  assert prompts(tmp_path) == ['a', 'b']
  assert prompts(tmp_path, split='test') == ['c']
  assert prompts(tmp_path, split='validation') == ['d']
  named = (r"has no file for split 'dev'; it holds test.jsonl.gz, train-1.*Its splits are: test, "
           'train, validation. Name another with --data.split, or with --data.held-out-split '
           r'.*save_to_disk')
  with pytest.raises(DataError, match=named):
    load_examples(tmp_path, split='dev')


SHARDS = ['train', 'train-00000-of-00002', 'train-00000-of-00002-abcdef0123',
          'train_00000_of_00002', 'train_0', 'train.1', 'train-1', 'train0', 'train-00017']
OTHERS = ['train_sft', 'train_prefs', 'training', 'training_backup', 'train-old',
          'train_sft-00000-of-00001', 'train-1-old', 'train_0_bad', 'train-00000-of-', 'mytrain',
          'Train', 'train_of_3', 'train.jsonl']


@pytest.mark.parametrize('stem', SHARDS)
def test_a_file_named_by_its_split_or_as_a_shard_of_it_belongs_to_it(tmp_path, stem):
  write(tmp_path / f'{stem}.jsonl', *asks('a'))
  assert prompts(tmp_path) == ['a'] and splits(tmp_path) == ['train']


@pytest.mark.parametrize('stem', OTHERS)
def test_a_file_whose_name_only_begins_like_the_split_belongs_to_another(tmp_path, stem):
  write(tmp_path / f'{stem}.jsonl', *asks('a'))
  with pytest.raises(DataError, match=r"has no file for split 'train'; it holds"):
    load_examples(tmp_path)
  assert splits(tmp_path) != ['train']


def test_splits_side_by_side_are_read_apart(tmp_path):
  for split in ('train_sft', 'train_prefs', 'training_backup', 'test_sft'):
    write(tmp_path / f'{split}.jsonl', *asks(split))
  assert splits(tmp_path) == ['test_sft', 'train_prefs', 'train_sft', 'training_backup']
  for split in splits(tmp_path):
    assert prompts(tmp_path, split=split) == [split]


def test_shards_come_in_the_order_of_their_numbers(tmp_path):
  for number in (10, 2, 1):
    write(tmp_path / f'train-{number}.jsonl', *asks(f'{number}'))
  assert prompts(tmp_path) == ['1', '2', '10']


@pytest.mark.parametrize('split, named, expected', [
  ('train', None, 'test'), ('train_sft', None, 'test_sft'), ('train_prefs', None, None),
  ('other', None, None), ('test', None, None), ('train[:10%]', None, 'test'),
  ('train', 'validation', 'validation'), ('train_prefs', 'test', 'test')])
def test_the_split_to_hold_out(tmp_path, split, named, expected):
  for name in ('train', 'test', 'train_sft', 'test_sft', 'train_prefs', 'other', 'validation'):
    write(tmp_path / f'{name}-00000-of-00001.jsonl', ROW)
  assert held_out_split(tmp_path, split, named) == expected


def test_a_source_without_named_splits_has_none_to_hold_out(tmp_path):
  path = write(tmp_path / 'train.jsonl', ROW)
  assert splits(path) == [] and held_out_split(path, 'train') is None
  datasets.Dataset.from_list(asks('a')).save_to_disk(tmp_path / 'saved')
  assert splits(tmp_path / 'saved') == [] and held_out_split(tmp_path / 'saved', 'train') is None
  for source in (path, tmp_path / 'saved'):
    with pytest.raises(DataError, match=r"has no splits by name, so 'test' cannot be held out of "
                                        'it. Name a folder'):
      held_out_split(source, 'train', 'test')
  with pytest.raises(DataError, match='nowhere does not exist, seen from'):
    splits('./nowhere')


def test_folder_with_a_split_twice(tmp_path):
  write(tmp_path / 'train.jsonl', ROW)
  (tmp_path / 'train.jsonl.gz').write_bytes(gzip.compress(lines(ROW).encode()))
  with pytest.raises(DataError, match=r"has split 'train' as .jsonl and as .jsonl.gz, so rows may come twice"):
    load_examples(tmp_path)


def test_empty_folder(tmp_path):
  with pytest.raises(DataError, match=r"has no file for split 'train'; it holds nothing"):
    load_examples(tmp_path)


def test_save_to_disk(tmp_path):
  train, test = datasets.Dataset.from_list(asks('a', 'b')), datasets.Dataset.from_list(asks('c'))
  datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / 'both')
  datasets.DatasetDict(train_sft=train, test_sft=test).save_to_disk(tmp_path / 'sft')
  train.save_to_disk(tmp_path / 'one')
  datasets.Dataset.from_list(asks('e'), split='train').save_to_disk(tmp_path / 'named')
  assert prompts(tmp_path / 'both') == prompts(tmp_path / 'one') == ['a', 'b']
  assert (prompts(tmp_path / 'both', split='test') == prompts(tmp_path / 'sft', split='test_sft')
          == ['c'])
  assert (splits(tmp_path / 'both') == ['train', 'test']
          and splits(tmp_path / 'sft') == ['train_sft', 'test_sft'])
  assert held_out_split(tmp_path / 'sft', 'train_sft') == 'test_sft'
  assert prompts(tmp_path / 'one', split='train_sft') == ['a', 'b']  # it has no name of its own
  assert load_examples(tmp_path / 'both', split='test')[0][0].place == f'{tmp_path / "both"} test row 1'
  with pytest.raises(DataError, match=r"both has no split 'dev'. Use one that it has: train, test. "
                                      'Name .* --data.split'):
    load_examples(tmp_path / 'both', split='dev')
  assert prompts(tmp_path / 'named') == ['e'] and splits(tmp_path / 'named') == ['train']
  with pytest.raises(DataError, match=r"named has no split 'test'. Use one that it has: train"):
    load_examples(tmp_path / 'named', split='test')
  (tmp_path / 'one' / 'state.json').write_text('{')
  with pytest.raises(DataError, match='one cannot be read as a folder from save_to_disk: JSONDecodeError'):
    load_examples(tmp_path / 'one')


# ---- the hub and tensorflow-datasets

@pytest.mark.parametrize('path, call', [
  ('nobody/nothing', "load_dataset('nobody/nothing', None, split='train')"),
  ('hub:nobody/nothing:plain', "load_dataset('nobody/nothing', 'plain', split='train')"),
])
def test_hub_out_of_reach(path, call):
  failed = rf'no local path, and datasets\.{re.escape(call)} failed: ConnectionError.*save_to_disk'
  with pytest.raises(DataError, match=failed):
    load_examples(path)


def test_the_splits_of_a_set_that_datasets_loads(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  folder = tmp_path / 'set'
  folder.mkdir()
  for split in ('train_sft', 'test_sft'):
    write(folder / f'{split}.jsonl', *asks(split))
  (folder / 'README.md').write_text(
    '---\nconfigs:\n- config_name: default\n  data_files:\n' + ''.join(
      f'  - split: {split}\n    path: {split}.jsonl\n' for split in ('train_sft', 'test_sft'))
    + '---\n')
  source = f'hub:{folder}'
  assert (splits(source) == ['train_sft', 'test_sft']
          and held_out_split(source, 'train_sft') == 'test_sft')
  assert prompts(source, split='test_sft') == ['test_sft']
  with pytest.raises(DataError, match=r'Unknown split "train".*Name another with --data.split'):
    load_examples(source)
  with pytest.raises(
      DataError, match=r'datasets\.get_dataset_split_names\(.nobody/nothing., None\) failed: '):
    splits('nobody/nothing')


BUILDER = '''
import numpy as np
import tensorflow_datasets as tfds

TEXT = tfds.features.Text()


class Builder(tfds.core.GeneratorBasedBuilder):
  name = 'tiny_ranked'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
      'prompt': tfds.features.Sequence({'role': TEXT, 'content': TEXT}),
      'responses': tfds.features.Sequence(TEXT), 'scores': tfds.features.Sequence(np.float32)}))

  def _split_generators(self, download_manager):
    return {'train': self._generate_examples(6), 'test': self._generate_examples(1)}

  def _generate_examples(self, count):
    for index in range(count):
      turns = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': f'Größe {index}?'}]
      yield index, {'prompt': turns, 'responses': ['a', 'b', 'c'], 'scores': [0.25, 1.5, 0.25]}
'''


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Folder of a set that tensorflow-datasets made, without TensorFlow: its builder must live in a package."""
  folder = tmp_path_factory.mktemp('tfds')
  package = folder / 'tiny_ranked_package'
  package.mkdir()
  (package / '__init__.py').write_text('')
  (package / 'tiny_ranked_builder.py').write_text(BUILDER)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    module = importlib.import_module('tiny_ranked_package.tiny_ranked_builder')
  builder = module.Builder(file_format='array_record', data_dir=folder / 'data')
  builder.download_and_prepare()
  return builder.data_path


def test_tfds_folder(prepared):
  examples, skipped = load_examples(f'tfds:{prepared}')
  asked = [example.prompt[1] for example in examples]
  assert {turn.text for turn in asked} == {f'Größe {index}?' for index in range(6)} and skipped == []
  assert examples[0] == Example((BRIEF, asked[0]), ('a', 'b', 'c'), (1, 0, 1), f'tfds:{prepared} train row 1')
  assert len(load_examples(f'tfds:{prepared}', split='test')[0]) == 1
  assert len(load_examples(f'tfds:{prepared}', split='train[:50%]')[0]) == 3
  assert sorted(splits(f'tfds:{prepared}')) == ['test', 'train']
  assert held_out_split(f'tfds:{prepared}', 'train[:50%]') == 'test'
  assert 'tensorflow' not in sys.modules


def test_tfds_errors(prepared, tmp_path):
  with pytest.raises(DataError, match=r"\(dev\) cannot be read by .*: ValueError: Unknown split.* "
                                      'with --data.split'):
    load_examples(f'tfds:{prepared}', split='dev')
  with pytest.raises(DataError, match=r'tfds:\./nowhere: the folder does not exist, seen from .*dataset_info.json'):
    load_examples('tfds:./nowhere')
  with pytest.raises(DataError, match=r'cannot be read by tensorflow-datasets: DatasetInfoFileError'):
    load_examples(f'tfds:{tmp_path}')
  with pytest.raises(DataError, match=r'tfds:nonsense_set \(train\) cannot be read .*DatasetNotFoundError.*catalogue'):
    load_examples('tfds:nonsense_set')


def test_a_folder_that_tfds_prepared_says_how_to_name_it(prepared):
  with pytest.raises(DataError, match=f'one made by tensorflow-datasets is tfds:{re.escape(str(prepared))}'):
    load_examples(prepared)


# ---- what a stage takes

RANKED_EXAMPLE = Example((HI,), ('a', 'b', 'c'), (1, 0, 0), 'x row 2')
EXAMPLES = [EXAMPLE, RANKED_EXAMPLE, Example((WHY,), place='x row 3')]


def test_views():
  assert as_demonstrations(EXAMPLES) == [EXAMPLE, Example((HI,), ('b',), (0,), 'x row 2')]
  assert as_comparisons(EXAMPLES) == [RANKED_EXAMPLE]
  assert as_prompts(EXAMPLES) == [Example((HI,)), EXAMPLES[2]]                    # the first place of each prompt
  assert as_demonstrations([]) == as_comparisons([]) == as_prompts([]) == []


def test_views_of_nothing():
  with pytest.raises(DataError, match=r'none of the 1 examples has a response; the first is x row 3. Needed is'):
    as_demonstrations(EXAMPLES[2:])
  with pytest.raises(DataError, match='none of the 1 examples has two or more ranked responses'):
    as_comparisons(EXAMPLES[:1])
  for view in (as_comparisons, as_demonstrations):
    with pytest.raises(DataError, match=r'^the held-out part is empty: none of the 1 examples has'):
      view(EXAMPLES[2:], 'the held-out part')


def chat(*texts):
  """A prompt of turns in turn, the last of them the user's."""
  roles = ('user', 'assistant')[::1 if len(texts) % 2 else -1]
  return Example(tuple(Turn(roles[index % 2], text) for index, text in enumerate(texts)), place='x')


def test_an_unanswered_end_is_cut_from_a_demonstration():
  cut = Example((HI,), ('Yo.',), (0,), 'x')
  assert as_demonstrations([chat('Hi?', 'Yo.', 'Why?')]) == [cut]
  system = dataclasses.replace(chat('Hi?', 'Yo.', 'Why?'), prompt=(BRIEF, HI, YO, WHY))
  assert as_demonstrations([system]) == [dataclasses.replace(cut, prompt=(BRIEF, HI))]
  longer = chat('Hi?', 'Yo.', 'Why?', 'So.', 'Oh.')
  assert as_demonstrations([longer]) == [Example((HI, YO, WHY), ('So.',), (0,), 'x')]
  assert as_demonstrations(
    [dataclasses.replace(longer, prompt=(*longer.prompt, HI))])[0].responses == ('So.',)
  assert as_prompts([longer]) == [longer]  # as a prompt it stays whole


def test_what_can_be_no_demonstration_is_left_out():
  answers_nobody = chat('Yo.', 'Hi?')
  assert answers_nobody.prompt == (YO, HI)
  assert as_demonstrations([EXAMPLE, answers_nobody, EXAMPLES[2]]) == [EXAMPLE]
  for turns in ((BRIEF, YO, HI), (HI, YO, YO, WHY)):
    assert as_demonstrations([EXAMPLE, Example(turns)]) == [EXAMPLE]
  begun = Example((YO, HI), ('So.',), (0,))
  assert as_demonstrations([begun]) == [begun]


def test_held_out_keeps_prompts_apart():
  examples = [Example((Turn('user', f'q{index % 400}'),), place=f'row {index}') for index in range(1000)]
  train, kept = held_out(examples, 0.3, seed=5)
  assert {example.prompt for example in train}.isdisjoint(example.prompt for example in kept)
  assert sorted(train + kept, key=examples.index) == examples and train == sorted(train, key=examples.index)
  assert 0.2 < len(as_prompts(kept)) / 400 < 0.4                                  # 5 standard deviations are 0.11
  assert held_out(examples[:100], 0.3, seed=5)[1] == [example for example in kept if example in examples[:100]]
  assert held_out(examples, 0.3, seed=6)[1] != kept
  assert held_out(examples, 0, seed=5) == (examples, [])


def test_a_conversation_and_its_continuation_are_on_the_same_side():
  starts = [chat(f'q{index}') for index in range(200)]
  longer = [chat(f'q{index}', 'a', 'q0') for index in range(200)]
  system = [Example((BRIEF, *example.prompt), ('a',), (0,)) for example in starts]
  blank = [Example((Turn('user', f' q{index}\n'),)) for index in range(200)]
  train, kept = held_out([*starts, *longer, *system, *blank], 0.4, seed=1)
  first = lambda example: next(turn.text for turn in example.prompt if turn.role == 'user').strip()
  said = lambda examples: set(map(first, examples))
  assert said(train).isdisjoint(said(kept)) and len(said(kept)) == len(kept) / 4 > 50


def test_held_out_is_the_same_in_every_process():
  examples = [Example((Turn('user', f'q{index}'),)) for index in range(20)]
  assert [example.prompt[0].text for example in held_out(examples, 0.25, seed=3)[1]] == ['q0', 'q1', 'q4', 'q7', 'q17']


@pytest.mark.parametrize('share', [-0.1, 1, float('nan')])
def test_share_out_of_range(share):
  with pytest.raises(ConfigError, match=f'held-out share is {share}. Needed is a share of the prompts, from 0'):
    held_out([], share, 0)
