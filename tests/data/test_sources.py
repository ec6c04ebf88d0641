"""Sources: each kind of file, folder and set, which splits they have, what a stage takes, and what each error says."""

import gzip
import importlib
import json
import re
import sys

import datasets
import pytest

from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.data.sources import as_comparisons, as_demonstrations, as_prompts, held_out, load_examples
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


# ---- folders

def test_folder_of_files(tmp_path):
  write(tmp_path / 'train-2.jsonl', *asks('b'))
  write(tmp_path / 'train-1.jsonl', *asks('a'))
  (tmp_path / 'test.jsonl.gz').write_bytes(gzip.compress(lines(*asks('c')).encode()))
  datasets.Dataset.from_list(asks('d')).to_parquet(tmp_path / 'validation-00000-of-00001.parquet')
  assert prompts(tmp_path) == ['a', 'b']
  assert prompts(tmp_path, split='test') == ['c']
  assert prompts(tmp_path, split='validation') == ['d']
  with pytest.raises(DataError, match=r"has no file for split 'dev'; it holds test.jsonl.gz, train-1.*save_to_disk"):
    load_examples(tmp_path, split='dev')


def test_folder_with_a_split_twice(tmp_path):
  write(tmp_path / 'train.jsonl', ROW)
  (tmp_path / 'train.jsonl.gz').write_bytes(gzip.compress(lines(ROW).encode()))
  with pytest.raises(DataError, match=r"has split 'train' as .jsonl and as .jsonl.gz, so rows may come twice"):
    load_examples(tmp_path)


def test_empty_folder(tmp_path):
  with pytest.raises(DataError, match="has no file for split 'train'; it holds nothing"):
    load_examples(tmp_path)


def test_save_to_disk(tmp_path):
  train, test = datasets.Dataset.from_list(asks('a', 'b')), datasets.Dataset.from_list(asks('c'))
  datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / 'both')
  train.save_to_disk(tmp_path / 'one')
  assert prompts(tmp_path / 'both') == prompts(tmp_path / 'one') == ['a', 'b']
  assert prompts(tmp_path / 'both', split='test') == ['c']
  assert load_examples(tmp_path / 'both', split='test')[0][0].place == f'{tmp_path / "both"} test row 1'
  with pytest.raises(DataError, match=r"both has no split 'dev'. Use one that it has: train, test"):
    load_examples(tmp_path / 'both', split='dev')
  with pytest.raises(DataError, match=r"one has no split 'test'. Use one that it has: train"):
    load_examples(tmp_path / 'one', split='test')
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
  assert 'tensorflow' not in sys.modules


def test_tfds_errors(prepared, tmp_path):
  with pytest.raises(DataError, match=r"\(dev\) cannot be read by tensorflow-datasets: ValueError: Unknown split"):
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


def test_held_out_keeps_prompts_apart():
  examples = [Example((Turn('user', f'q{index % 400}'),), place=f'row {index}') for index in range(1000)]
  train, kept = held_out(examples, 0.3, seed=5)
  assert {example.prompt for example in train}.isdisjoint(example.prompt for example in kept)
  assert sorted(train + kept, key=examples.index) == examples and train == sorted(train, key=examples.index)
  assert 0.2 < len(as_prompts(kept)) / 400 < 0.4                                  # 5 standard deviations are 0.11
  assert held_out(examples[:100], 0.3, seed=5)[1] == [example for example in kept if example in examples[:100]]
  assert held_out(examples, 0.3, seed=6)[1] != kept
  assert held_out(examples, 0, seed=5) == (examples, [])


def test_held_out_is_the_same_in_every_process():
  examples = [Example((Turn('user', f'q{index}'),)) for index in range(20)]
  assert [example.prompt[0].text for example in held_out(examples, 0.25, seed=3)[1]] == ['q0', 'q1', 'q4', 'q7', 'q17']


@pytest.mark.parametrize('share', [-0.1, 1, float('nan')])
def test_share_out_of_range(share):
  with pytest.raises(ConfigError, match=f'held-out share is {share}. Needed is a share of the prompts, from 0'):
    held_out([], share, 0)
