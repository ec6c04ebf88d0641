"""TL;DR: its two layouts, what a damaged row is told, the recipe's numbers, and a run in small."""

import json

import pytest

from experiments import tldr
from rlhf_jax import cli, config
from rlhf_jax.data.chat import open_chat
from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.errors import DataError

INFO = {'id': 't3_x', 'subreddit': 'AskDocs', 'title': 'My knee clicks ', 'post': 'It began in May.\nIs that bad?\n'}
QUERY = 'SUBREDDIT: r/AskDocs\n\nTITLE: My knee clicks\n\nPOST: It began in May.\nIs that bad?\n\nTL;DR:'
SUMMARIES = [{'text': ' Knee clicks since May.', 'policy': 'sup2'}, {'text': ' A knee.', 'policy': 'ref'}]
COMPARISON = {'info': INFO | {'site': None, 'article': None}, 'summaries': SUMMARIES, 'choice': 1, 'batch': 'batch3'}
POST = INFO | {'summary': 'My knee clicks; is that bad?'}


def test_a_comparison_puts_the_chosen_summary_first():
  expected = Example((Turn('user', QUERY),), ('A knee.', 'Knee clicks since May.'), (0, 1), 'here')
  assert tldr.to_example(COMPARISON, 'here') == expected
  assert tldr.to_example(COMPARISON | {'choice': 0}).responses == ('Knee clicks since May.', 'A knee.')


def test_a_post_with_a_summary_is_a_demonstration_of_the_same_query():
  assert tldr.to_example(POST) == Example((Turn('user', QUERY),), ('My knee clicks; is that bad?',), (0,))


def test_other_layouts_are_read_as_everywhere():
  assert tldr.to_example({'prompt': QUERY, 'label': 'Clicks.'}) == Example((Turn('user', QUERY),), ('Clicks.',), (0,))


DENSE = QUERY.replace('\n\n', '\n')  # as CarperAI's copy has it
LABELLED = {
  'label': {'prompt': QUERY, 'label': ' A knee.'},
  'completion': {'prompt': QUERY, 'completion': ' A knee.'},
  'space after the prompt': {'prompt': QUERY + ' ', 'completion': 'A knee.\n'},
  'other space in the prompt': {'prompt': DENSE, 'label': 'A knee.'},
  'space around the post': {
    'prompt': QUERY.replace('knee clicks\n', 'knee clicks \n').replace('\n\nTL', '\n\n\nTL'),
    'label': ' A knee.'},
  'without TL;DR': {'prompt': QUERY.removesuffix('\n\nTL;DR:'), 'label': 'A knee.'},
  'messages': {'messages': [{'role': 'user', 'content': QUERY},
                            {'role': 'assistant', 'content': ' A knee.'}]},
  'a post': POST | {'summary': ' A knee.'},
}


@pytest.mark.parametrize('row', LABELLED.values(), ids=LABELLED)
def test_a_post_with_a_summary_is_the_same_whatever_its_layout(row):
  assert tldr.to_example(row) == Example((Turn('user', QUERY),), ('A knee.',), (0,))


@pytest.mark.parametrize('prompt', [QUERY, QUERY + ' ', DENSE])
def test_a_comparison_is_the_same_whatever_its_layout(prompt):
  row = {'prompt': prompt, 'chosen': ' A knee.', 'rejected': ' Knee clicks since May.'}
  assert tldr.to_example(row) == tldr.to_example(COMPARISON)
  with pytest.raises(DataError, match='row 3: all 2 responses are equal, but for the space around '
                                      'them; needed are'):
    tldr.to_example({'prompt': prompt, 'chosen': ' A knee.', 'rejected': 'A knee.'}, 'row 3')


def test_a_prompt_that_is_no_post_keeps_its_text():
  row = {'prompt': '  Sum up:\n\nTITLE: x ', 'label': ' A knee.'}
  assert tldr.to_example(row) == Example(
    (Turn('user', '  Sum up:\n\nTITLE: x'),), ('A knee.',), (0,))


@pytest.mark.parametrize('row, match', [
  (COMPARISON | {'choice': 2}, r'row 3: 2 summaries with choice 2; needed are info'),
  (COMPARISON | {'summaries': SUMMARIES[:1]}, r'row 3: 1 summaries with choice 1; needed are info'),
  (COMPARISON | {'info': INFO | {'post': None}}, r"row 3: the row is no post .*'NoneType'.*needed are info"),
  (COMPARISON | {'summaries': [SUMMARIES[0]] * 2}, r"row 3: 'chosen' equals 'rejected'"),
  ({'info': INFO, 'summaries': SUMMARIES}, r"row 3: the row is no post .*KeyError: 'choice'"),
  ({name: POST[name] for name in ('post', 'title', 'summary')}, r"row 3: .*KeyError: 'subreddit'"),
  (POST | {'summary': ' '}, r"row 3: 'response' is empty"),
  (['text'], r'row 3: the row is '),
])
def test_a_damaged_row_says_what_is_needed(row, match):
  with pytest.raises(DataError, match=match):
    tldr.to_example(row, 'row 3')


def write(folder, **splits):
  folder.mkdir()
  for split, rows in splits.items():
    (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return folder


def test_rows_that_are_no_posts_are_skipped_and_counted(tmp_path, capsys):
  news = COMPARISON | {'info': {'article': 'A long one.', 'post': None, 'title': None, 'subreddit': None}}
  folder = write(tmp_path / 'pairs', train=[news, COMPARISON, COMPARISON, COMPARISON])
  assert len(tldr.load_examples(folder, 'train', skip_bad_rows=True, limit=2)) == 2
  assert 'train: 2 examples, 1 bad rows skipped, the first: ' in capsys.readouterr().out
  with pytest.raises(DataError, match=r'train\.jsonl row 1: the row is no post'):
    tldr.load_examples(folder, 'train')


def test_a_source_without_a_good_row_is_an_error(tmp_path):
  folder = write(tmp_path / 'posts', train=[{'post': 'Alone.'}])
  with pytest.raises(DataError, match=r'posts \(train\): each of its 1 rows is bad'):
    tldr.load_examples(folder, 'train', skip_bad_rows=True)


def test_the_recipe_is_that_of_the_paper():
  ppo = tldr.EXPERIMENT.ppo
  assert ppo.iterations * ppo.batch_size == pytest.approx(1e6, rel=1e-3)
  assert (ppo.temperature, ppo.kl_weight, ppo.kl_target_nats_per_sequence, ppo.epochs) == (0.7, 0.05, None, 4)
  assert (ppo.loss.clip, ppo.loss.value_clip, ppo.loss.value_weight) == (0.2, 0.2, 0.1)
  assert (ppo.experience.discount, ppo.experience.trace, ppo.experience.score_slot) == (1.0, 0.95, 'after_end')
  for stage in (tldr.EXPERIMENT.sft, tldr.EXPERIMENT.reward, ppo):
    assert (stage.optimizer.learning_rate, stage.optimizer.epsilon, stage.optimizer.clip_norm) == (3e-6, 1e-5, None)


def test_all_stages_run_on_rows_of_both_layouts(tmp_path):
  posts = [POST | {'title': f'My knee clicks, {n}'} for n in range(12)]
  pairs = [COMPARISON | {'info': INFO | {'title': f'Knee {n}'}, 'choice': n % 2} for n in range(12)]
  small = config.override(tldr.EXPERIMENT, {
    'preset': 'nano', 'pretrained': None, 'dtype': 'float32', 'tensorboard': False,
    'sft_data': write(tmp_path / 'posts', train=posts[:9], validation=posts[9:]),
    'comparison_data': write(tmp_path / 'pairs', train=pairs[:9], validation=pairs[9:]),
    'data.limits.prompt_tokens': 40, 'data.limits.response_tokens': 8, 'held_out_examples': 2,
    'sft.steps': 2, 'sft.batch_size': 8, 'reward.steps': 2, 'reward.batch_size': 8, 'ppo.iterations': 2,
    'ppo.batch_size': 8, 'ppo.microbatches': 2})
  results = cli.run_stages(small, tldr.make_task, tmp_path / 'run', cli.Command(export=False))
  tokenizer = load_tokenizer(tmp_path / 'run' / 'tokenizer')
  tokenizer.chat_template = tldr.make_task(small).chat_template
  (conversation,) = open_chat(tokenizer).conversations(
    [[Turn('user', QUERY), Turn('assistant', 'A knee.')]])
  assert tokenizer.decode(conversation.ids) == f'{QUERY} A knee.<|end|>'
  assert results['reward']['pairs'] == 2 and set(results['table']) == {'SFT', 'PPO'}
