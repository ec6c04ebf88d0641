"""Which parameters a stage inherits. Models are plain dicts, so a handoff is dict arithmetic.

    reward.backbone <- sft.backbone        reward.scalar <- fresh
    policy, reference <- sft               value <- reward, or a head of zeros on sft.backbone where there is no reward
                                                    or where the value is to have the policy's size
"""

import jax.numpy as jnp


def reward_params(sft_params, fresh):
  """Parameters of a new reward model: the SFT model's backbone under a fresh head, or all fresh where their sizes differ."""
  return fresh if sft_params is None else {'backbone': sft_params['backbone'], 'scalar': fresh['scalar']}


def value_params(sft_params, reward, shared_trunk):
  """Parameters of a new value function: the reward model's, or a head of zeros on the policy's trunk or a copy of it.

  `reward` is None where there is no reward model, or where the value is not to start from it.
  """
  if reward is not None and not shared_trunk:
    return reward
  width = sft_params['backbone']['final_norm_D'].shape[0]
  head = {'scalar': {'scalar_D': jnp.zeros(width), 'bias': jnp.zeros(())}}
  return head if shared_trunk else {'backbone': sft_params['backbone']} | head


def normalised(reward, mean, std):
  """The reward model with scores (score - mean) / std: the scale goes into the head's weights, the mean into its bias."""
  scalar = reward['scalar']
  return reward | {'scalar': {'scalar_D': scalar['scalar_D'] / std, 'bias': (scalar['bias'] - mean) / std}}
