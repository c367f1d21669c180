# SPDX-License-Identifier: Apache-2.0
"""Small models of every parametrization, and what they are tested on."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from tfjax import config as config_lib
from tfjax.models import inputs as inputs_lib
from tfjax.models import transformer
from tfjax.objectives import loss as loss_lib

VOCAB, LENGTH, BATCH = 8, 8, 4
OPTIMIZER = config_lib.OptimizerConfig(weight_decay=0.1)


def model(name: str, d_model: int = 64, **fields: Any
          ) -> config_lib.ModelConfig:
  """Base: width 64, heads of 16, 2 layers."""
  fields = dict(family="gpt2", num_layers=2, num_heads=d_model // 16,
                vocab_size=VOCAB, context_length=LENGTH,
                attention="reference") | fields
  if name != "standard":
    fields |= dict(base_d_model=64, base_head_dim=16)
  if name == "complete_p":
    fields |= dict(base_num_layers=2)
  return config_lib.complete_model(config_lib.ModelConfig(
      parametrization=name, d_model=d_model, **fields))


def example(config: config_lib.ModelConfig, key: jax.Array,
            length: int = LENGTH) -> loss_lib.Batch:
  tokens = jax.random.randint(key, (BATCH, length + 1), 0, VOCAB)
  inputs = inputs_lib.Inputs(tokens[:, :-1])
  if config.architecture == "encoder_decoder":
    inputs = inputs.replace(source=inputs_lib.Inputs(tokens[:, 1:]))
  return loss_lib.Batch(inputs, tokens[:, 1:], jnp.ones((BATCH, length)))


@functools.partial(jax.jit, static_argnums=0)
def initial(config: config_lib.ModelConfig, key: jax.Array) -> dict:
  return nn.meta.unbox(transformer.create(config).init(
      key, transformer.example_inputs(config))["params"])


def gradients(config: config_lib.ModelConfig, params: dict,
              batch: loss_lib.Batch) -> dict:
  def mean(params):
    total, weight = loss_lib.loss_sum(
        transformer.create(config), params, batch)
    return total / weight
  return jax.grad(mean)(params)
