"""KL estimators, GAE with whitening, and the adaptive weight against numbers of other systems (tests/golden/README.md).

If one of these fails after a change, the change is wrong, or needs a named switch: do not touch the numbers.
"""

import json
import pathlib

import numpy as np
import pytest

from rlhf_jax.maths.gae import gae
from rlhf_jax.maths.kl import ESTIMATORS, adaptive_kl_weight
from rlhf_jax.maths.masked import whiten

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@pytest.fixture(params=[0, 1, 2])
def verl(request):
  with np.load(GOLDEN / f'ppo_verl_{request.param}.npz') as file:
    return dict(file)


@pytest.mark.parametrize('name', ['k1', 'k2', 'k3'])
def test_kl_estimators(verl, name):
  mask_BR = verl['in_mask']
  kl_BR = np.array(ESTIMATORS[name](verl['in_old_logprob'], verl['in_ref_logprob']))
  np.testing.assert_allclose(kl_BR[mask_BR], verl[f'out_kl_{name}'][mask_BR], rtol=1e-5, atol=1e-6)


def test_returns_and_whitened_advantages(verl):
  config, mask_BR = json.loads(str(verl['config'])), verl['in_mask']
  advantage_BR, return_BR = gae(verl['out_reward'], verl['in_value'], mask_BR,
                                discount=config['discount'], trace=config['trace'])
  np.testing.assert_allclose(return_BR, verl['out_return'], rtol=1e-5, atol=1e-5)
  whitened_BR = whiten(advantage_BR, mask_BR, bessel=True)
  np.testing.assert_allclose(whitened_BR, verl['out_advantage_whitened'], rtol=1e-5, atol=1e-5)
  biased_BR = np.array(whiten(advantage_BR, mask_BR, bessel=False))  # the recording can tell the two apart
  assert np.abs(biased_BR - verl['out_advantage_whitened']).max() > 1e-3


def test_adaptive_kl_weight():
  golden = json.loads((GOLDEN / 'adaptive_kl.json').read_text())
  weight = golden['initial']
  for kl, expected in zip(golden['kl'], golden['kl_weight_after'], strict=True):
    weight = adaptive_kl_weight(weight, kl, target_nats_per_sequence=golden['target_nats_per_sequence'],
                                horizon_episodes=golden['horizon_episodes'], episodes=golden['episodes_per_update'])
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
