"""Rows that are kept on disk are those that were encoded, and a damaged file is none."""

import dataclasses
import datetime
import itertools

import numpy as np
import pytest

from rlhf_jax.data import encode
from rlhf_jax.data.chat import open_chat
from rlhf_jax.data.encode import Counts, Encoded, Limits
from rlhf_jax.data.examples import Answer, Example, Turn
from rlhf_jax.data.kept_rows import read_rows, rows_key, write_rows
from rlhf_jax.data.text import TURN_TEMPLATE, train_tokenizer


@pytest.fixture(scope='module')
def chat():
  return open_chat(train_tokenizer(['the cat sat on the mat'] * 3, 270))


EXAMPLES = [
  Example((Turn('user', 'the cat?'),), ('sat 雨', 'on', 'the mat'), (0, 1, 1)),
  Example(
    (Turn('user', 'a'), Turn('assistant', 'b'), Turn('user', 'c')),
    ('d', Answer('e', (5, 6, 1))),
    (1, 0),
  ),
  Example((Turn('user', 'much too long ' * 9),), ('d', 'e'), (1, 0)),
]


def plain(encoded):
  """The same with lists of Python numbers."""
  if hasattr(encoded.rows[0], 'ids'):
    return [_plain_row(row) for row in encoded.rows], encoded.counts
  ranked = [
    ([_plain_row(row) for row in each.rows], [int(rank) for rank in each.ranks], each.example)
    for each in encoded.rows
  ]
  return ranked, encoded.counts


def _plain_row(row):
  return [int(i) for i in row.ids], [bool(m) for m in row.mask], row.example


@pytest.mark.parametrize('read', [encode.demonstrations, encode.comparisons, encode.prompts])
def test_what_is_read_is_what_was_written(chat, read, tmp_path):
  encoded = read(EXAMPLES, chat, Limits(30, 30))
  path = tmp_path / 'not' / 'there' / 'rows.npz'
  write_rows(path, encoded)
  kept = read_rows(path)
  assert isinstance(kept, Encoded)
  assert plain(kept) == plain(encoded)
  assert kept.counts == Counts(3, too_long=1)
  assert [file.name for file in path.parent.iterdir()] == ['rows.npz']


def test_all_counts_and_large_ids(tmp_path):
  counts = Counts(9, 1, 2, 3, 4, 5, 6, 'a.jsonl row 7: "雨" is\nwrong')
  rows = [encode.Row([70_000, 0], [True, False], 8), encode.Row([5], [True], 3)]
  write_rows(tmp_path / 'rows.npz', Encoded(rows, counts))
  assert plain(read_rows(tmp_path / 'rows.npz')) == plain(Encoded(rows, counts))


def test_rows_share_their_memory(chat, tmp_path):
  write_rows(tmp_path / 'rows.npz', encode.demonstrations(EXAMPLES, chat, Limits(200, 30)))
  first, *others = read_rows(tmp_path / 'rows.npz').rows
  assert isinstance(first.ids, np.ndarray)
  assert all(row.ids.base is first.ids.base for row in others)


class TestKey:
  def test_equal_settings_have_equal_keys(self, chat):
    again = open_chat(train_tokenizer(['the cat sat on the mat'] * 3, 270))
    moved = [dataclasses.replace(each, place='elsewhere') for each in EXAMPLES]
    assert rows_key(encode.prompts, EXAMPLES, chat, Limits(), False) == rows_key(
      encode.prompts, moved, again, Limits(), False
    )

  def test_it_changes_with_each_thing_that_rows_depend_on(self, chat):
    usual = {
      'read': encode.comparisons, 'examples': EXAMPLES, 'chat': chat, 'limits': Limits(),
      'skip_bad_rows': False
    }
    tokenizer = train_tokenizer(['the cat sat on the mat'] * 3, 270)
    tokenizer.chat_template = TURN_TEMPLATE.replace("m['content']", "m['content'] | trim")
    sampled = dataclasses.replace(EXAMPLES[1], responses=('d', Answer('e', (5, 7, 1))))
    others = [
      {'read': encode.demonstrations},
      {'read': encode.prompts},
      {'examples': EXAMPLES[:2]},
      {'examples': EXAMPLES[::-1]},
      {'examples': [EXAMPLES[0], sampled, EXAMPLES[2]]},
      {'examples': [dataclasses.replace(EXAMPLES[0], ranks=(0, 1, 2)), *EXAMPLES[1:]]},
      {'chat': open_chat(tokenizer)},
      {'chat': open_chat(train_tokenizer(['the cat'], 265))},
      {'chat': open_chat(chat.tokenizer, generation_ends=[0])},
      {'limits': Limits(127)},
      {'limits': Limits(response_tokens=127)},
      {'limits': Limits(too_long='truncate')},
      {'skip_bad_rows': True},
    ]
    keys = [rows_key(**usual | other) for other in ({}, *others)]
    for (i, one), (j, other) in itertools.combinations(enumerate(keys), 2):
      assert one != other, (i, j)

  def test_with_the_day_where_the_template_writes_it(self):
    tokenizer = train_tokenizer(['the cat'], 265)
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + TURN_TEMPLATE
    first, second, later = (
      open_chat(tokenizer, began=datetime.datetime(2024, 7, day, hour))
      for day, hour in ((1, 2), (1, 3), (2, 2))
    )
    key = lambda chat: rows_key(encode.prompts, EXAMPLES, chat, Limits(), False)
    assert key(first) == key(second) != key(later)


class TestDamagedFiles:
  @pytest.fixture
  def written(self, chat, tmp_path):
    path = tmp_path / 'whole.npz'
    write_rows(path, encode.comparisons(EXAMPLES, chat, Limits(30, 30)))
    return path.read_bytes()

  def test_none_is_there(self, tmp_path):
    assert read_rows(tmp_path / 'rows.npz') is None

  def test_cut_anywhere(self, written, tmp_path):
    path = tmp_path / 'rows.npz'
    for length in range(0, len(written), 11):
      path.write_bytes(written[:length])
      assert read_rows(path) is None, length

  def test_a_byte_changed_anywhere(self, written, tmp_path):
    """Nothing is raised. What is read is right: some bytes of a zip file hold its date only."""
    path = tmp_path / 'rows.npz'
    path.write_bytes(written)
    right = plain(read_rows(path))
    for place in range(0, len(written), 5):
      path.write_bytes(written[:place] + bytes([written[place] ^ 0x55]) + written[place + 1 :])
      kept = read_rows(path)
      assert kept is None or plain(kept) == right, place

  def test_a_header_with_another_length(self, tmp_path):
    """A zip file compares its checksum at the end of a member only, which is then not read."""
    path, rows = tmp_path / 'rows.npz', [encode.Row([5] * 20_000, [True] * 20_000, 0)]
    write_rows(path, Encoded(rows, Counts(1)))
    written = path.read_bytes()
    assert written.count(b"'shape': (20000,)") == 2  # of the ids and of the mask
    path.write_bytes(written.replace(b"'shape': (20000,)", b"'shape': (10000,)"))
    assert read_rows(path) is None

  def test_something_else(self, tmp_path):
    path = tmp_path / 'rows.npz'
    for content in (b'hello', b''):
      path.write_bytes(content)
      assert read_rows(path) is None
    with path.open('wb') as file:
      np.savez(file, ids=np.array([1]), counts='{"examples": 1, "of_another_version": 2}')
    assert read_rows(path) is None
