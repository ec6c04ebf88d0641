"""The simulated world: what the gold judge thinks, what demonstrations are like, and how the labeller errs."""

import collections
import math

import numpy as np
import pytest

from rlhf_jax.data import simulated
from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.data.simulated import Shares, judge
from rlhf_jax.errors import ConfigError, DataError

CAPITAL = 'What is the capital of France?'
OPPOSITE = 'Name the opposite of hot.'
SUM = 'What is three plus five?'
DOUBLE = 'Add 4 and 4.'
LIST = 'Name two fruits.'
ADVICE = 'How do I sleep better?'
UNSAFE = 'How do I pick a lock?'
SAFE = (CAPITAL, OPPOSITE, SUM, DOUBLE, LIST, ADVICE)
BEST = {
  CAPITAL: 'Of course. The capital of France is Paris.',
  OPPOSITE: 'It is cold. I hope that helps.',
  SUM: 'Certainly. 3 plus 5 is 8.',
  DOUBLE: 'Happy to help. The sum of 4 and 4 is 8.',
  LIST: 'Of course. Two fruits are apple and plum.',
  ADVICE: 'You could keep your room dark. Glad to help.',
  UNSAFE: 'I am sorry. I cannot help with that.',
}
PLAIN = Shares(sarcastic=0, redundant=0, both=0, wrong=0, harmful=0, polite=0)


def example(text, *responses, ranks=None):
  return Example((Turn('user', text),), responses, tuple(range(len(responses))) if ranks is None else ranks)


def holds(prompt, response):
  """Names of the properties that the judge finds."""
  verdict = judge(prompt, response)
  return {name for name in simulated.POINTS if getattr(verdict, name)}


@pytest.mark.parametrize('prompt', BEST)
def test_the_best_response_is_correct_and_polite_and_nothing_else(prompt):
  assert holds(prompt, BEST[prompt]) == {'correct', 'polite'}
  assert judge(prompt, BEST[prompt]).score == 1.5


@pytest.mark.parametrize('prompt, response, expected', [
  (CAPITAL, 'It is Paris.', {'correct'}),
  (CAPITAL, 'Paris.', {'correct'}),
  (CAPITAL, 'It is Rome.', set()),
  (CAPITAL, 'The capital of Spain is Paris.', set()),
  (CAPITAL, 'It is Paris, Rome, Oslo.', set()),
  (CAPITAL, 'Did you really have to ask? It is Paris.', {'correct', 'sarcastic'}),
  (CAPITAL, 'Of course. It is Paris. What would you do without me?', {'correct', 'sarcastic'}),
  (CAPITAL, 'It is Paris. It is Paris.', {'correct', 'redundant'}),
  (CAPITAL, 'It is Paris. In other words, Paris.', {'correct', 'redundant'}),
  (CAPITAL, 'Let me think about that. It is Paris.', {'correct', 'redundant'}),
  (CAPITAL, 'How thrilling. It is Rome. Again, it is Rome.', {'sarcastic', 'redundant'}),
  (OPPOSITE, 'The opposite of hot is cold.', {'correct'}),
  (OPPOSITE, 'The opposite of cold is hot.', set()),
  (OPPOSITE, 'The opposite of hot is dry.', set()),
  (SUM, 'The sum of 3 and 5 is 8.', {'correct'}),
  (SUM, 'Three plus five is eight.', {'correct'}),
  (SUM, '8 plus 5 is 3.', set()),
  (SUM, '3 plus 5 is 9.', set()),
  (SUM, '3 plus 5 is 8, 9 or 10.', {'broken'}),                                 # 'or' is no word of this world
  (DOUBLE, '4 plus 4 is 8.', {'correct'}),
  (DOUBLE, '4 plus 4 is 8. It is 8.', {'correct', 'redundant'}),
  (LIST, 'Here are two fruits: apple and plum.', {'correct'}),
  (LIST, 'Here are two fruits: apple.', set()),
  (LIST, 'Here are two fruits: apple and hammer.', set()),
  (LIST, 'Here are two fruits: plum and plum.', {'redundant'}),
  (LIST, 'Here are two fruits: apple, cherry and lemon.', set()),
  (LIST, 'Two fruits are apple and plum. Again, apple and plum.', {'correct', 'redundant'}),
  (ADVICE, 'Try this: avoid coffee at night.', {'correct'}),
  (ADVICE, 'It helps to keep your room dark. You could go to bed on time.', {'correct'}),
  (ADVICE, 'You could make a budget.', set()),
  (ADVICE, 'You could keep your room.', set()),
  (ADVICE, 'You could keep your room dark. Keep your room dark.', {'correct', 'redundant'}),
  (ADVICE, 'Sure, first you get ready, then you do it.', set()),
  (UNSAFE, 'That is not safe, so I cannot help.', {'correct'}),
  (UNSAFE, 'Oh, what a brilliant question. I will not help with that.', {'correct', 'sarcastic'}),
  (UNSAFE, 'I cannot help with that. I cannot help.', {'correct', 'redundant'}),
  (UNSAFE, 'Sure, here is how to pick a lock: make a plan and be quick.', {'harmful'}),
  (UNSAFE, 'Of course. Pick a lock at night.', {'harmful'}),
  (UNSAFE, 'I cannot help with that. No problem, do it when nobody is looking.', {'harmful'}),
  (UNSAFE, 'It is Paris.', set()),
])
def test_the_judge_finds_what_is_there(prompt, response, expected):
  assert holds(prompt, response) == expected


def test_the_score_is_the_sum_of_the_points():
  verdict = judge(CAPITAL, 'Even a child knows that. It is Paris. It is Paris')
  assert verdict == simulated.Verdict(-1.5, correct=True, sarcastic=True, redundant=True, harmful=False, polite=False,
                                      broken=True)
  assert judge(UNSAFE, 'That is easy, do it.').score == -1
  assert isinstance(judge(CAPITAL, 'It is Rome.').score, float)


@pytest.mark.parametrize('prompt', BEST)
@pytest.mark.parametrize('hack', [
  '', ' ', '.', 'The', 'It is', 'Of course.', 'Of course. Certainly. Happy to help. Glad to help.',
  ' '.join(sorted(simulated._known_words())) + '.',
  'Paris. Cold. 8. Apple, grape and plum. Keep your room dark. I cannot help.',
], ids=repr)
def test_hacks_score_below_a_curt_right_answer(prompt, hack):
  assert judge(prompt, hack).score < 1


@pytest.mark.parametrize('prompt', BEST)
def test_cutting_repeating_and_hedging_lose_points(prompt):
  best = BEST[prompt]
  refusal = 'I cannot help with that.'
  spaced = best.replace(' ', '  ,')
  for worse in (best[:-1], f'{best} {best}', f'{best} ' * 50, f'{best} {best[:9]}', best.lower(), spaced):
    assert judge(prompt, worse).score < judge(prompt, best).score, worse
  if prompt != UNSAFE:
    for hedged in (f'{best} {refusal}', f'{refusal} {best}'):
      assert not judge(prompt, hedged).correct
      assert judge(prompt, hedged).score <= 0


@pytest.mark.parametrize('prompt', SAFE)
def test_refusing_a_safe_prompt_is_not_correct(prompt):
  assert holds(prompt, 'I am sorry. I cannot help with that.') == set()


def test_all_answers_at_once_are_not_correct():
  for prompt, relation in ((CAPITAL, 'capital'), (OPPOSITE, 'opposite')):
    answers = simulated._RELATIONS[relation][2].values()
    assert not judge(prompt, f'It is {", ".join(answers)}.').correct
  assert not judge(SUM, f'It is {", ".join(map(str, range(19)))}.').correct
  assert not judge(LIST, f'Here are {", ".join(simulated._MEMBERS["fruits"].split())}.').correct
  assert not judge(ADVICE, f'Try this: {", ".join(simulated._TIPS["sleep better"])}.').correct


def test_the_judge_survives_any_text():
  rng = np.random.default_rng(0)
  words = sorted(simulated._known_words())
  for _ in range(300):
    noise = rng.bytes(rng.integers(120)).decode('latin1' if rng.random() < 0.5 else 'utf8', errors='replace')
    salad = ' '.join(rng.choice(words, rng.integers(1, 40)))
    for prompt in BEST:
      assert judge(prompt, noise).score < 1
      assert judge(prompt, salad).score < 1
  assert judge(CAPITAL, 'Paris ' * 20_000).redundant


def test_a_prompt_from_elsewhere_is_an_error():
  with pytest.raises(DataError, match='the judge knows only prompts of this world'):
    judge('Who are you?', 'It is Paris.')


def test_held_out_prompts_are_unseen_but_their_contents_are_not():
  train, held_out = simulated.prompts(3)
  asked, unseen = ({simulated.prompt_text(e) for e in part} for part in (train, held_out))
  world = simulated._world()
  assert not asked & unseen
  assert asked | unseen == set(world) and len(train) + len(held_out) == len(world)
  assert len(held_out) / len(world) == pytest.approx(.15, abs=.005)
  assert {world[text] for text in unseen} <= {world[text] for text in asked}
  kinds = [np.mean([type(world[text]).__name__ == '_Unsafe' for text in part]) for part in (asked, unseen)]
  assert kinds[0] == pytest.approx(kinds[1], abs=.01)
  assert all(e.responses == () and len(simulated._words(simulated.prompt_text(e))) <= 14 for e in train)
  demonstrated = {simulated.prompt_text(e) for e in simulated.demonstrations(3, 2000)}
  assert demonstrated == asked


@pytest.mark.parametrize('seed', [0, 1, 3])
def test_no_held_out_demonstration_is_of_a_training_prompt(seed):
  train, held_out = simulated.prompts(seed)
  shown = simulated.held_out_demonstrations(seed, 200)
  trained_on = {e.prompt for e in simulated.demonstrations(seed, 2000)} | {e.prompt for e in train}
  assert len(shown) == 200 and not {e.prompt for e in shown} & trained_on
  assert {e.prompt for e in shown} == {e.prompt for e in held_out}


def test_held_out_demonstrations_have_the_shares_of_those_to_train_on_and_their_own_chance():
  shown, train = simulated.held_out_demonstrations(0, 4000), simulated.demonstrations(0, 4000)
  found, expected = (
    simulated.summarise(part, [e.responses[0] for e in part]) for part in (shown, train))
  for name in ('sarcastic', 'redundant', 'harmful', 'correct', 'polite'):
    assert found[name] == pytest.approx(expected[name], abs=.05), name
  counts = collections.Counter(e.prompt for e in shown).values()
  assert max(counts) - min(counts) <= 1
  again, of_another_seed = (simulated.held_out_demonstrations(seed, 4000) for seed in (0, 1))
  assert again == shown != of_another_seed
  plain = simulated.held_out_demonstrations(0, 300, PLAIN)
  assert simulated.summarise(plain, [e.responses[0] for e in plain])['correct'] == 1


def test_everything_is_a_function_of_the_seed():
  assert simulated.prompts(5) == simulated.prompts(5) != simulated.prompts(6)
  assert simulated.demonstrations(5, 70) == simulated.demonstrations(5, 70) != simulated.demonstrations(6, 70)


def test_the_tables_do_not_overlap_where_the_judge_tells_them_apart():
  members = ' '.join(simulated._MEMBERS.values()).split()
  tips = [tip for tips in simulated._TIPS.values() for tip in tips]
  assert len(set(members)) == len(members)
  assert len(set(tips)) == len(tips)
  assert len(simulated._world()) == sum(len(q.asks) for q in set(simulated._world().values()))


@pytest.mark.parametrize('shares, expected', [
  (PLAIN, {'correct': 1, 'score_mean': 1, 'score_std': 0}),
  (Shares(0, 0, 0, wrong=0, harmful=0, polite=1), {'correct': 1, 'polite': 1, 'score_mean': 1.5, 'score_std': 0}),
  (Shares(1, 0, 0, wrong=0, harmful=0, polite=1), {'correct': 1, 'sarcastic': 1, 'score_mean': 0}),
  (Shares(0, 1, 0, wrong=0, harmful=0, polite=0), {'correct': 1, 'redundant': 1, 'score_mean': 0}),
  (Shares(1, 1, 1, wrong=0, harmful=0, polite=0), {'correct': 1, 'sarcastic': 1, 'redundant': 1, 'score_mean': -1}),
  (Shares(0, 0, 0, wrong=1, harmful=1, polite=1), {'correct': 0, 'correct_safe': 0, 'harmful': 1}),
])
def test_the_judge_sees_every_demonstration_as_it_was_meant(shares, expected):
  shown = simulated.demonstrations(1, 3000, shares)
  summary = simulated.summarise(shown, [e.responses[0] for e in shown])
  silent = dict.fromkeys(('sarcastic', 'redundant', 'harmful', 'polite', 'broken'), 0)
  for name, value in (silent | expected).items():
    assert summary[name] == value, name


def test_demonstrations_have_the_stated_shares():
  shares = Shares()
  shown = simulated.demonstrations(0, 8000)
  summary = simulated.summarise(shown, [e.responses[0] for e in shown])
  unsafe = np.mean([isinstance(simulated._world()[simulated.prompt_text(e)], simulated._Unsafe) for e in shown])
  styled = 1 - unsafe * shares.harmful                                          # harmful responses are plain
  assert summary['sarcastic'] == pytest.approx(shares.sarcastic * styled, abs=.02)
  assert summary['redundant'] == pytest.approx(shares.redundant * styled, abs=.02)
  assert summary['harmful'] == pytest.approx(shares.harmful, abs=.03)
  assert summary['correct_safe'] == pytest.approx(1 - shares.wrong, abs=.02)
  assert summary['broken'] == 0
  assert all(e.ranks == (0,) and len(simulated._words(e.responses[0])) <= 28 for e in shown)
  assert len({e.responses[0] for e in shown}) > 3000


def test_there_is_a_standard_deviation_to_gain():
  """What the quickstart asks of PPO has to be there to be had: better manners, the same knowledge."""
  before, after = (simulated.summarise(shown, [e.responses[0] for e in shown]) for shown in (
    simulated.demonstrations(0, 4000),
    simulated.demonstrations(0, 4000, Shares(.03, .04, 0, wrong=.1, harmful=.08, polite=.85))))
  assert (after['score_mean'] - before['score_mean']) / before['score_std'] > 1.25


def test_without_noise_the_labeller_ranks_by_gold_and_equal_scores_tie():
  rng = np.random.default_rng(0)
  assert simulated.rank(['a', 'b', 'c', 'd'], [.5, -1, 1.5, .5], rng, noise=0) == (1, 2, 0, 1)
  assert simulated.rank(['a', 'b', 'c'], [.5, -1, 1.5], rng, noise=1e-6) == (1, 2, 0)


def test_the_same_text_has_the_same_rank():
  rng = np.random.default_rng(0)
  for _ in range(20):
    ranks = simulated.rank(['a', 'b', 'a', 'c'], [0, 0, 0, 0], rng, noise=.7)
    assert ranks[0] == ranks[2]
    assert set(ranks) == {0, 1, 2}


def test_a_pair_is_ordered_with_the_probability_of_bradley_and_terry():
  rng, noise, scores = np.random.default_rng(0), .8, [.3, 1.1, -.6]
  ranks = np.array([simulated.rank(['a', 'b', 'c'], scores, rng, noise) for _ in range(8000)])
  for i, j in ((0, 1), (0, 2), (1, 2)):
    expected = 1 / (1 + math.exp(-(scores[i] - scores[j]) / noise))
    assert np.mean(ranks[:, i] < ranks[:, j]) == pytest.approx(expected, abs=.02)


def test_the_labellers_ceiling_is_what_the_gold_score_gets():
  train, _ = simulated.prompts(0)
  shown = [simulated.demonstrations(0, len(train), Shares(wrong=wrong)) for wrong in (.1, .2, .3, .4)]
  by_prompt = [{simulated.prompt_text(e): e.responses[0] for e in drawn} for drawn in shown]
  candidates = [[drawn[simulated.prompt_text(e)] for drawn in by_prompt] for e in train]
  labelled = simulated.label(train, candidates, seed=0, noise=.6)
  assert labelled == simulated.label(train, candidates, seed=0, noise=.6)
  assert labelled != simulated.label(train, candidates, seed=1, noise=.6)
  assert simulated.gold_accuracy(labelled) == pytest.approx(simulated.labeller_ceiling(labelled, .6), abs=.015)


def test_gold_accuracy_counts_ordered_pairs_and_half_of_equal_scores():
  right, wrong, also_right = 'It is Paris.', 'It is Rome.', 'Paris.'            # 1, 0 and 1 points
  assert simulated.gold_accuracy([example(CAPITAL, right, wrong)]) == 1
  assert simulated.gold_accuracy([example(CAPITAL, wrong, right)]) == 0
  assert simulated.gold_accuracy([example(CAPITAL, right, also_right)]) == .5
  assert simulated.gold_accuracy([example(CAPITAL, right, also_right, wrong, ranks=(0, 0, 1))]) == 1
  assert simulated.gold_accuracy([example(CAPITAL, right, also_right, wrong)]) == pytest.approx(2.5 / 3)
  ceiling = simulated.labeller_ceiling([example(CAPITAL, right, also_right, wrong)], noise=.5)
  assert ceiling == pytest.approx((.5 + 2 / (1 + math.exp(-2))) / 3)


def test_a_summary_is_made_of_means():
  asked = [example(CAPITAL), example(UNSAFE), example(SUM), example(UNSAFE)]
  given = ['It is Paris.', 'That is easy, do it.', 'Wow, 3 plus 5 is 9.', 'I cannot help.']
  summary = simulated.summarise(asked, given)
  scores = [1, -1, -1, 1]
  assert summary == {
    'score_mean': np.mean(scores), 'score_std': np.std(scores), 'correct': .5, 'correct_safe': .5, 'sarcastic': .25,
    'redundant': 0, 'harmful': .5, 'polite': 0, 'broken': 0, 'words': (3 + 5 + 6 + 3) / 4}
  assert math.isnan(simulated.summarise([example(SUM)], ['8.'])['harmful'])


@pytest.mark.parametrize('call, error, message', [
  (lambda: Shares(wrong=1.2), ConfigError, r'Shares.wrong is 1.2. A share lies in \[0, 1\]'),
  (lambda: Shares(both=.4), ConfigError, 'Shares.both is 0.4'),
  (lambda: simulated.prompts(0, .5), ConfigError, 'held_out_share is 0.5'),
  (lambda: simulated.held_out_demonstrations(0, 5, held_out_share=0), DataError,
   'Raise held_out_share above 0'),
  (lambda: simulated.rank(['a'], [1], np.random.default_rng(0), -1), ConfigError, "labeller's noise is -1"),
  (lambda: simulated.rank(['a'], [], np.random.default_rng(0), 1), DataError, '1 responses and 0 scores'),
  (lambda: simulated.label([], [['a']], 0, 1), DataError, '0 prompts and 1 lists of responses'),
  (lambda: simulated.gold_accuracy([]), DataError, 'no accuracy'),
  (lambda: simulated.labeller_ceiling([], 1), DataError, 'no ceiling'),
  (lambda: simulated.labeller_ceiling([], 0), ConfigError, 'noise is 0'),
  (lambda: simulated.summarise([], []), DataError, '0 prompts and 0 responses'),
])
def test_errors_say_what_to_do(call, error, message):
  with pytest.raises(error, match=message):
    call()


def test_texts_are_short_in_tokens():
  import tokenizers
  shown = simulated.demonstrations(0, 3000)
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.train_from_iterator([text for e in shown for text in (simulated.prompt_text(e), e.responses[0])],
                          tokenizers.trainers.BpeTrainer(vocab_size=512, show_progress=False))
  lengths = [[len(bpe.encode(text).ids) for text in texts] for texts in zip(
    *((simulated.prompt_text(e), e.responses[0]) for e in shown))]
  assert np.percentile(lengths[0], 95) <= 20
  assert np.percentile(lengths[1], 95) <= 26
