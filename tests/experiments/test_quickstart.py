"""The quickstart's data: what is held out of SFT is not trained on."""

from experiments import quickstart
from rlhf_jax import config


def test_no_held_out_demonstration_is_of_a_prompt_that_is_trained_on():
  experiment = config.override(quickstart.EXPERIMENT, {'world.demonstrations': 1000, 'seed': 3})
  task = quickstart.make_task(experiment)
  train, held_out = task.demonstrations
  assert (len(train), len(held_out)) == (1000, experiment.world.held_out_demonstrations)
  asked = {example.prompt for example in held_out}
  assert not asked & {example.prompt for example in (*train, *task.prompts[0])}
  assert asked == {example.prompt for example in task.prompts[1]}
