# SPDX-License-Identifier: Apache-2.0
"""The contenders of `scripts/bench.py --generate`: greedy generation by the
same GPT-2, with the same weights, in tfjax and in transformers.

A step continues a batch of prompts by a fixed number of tokens; its result is a
checksum of these, which bench.py compares.
"""

import os
import tempfile
from typing import Any, Callable

import numpy as np

from tfjax import config as config_lib
from tfjax.models import transformer
from tfjax.train import tuning

Step = Callable[[np.ndarray], Callable[[], float]]


def weights(config: config_lib.ModelConfig) -> dict[str, Any]:
  """The parameters of GPT-2's initial scale, made on the host."""
  from flax import linen as nn
  import jax
  random = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: (path[-1].key == "scale") + np.float32(0.02) *
      random.standard_normal(x.shape, np.float32),
      nn.meta.unbox(transformer.abstract_parameters(
          transformer.create(config))))


def tfjax_step(config: config_lib.ModelConfig, new_tokens: int) -> Step:
  """`tfjax.models.decoding.generate`."""
  import jax
  from tfjax.models import decoding
  from tfjax.models import search
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  module = transformer.create(config, jax.default_backend())
  params = jax.device_put(weights(config))
  settings = search.Settings(max_new_tokens=new_tokens)

  def step(windows):
    made = decoding.generate(module, params, windows[:, :-1].tolist(),
                             settings)
    return lambda: checksum(made.tokens)
  return step


def transformers_step(config: config_lib.ModelConfig, new_tokens: int) -> Step:
  """`GPT2LMHeadModel.generate`, the weights by way of `tfjax.hub.save`."""
  os.environ["HF_HUB_OFFLINE"] = "1"
  import torch
  import transformers
  from tfjax import hub
  torch.set_num_threads(tuning.available_cores())
  with tempfile.TemporaryDirectory() as directory:
    hub.save(config, weights(config), directory)
    model = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
  model.generation_config = transformers.GenerationConfig()
  how = transformers.GenerationConfig(
      max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

  def step(windows):
    prompts = torch.from_numpy(windows[:, :-1]).long()
    tokens = model.generate(
        prompts, attention_mask=torch.ones_like(prompts),
        generation_config=how)[:, prompts.shape[1]:].numpy()
    return lambda: checksum(tokens)
  return step


def checksum(tokens: np.ndarray) -> float:
  """A number that two batches of tokens share only if they are the same."""
  places = np.arange(1, tokens.size + 1)
  return float(np.sum(tokens.reshape(-1).astype(np.int64) * places) % 2**31)
