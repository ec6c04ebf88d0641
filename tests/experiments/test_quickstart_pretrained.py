"""The quickstart from somebody else's chat model: its judge gets the questions as asked."""

import json

import numpy as np
from chatml import make_directory

from experiments import quickstart
from rlhf_jax import cli, config
from rlhf_jax.data import simulated

SETTINGS = {
  'mesh.runner': 'single', 'mesh.cpu_devices': None, 'tensorboard': False,
  'data.limits.prompt_tokens': 56, 'data.limits.response_tokens': 12,
  'data.limits.too_long': 'truncate', 'sft.steps': 2, 'sft.batch_size': 8, 'sft.packed': False,
  'reward.steps': 2, 'reward.batch_size': 8, 'ppo.iterations': 1, 'ppo.batch_size': 16,
  'ppo.epochs': 1, 'ppo.slots': None, 'ppo.held_out_answers': 1, 'world.demonstrations': 64,
  'world.ranked_prompts': 24, 'world.held_out_rankings': 1,
}


def test_it_runs_from_a_chatml_model_to_its_table(tmp_path):
  said = [text for example in simulated.demonstrations(0, 200)
          for text in (example.prompt[-1].text, *example.responses)]
  start, _ = make_directory(tmp_path / 'model', said)
  small = config.override(quickstart.EXPERIMENT, SETTINGS | {'pretrained': start})
  results = cli.run_stages(small, quickstart.make_task, tmp_path / 'run', cli.Command(export=False))
  assert (np.isfinite(results['table']['PPO']['gold score'])
          and results['table']['SFT']['KL, nats per answer'] == 0)
  asked = {example.prompt[-1].text for example in simulated.prompts(0)[1]}
  rows = [json.loads(line)
          for line in (tmp_path / 'run' / 'answers.jsonl').read_text().splitlines()]
  assert {row['prompt'] for row in rows} <= asked and len(rows) == 64
