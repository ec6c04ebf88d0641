"""Sampling against a loop that asks the whole model for every token, and what lies where in a Rollout."""

import collections
import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import runners
from rlhf_jax.errors import ConfigError, ShardingError
from rlhf_jax.generate import generate, loop_trips, ring_growth
from rlhf_jax.maths.sampling import Sampling, sample_tokens, uniforms
from rlhf_jax.model import forward
from rlhf_jax.model.heads import LanguageModel, initial_params
from rlhf_jax.records import Prompts

MODEL, _ = tiny.models()
V, R, PAD, END = MODEL.config.vocab_size, 8, 5, (3, 7)
PROMPTS = [[4, 9, 1], [11], [2, 2, 17, 8], [6, 13], [18, 3, 5, 12], [10, 16, 14]]
B, P = len(PROMPTS), 4
KEY = jax.random.key(2)
PLAIN = Sampling(temperature=0.9, new_tokens=R, end_tokens=END, pad_token=PAD)
SAMPLINGS = {'plain': PLAIN, 'top-k': dataclasses.replace(PLAIN, temperature=1.3, top_k=4),
             'top-p': dataclasses.replace(PLAIN, top_p=0.6),
             'greedy': dataclasses.replace(PLAIN, temperature=0.0)}

_generate = jax.jit(generate, static_argnums=(0, 4, 5))
_sample_tokens = jax.jit(sample_tokens, static_argnums=2)


@functools.cache
def params():
  return tiny.params(MODEL, 6)


def prompts(rows=PROMPTS):
  tokens_BP, valid_BP = tiny.pad(rows, ['left'] * len(rows), P)
  return Prompts(tokens_BP=tokens_BP, valid_BP=valid_BP, sample_B=jnp.arange(len(rows)) + 20)


@functools.cache
def rollout(sampling):
  return jax.device_get(_generate(MODEL, params(), prompts(), KEY, sampling))


def answers(made):
  """The response tokens of a Rollout as lists of unequal length, end tokens included."""
  return [list(tokens_T[P:][mask_R]) for tokens_T, mask_R in zip(made.tokens_BT, made.mask_BR)]


def by_loop(choose):
  """Answers of a loop that passes the whole text through the model for every token; choose(logits_BV, t) -> token_B."""
  rows, going = [list(row) for row in PROMPTS], set(range(B))
  for t in range(R):
    logits_BTV = np.asarray(tiny._logits(MODEL, params(), *tiny.pad(rows, ['right'] * B, P + R)))
    token_B = choose(np.stack([logits_TV[len(row) - 1] for logits_TV, row in zip(logits_BTV, rows)]), t)
    for b in sorted(going):
      rows[b].append(int(token_B[b]))
      if token_B[b] in END:
        going.remove(b)
  return [row[len(prompt):] for row, prompt in zip(rows, PROMPTS)]


def allowed(logits_V, sampling):
  """{token: log-probability} of the tokens that top-k and then top-p leave, by sorting and adding up."""
  best = np.argsort(-logits_V, kind='stable')[:sampling.top_k or V]
  probability = np.exp(tiny.log_softmax(logits_V[best] / sampling.temperature))
  count = next(n for n in range(1, len(best) + 1) if probability[:n].sum() >= sampling.top_p - 1e-9 or n == len(best))
  return dict(zip(best[:count], np.log(probability[:count] / probability[:count].sum())))


@pytest.mark.parametrize('name', SAMPLINGS)
def test_the_cache_draws_what_the_whole_model_would(name):
  sampling = SAMPLINGS[name]
  expected = by_loop(lambda logits_BV, t: _sample_tokens(logits_BV, uniforms(KEY, prompts().sample_B, t), sampling)[0])
  assert answers(rollout(sampling)) == expected
  assert {len(row) for row in expected} >= {R} and min(map(len, expected)) < R  # some are cut, some end early


def test_greedy_is_the_argmax():
  assert answers(rollout(SAMPLINGS['greedy'])) == by_loop(lambda logits_BV, t: logits_BV.argmax(1))
  one = rollout(dataclasses.replace(PLAIN, top_k=1))
  np.testing.assert_array_equal(one.tokens_BT, rollout(SAMPLINGS['greedy']).tokens_BT)
  np.testing.assert_allclose(one.logprob_BR, 0, atol=1e-6)                      # of a choice of one


@pytest.mark.parametrize('name', SAMPLINGS)
def test_log_probabilities_are_of_what_was_sampled_from(name):
  sampling, made = SAMPLINGS[name], rollout(SAMPLINGS[name])
  of_greedy = dataclasses.replace(sampling, temperature=1.0)
  rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers(made))]
  logits_BTV = np.asarray(tiny._logits(MODEL, params(), *tiny.pad(rows, ['right'] * B, P + R)), np.float64)
  left_out = 0
  for b, answer in enumerate(answers(made)):
    for i, token in enumerate(answer):
      nats = allowed(logits_BTV[b, len(PROMPTS[b]) + i - 1], sampling if sampling.temperature else of_greedy)
      assert token in nats
      np.testing.assert_allclose(made.logprob_BR[b, i], nats[token], atol=3e-5)
      left_out += V - len(nats)
  assert (left_out > 0) == (name in ('top-k', 'top-p'))


@pytest.mark.parametrize('name', SAMPLINGS)
def test_what_lies_where(name):
  made = rollout(SAMPLINGS[name])
  length_B = np.array([len(answer) for answer in answers(made)])
  np.testing.assert_array_equal(made.mask_BR, np.arange(R) < length_B[:, None])
  np.testing.assert_array_equal(made.valid_BT, np.concatenate([prompts().valid_BP, made.mask_BR], 1))
  np.testing.assert_array_equal(made.tokens_BT[:, :P], prompts().tokens_BP)
  np.testing.assert_array_equal(made.sample_B, prompts().sample_B)
  assert (made.tokens_BT[:, P:][~made.mask_BR] == PAD).all()
  assert (made.logprob_BR[~made.mask_BR] == 0).all()
  for answer, ended in zip(answers(made), made.ended_B):
    assert [token in END for token in answer] == [False] * (len(answer) - 1) + [bool(ended)]  # the end is inside the mask


@pytest.mark.parametrize('new_tokens', [1, 5])
def test_without_end_tokens_every_answer_is_full(new_tokens):
  made = rollout(Sampling(new_tokens=new_tokens))
  assert made.mask_BR.shape == (B, new_tokens)
  assert made.mask_BR.all()
  assert not made.ended_B.any()
  np.testing.assert_array_equal(made.tokens_BT, rollout(Sampling(new_tokens=5)).tokens_BT[:, :P + new_tokens])


def test_decoding_stops_when_all_have_ended_and_a_larger_limit_changes_nothing(monkeypatch):
  calls = collections.Counter()

  def counted(*args):
    jax.debug.callback(lambda: calls.update(['call']))
    return sample_tokens(*args)
  monkeypatch.setattr(importlib.import_module('rlhf_jax.generate'), 'sample_tokens', counted)
  long = dataclasses.replace(PLAIN, new_tokens=58)
  made = jax.device_get(jax.jit(lambda p: generate(MODEL, p, prompts(), KEY, long))(params()))
  jax.effects_barrier()
  assert made.ended_B.all()
  longest = int(made.mask_BR.sum(1).max())
  assert R < longest < 50
  assert calls['call'] == longest
  assert (made.tokens_BT[:, P + longest:] == PAD).all()
  np.testing.assert_array_equal(made.tokens_BT[:, :P + R], rollout(PLAIN).tokens_BT)
  np.testing.assert_array_equal(made.mask_BR[:, :R], rollout(PLAIN).mask_BR)


@pytest.mark.parametrize('prompt_tokens, new_tokens, lengths', [
  (64, 64, [16, 32, 48, 64]), (64, 20, [20]), (9, 20, [10, 20]), (512, 53, [53]), (1024, 512, [128, 256, 384, 512]),
  (5, 1, [1]),
])
def test_the_cache_grows_where_that_spares_a_tenth_of_what_is_read(prompt_tokens, new_tokens, lengths):
  assert ring_growth(prompt_tokens, new_tokens) == lengths
  reads = lambda lengths: sum((prompt_tokens + end) * (end - begin) for begin, end in zip([0, *lengths], lengths))
  assert len(lengths) == 1 or reads(lengths) < 0.9 * reads([new_tokens])


# ---- a queue of prompts

MANY = [[int(token) for token in np.random.default_rng(i).integers(2, 19, 1 + i % P)] for i in range(21)]


@functools.cache
def from_queue(slots, model=MODEL):
  return jax.device_get(_generate(model, params(), prompts(MANY), KEY, PLAIN, slots))


@pytest.mark.parametrize('slots', [1, 4, 16, 50])
def test_an_answer_does_not_depend_on_how_many_slots_there_are(slots):
  """From one slot, in which all answers follow each other around the ring, to more slots than prompts."""
  queued, together = from_queue(slots), from_queue(None)
  assert len(set(together.mask_BR.sum(1))) > 3 and not together.ended_B.all()   # they start and end at different times
  for name in ('tokens_BT', 'valid_BT', 'mask_BR', 'ended_B', 'sample_B'):
    np.testing.assert_array_equal(getattr(queued, name), getattr(together, name), err_msg=name)
  np.testing.assert_allclose(queued.logprob_BR, together.logprob_BR, atol=2e-5)


def test_parts_of_a_mesh_drain_queues_of_their_own():
  """20 prompts, 10 a part, on 3 slots each: both refill on their own, and no answer changes."""
  runner, rows = runners.sharded(data=2, devices=jax.devices()[:2]), prompts(MANY[:20])
  run = runner.compile(functools.partial(generate, MODEL, sampling=PLAIN, slots=6), inputs=('params', 'batch', 'same'),
                       outputs='batch')
  made = runner.fetch(run(params(), rows, KEY))
  np.testing.assert_array_equal(made.tokens_BT, from_queue(None).tokens_BT[:20])
  np.testing.assert_array_equal(made.mask_BR, from_queue(None).mask_BR[:20])


def test_a_queue_keeps_to_the_window_around_the_ring():
  model = LanguageModel(dataclasses.replace(MODEL.config, window=3))
  np.testing.assert_array_equal(from_queue(4, model).tokens_BT, from_queue(None, model).tokens_BT)
  assert (from_queue(4, model).tokens_BT != from_queue(4).tokens_BT).any()


def test_a_queue_takes_fewer_steps_than_waves(monkeypatch):
  """21 prompts on 4 slots: less than the six waves, each as long as its longest answer, that fixed batches need."""
  calls = collections.Counter()

  def counted(logits_BV, *args):
    jax.debug.callback(lambda: calls.update([logits_BV.shape[0]]))
    return sample_tokens(logits_BV, *args)
  monkeypatch.setattr(importlib.import_module('rlhf_jax.generate'), 'sample_tokens', counted)
  made = jax.jit(lambda p: generate(MODEL, p, prompts(MANY), KEY, PLAIN, 4))(params())
  jax.effects_barrier()
  length_B = np.asarray(made.mask_BR).sum(1)
  waves = sum(length_B[i:i + 4].max() - 1 for i in range(0, len(MANY), 4))
  assert calls[1] == 21                                                         # each prompt is prefilled once
  assert -(-(length_B - 1).sum() // 4) <= calls[4] < 0.85 * waves


@pytest.mark.parametrize('slots', [None, 1])
def test_empty_prompts_are_answered(slots):
  nothing = Prompts(tokens_BP=jnp.zeros((3, 2), jnp.int32), valid_BP=jnp.zeros((3, 2), bool), sample_B=jnp.arange(3))
  made = _generate(MODEL, params(), nothing, KEY, PLAIN, slots)
  assert np.isfinite(made.logprob_BR).all() and (made.mask_BR.sum(1) >= 1).all()


def test_no_slots_are_refused():
  with pytest.raises(ConfigError, match=r'slots is 0\. Pass how many sequences to decode at a time, or None'):
    generate(MODEL, params(), prompts(), KEY, PLAIN, slots=0)


def test_slots_that_the_mesh_does_not_divide_are_refused():
  runner = runners.sharded(data=2, devices=jax.devices()[:2])
  for rows, slots in ((PROMPTS, 3), (PROMPTS[:5], None)):
    says = r'prompts on . slots, which the 2 parts into which the mesh cuts a batch do not divide\. Make both multiples'
    with pytest.raises(ShardingError, match=says), jax.set_mesh(runner.mesh):
      generate(MODEL, params(), prompts(rows), KEY, PLAIN, slots)


@pytest.mark.parametrize('changes, says', [
  ({'new_tokens': 61}, r'sequences of 65 tokens, but the model has context_length=64\. Shorten'),
  ({'end_tokens': (3, 19)}, 'sampling end_tokens has the id 19, but the model has a vocabulary of 19'),
  ({'pad_token': 200}, 'sampling pad_token has the id 200, but the model has a vocabulary of 19.*the tokenizer'),
])
def test_what_does_not_fit_the_model_is_refused(changes, says):
  with pytest.raises(ConfigError, match=says):
    generate(MODEL, params(), prompts(), KEY, dataclasses.replace(PLAIN, **changes))


def test_the_context_can_be_filled_to_the_last_slot():
  made = jax.eval_shape(lambda: generate(MODEL, params(), prompts(), KEY, Sampling(new_tokens=60)))
  assert made.tokens_BT.shape == (B, MODEL.config.context_length)


@pytest.mark.parametrize('attention', ['auto', 'cudnn'])
def test_bfloat16_decodes_what_it_trains(attention):
  model = LanguageModel(tiny.config('llama', dtype='bfloat16', head_width=16, attention=attention))
  fresh = jax.jit(initial_params, static_argnums=0)(model, jax.random.key(0))
  made = _generate(model, fresh, prompts(), KEY, Sampling(new_tokens=R))
  forced_BR = jax.jit(lambda p: forward.next_logprobs(model, p, made.tokens_BT, made.valid_BT, start=P)[0])(fresh)
  assert made.logprob_BR.dtype == jnp.float32
  assert np.abs(made.logprob_BR - forced_BR).max() < 0.05


# ---- with the kernels of GPUs

WINDOWED = tiny.config('llama', window=3, head_width=16)


@functools.cache
def windowed(by_cudnn, slots, sampling=PLAIN):
  model = LanguageModel(tiny.by_cudnn(WINDOWED) if by_cudnn else WINDOWED)
  return jax.device_get(_generate(model, tiny.params(LanguageModel(WINDOWED), 9), prompts(MANY), KEY, sampling, slots))


@pytest.mark.parametrize('slots', [None, 4])
def test_the_kernels_of_gpus_say_the_same(slots):
  """All at once, in a cache that does not grow; and from a queue, around the ring and within the window."""
  got, expected = windowed(True, slots), windowed(False, None)
  assert len(set(expected.mask_BR.sum(1))) > 2 and not expected.ended_B.all()
  for name in ('tokens_BT', 'valid_BT', 'mask_BR', 'ended_B', 'sample_B'):
    np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
  np.testing.assert_allclose(got.logprob_BR, expected.logprob_BR, atol=3e-5)


def rings(config, slots=None):
  """How long the caches are that decoding goes through, of prompts of 64 tokens and answers of as many."""
  shapes = Prompts(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
    ((2, 64), jnp.int32), ((2, 64), jnp.bool_), ((2,), jnp.int32))))
  model, sampling = LanguageModel(config), Sampling(new_tokens=64)
  params = jax.eval_shape(functools.partial(initial_params, model), KEY)
  program = jax.make_jaxpr(lambda p, prompts: generate(model, p, prompts, KEY, sampling, slots))(params, shapes)
  caches = [x.aval.shape for e in tiny.equations(program.jaxpr) if e.primitive.name == 'while' for x in e.outvars
            if len(x.aval.shape) == 4]
  return sorted({shape[2] for shape in caches})


def test_a_cache_that_is_not_read_whole_does_not_grow():
  config = tiny.config('llama', head_width=16, context_length=128)
  assert rings(config) == [80, 96, 112, 128]
  assert rings(tiny.by_cudnn(config)) == [128]
  assert rings(tiny.by_cudnn(dataclasses.replace(config, head_width=24))) == [80, 96, 112, 128]  # no kernel for that width
  trips = lambda config: loop_trips(config, 2, 64, 64)
  assert trips(config) == (63 / 4,) and trips(tiny.by_cudnn(config)) == (63,)


def test_blocks_that_are_scanned_read_prompts_as_they_are_stored():
  """Layers are split for decoding alone; the prefill scans the stacked ones."""
  config = tiny.config('llama', layers=3, scan_layers=True)
  model = LanguageModel(config)
  params = jax.eval_shape(functools.partial(initial_params, model), KEY)

  def scans(config):
    run = lambda p: generate(LanguageModel(config), p, prompts(), KEY, PLAIN)
    program = jax.make_jaxpr(run)(params)
    return sum(e.primitive.name == 'scan' and e.params['length'] == 3 for e in tiny.equations(program.jaxpr))
  assert scans(config) == 1 and scans(dataclasses.replace(config, scan_layers=False)) == 0
