# SPDX-License-Identifier: Apache-2.0
"""The causal objective: what is predicted from what, and what counts."""

from flax import linen as nn
import jax
import numpy as np

from tfjax import config as config_lib
from tfjax.models import transformer
from tfjax.objectives import OBJECTIVES
from tfjax.objectives import causal

CONFIG = config_lib.ModelConfig(
    d_model=16, num_layers=1, num_heads=1, d_ff=16, context_length=6,
    vocab_size=9, init_std=0.5)
WINDOWS = np.random.default_rng(0).integers(0, 9, (4, 7)).astype(np.int32)
WEIGHTS = np.array([1, 0, 1, 1], np.float32)


def test_the_target_is_the_next_token() -> None:
  windows = np.array([[5, 6, 7], [1, 2, 3]])
  inputs, targets, weights = causal.split(windows, np.array([1.0, 0.0]))
  np.testing.assert_array_equal(inputs, [[5, 6], [1, 2]])
  np.testing.assert_array_equal(targets, [[6, 7], [2, 3]])
  np.testing.assert_array_equal(weights, [[1, 1], [0, 0]])


def test_the_loss_is_that_of_the_models_logits() -> None:
  assert OBJECTIVES["causal"] is causal
  model = transformer.create(CONFIG)
  random = np.random.default_rng(1)
  params = jax.tree.map(
      lambda x: (random.standard_normal(x.shape) / 2).astype(np.float32),
      nn.meta.unbox(transformer.abstract_parameters(model)))
  logits = np.asarray(jax.jit(model.apply)(
      {"params": params}, WINDOWS[:, :-1]), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  loss_BT = -np.take_along_axis(log_p, WINDOWS[:, 1:, None], -1)[..., 0]
  losses, counts = jax.jit(
      lambda *x: causal.losses(model, *x))(params, WINDOWS, WEIGHTS)
  np.testing.assert_array_equal(counts, 6 * WEIGHTS)
  np.testing.assert_allclose(losses, loss_BT.sum(1) * WEIGHTS, rtol=1e-5)
  total, weight = jax.jit(
      lambda *x: causal.loss_sum(model, *x))(params, WINDOWS, WEIGHTS)
  assert weight == 18
  np.testing.assert_allclose(total, losses.sum(), rtol=1e-5)
