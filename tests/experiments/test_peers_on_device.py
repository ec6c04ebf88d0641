"""PyTorch's side on one device does the work that is claimed; here on a CPU, in both dtypes."""

import dataclasses

import pytest
import torch

from experiments.bench import BatchConfig
from experiments.peers import on_device
from experiments.peers.on_device import Place
from rlhf_jax.model.config import preset

BATCH = BatchConfig(sft_rows=4, reward_pairs=2, tokens=9, generate_prompts=3, ppo_prompts=4,
                    prompt_tokens=5, new_tokens=6, epochs=3, minibatches=2)
SIZES = {'vocab_size': 97, 'width': 32, 'layers': 2, 'query_heads': 4, 'head_width': 8,
         'feedforward_width': 48, 'context_length': 64}
CONFIGS = {'llama': preset('llama3.2-1b', kv_heads=2, **SIZES),
           'gpt_neox': preset('pythia-1b', kv_heads=4, **SIZES)}
FLOAT32, BFLOAT16 = Place('cpu', torch.float32), Place('cpu', torch.bfloat16)


@pytest.fixture(params=CONFIGS)
def config(request):
  return CONFIGS[request.param]


def a_round(name, config, place, batch=BATCH):
  """(the workload after one round, the seconds of its parts)."""
  torch.manual_seed(0)
  workload = on_device.SIDES['PyTorch'][name](config, batch, place)
  return workload, workload.round()


def weights(module):
  return [weight.detach().clone() for weight in module.parameters()]


def differ(old, module):
  return any(not torch.equal(a, b) for a, b in zip(old, module.parameters(), strict=True))


def test_the_models_have_the_sizes_of_the_preset(config):
  model = on_device.language_model(config, FLOAT32)
  assert model.config.model_type == config.family
  assert model.config._attn_implementation == 'sdpa'
  logits = model(torch.zeros((2, 3), dtype=torch.int64)).logits
  assert logits.shape == (2, 3, config.vocab_size)
  assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_logprobs_of_responses_are_those_of_all_logits(config):
  model = on_device.language_model(config, FLOAT32)
  tokens = torch.randint(0, config.vocab_size, (3, 8))
  with torch.no_grad():
    every = model(tokens).logits.log_softmax(-1)[:, :-1]
    want = every.gather(-1, tokens[:, 1:, None])[:, 4:, 0]
    got = on_device.response_logprobs(model, tokens, 5)
  torch.testing.assert_close(got, want)


def test_scores_from_a_slot_on_are_those_of_all_slots(config):
  model = on_device.ScalarModel(config, FLOAT32)
  tokens = torch.randint(0, config.vocab_size, (3, 8))
  with torch.no_grad():
    torch.testing.assert_close(model(tokens, 6), model(tokens)[:, 6:])


def test_the_cache_continues_what_the_whole_model_says(config):
  """Almost without noise, a token is the most probable one: of the whole sequence in one pass."""
  model = on_device.language_model(config, FLOAT32)
  with torch.no_grad():
    for name, weight in model.named_parameters():                # so that positions matter
      weight.mul_(1 if 'norm' in name or 'embed' in name else 20)
    model.get_output_embeddings().weight.mul_(1e4)
  write = on_device.Writer(model, 5, 6, FLOAT32)
  prompts = torch.randint(0, config.vocab_size, (3, 5))
  for _ in range(2):                                             # the cache is emptied in between
    tokens = write(prompts)
    with torch.no_grad():
      whole = model(tokens).logits[:, 4:-1].argmax(-1)
    assert tokens.shape == (3, 11)
    torch.testing.assert_close(tokens[:, :5], prompts)
    assert (tokens[:, 5:] == whole).float().mean() > 0.9


def test_tokens_are_sampled_with_their_probabilities(config):
  model = on_device.language_model(config, FLOAT32)
  prompts = torch.randint(0, config.vocab_size, (1, 5)).repeat(20000, 1)
  torch.manual_seed(0)
  with torch.no_grad():
    model.get_output_embeddings().weight.mul_(20)                # far from uniform
    probability = model(prompts[:1]).logits[0, -1].softmax(-1)
    write = on_device.Writer(model, 5, 1, FLOAT32)
    drawn = write(prompts)[:, 5].bincount(minlength=config.vocab_size) / len(prompts)
  assert probability.max() > 3 / config.vocab_size
  assert (drawn - probability).abs().max() < 0.015


@pytest.mark.parametrize('place', [FLOAT32, BFLOAT16], ids=('float32', 'bfloat16'))
@pytest.mark.parametrize('name', ['sft', 'reward'])
def test_an_update_moves_float32_parameters(name, place, config):
  workload, parts = a_round(name, config, place)
  old = weights(workload.model)
  workload.round()
  assert list(parts) == ['update'] and parts['update'] > 0
  assert differ(old, workload.model)
  states = [x for each in workload.descent.optimizer.state.values() for x in each.values()]
  assert all(x.dtype == torch.float32 for x in [*workload.model.parameters(), *states])


def test_products_are_in_the_compute_dtype(config):
  workload = on_device.Sft(config, BATCH, BFLOAT16)
  seen = set()
  blocks = [module for module in workload.model.modules() if isinstance(module, torch.nn.Linear)]
  for block in blocks:
    block.register_forward_hook(lambda module, given, result: seen.add(result.dtype))
  workload.round()
  assert seen == {torch.bfloat16}


def test_a_ppo_round_moves_policy_and_value_and_nothing_else(config):
  torch.manual_seed(0)
  workload = on_device.Ppo(config, BATCH, BFLOAT16)
  trained, kept = ('policy', 'value'), ('reference', 'judge')
  before = {name: weights(getattr(workload, name)) for name in trained + kept}
  parts = workload.round()
  moved = {name for name, old in before.items() if differ(old, getattr(workload, name))}
  assert moved == set(trained) and list(parts) == ['generate', 'score', 'update']
  steps = {int(state['step']) for state in workload.descent.optimizer.state.values()}
  assert steps == {3 * 2}
  assert all(weight.dtype == torch.bfloat16 for name in kept
             for weight in getattr(workload, name).parameters())


def test_answers_are_those_of_the_policy_as_it_is(config):
  """What writes answers is a copy in the compute dtype, made anew in every round."""
  workload, _ = a_round('ppo', config, FLOAT32)
  behind = weights(workload.scribe)
  workload.round()
  assert differ(behind, workload.scribe)
  for _ in range(2):
    workload.batch = dataclasses.replace(BATCH, epochs=0)
    workload.round()
  for a, b in zip(workload.scribe.parameters(), workload.policy.parameters(), strict=True):
    torch.testing.assert_close(a, b)


def test_the_first_minibatch_has_a_ratio_of_1(config):
  """Then the loss is minus the mean advantage, which is white, and the weighted error of values."""
  torch.manual_seed(0)
  workload = on_device.Ppo(config, BATCH, FLOAT32)
  tokens = workload.write(workload.prompts)
  lessons = tokens, *workload._look_back(tokens)
  _, value, advantage, returns = lessons[1:]
  assert abs(advantage.mean()) < 1e-6 and abs(advantage.std() - 1) < 1e-5
  want = 0.05 * ((value - returns) ** 2).mean()
  torch.testing.assert_close(workload._loss(*lessons).detach(), want, atol=1e-6, rtol=1e-5)


def test_advantages_against_the_sum_that_defines_them():
  reward, value = torch.randn(2, 4), torch.randn(2, 4)
  after = torch.cat([value[:, 1:], torch.zeros(2, 1)], 1)
  delta = reward + after - value
  want = torch.stack([sum(0.95 ** (s - t) * delta[:, s] for s in range(t, 4)) for t in range(4)], 1)
  torch.testing.assert_close(on_device._advantages(reward, value), want)


def test_the_library_writes_answers_of_full_length(config):
  side = on_device.Side('transformers', 'generate', config, BATCH, BFLOAT16)
  assert list(side.round()) == ['generate']
  assert side.rounds.answers.shape == (3, 11)
  assert (side.peak_bytes(), side.device_name()) == (None, 'cpu')
