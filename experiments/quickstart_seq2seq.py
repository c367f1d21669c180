# SPDX-License-Identifier: Apache-2.0
"""A scaling law of sequence-to-sequence models on a laptop, in minutes.

The quickstart with encoder-decoders of the T5 kind: spans of the text are left
out of the source, and the decoder writes them. The runs with the most compute
are left out of the fit and predicted.
"""

import pathlib
from typing import Any, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax.models import families

quickstart = config_lib.module(
    pathlib.Path(__file__).with_name("quickstart.py"))

SIZES = ("6k", "14k", "25k", "55k")
MOST_TOKENS = 2**22


def get_config() -> ml_collections.ConfigDict:
  """What the runs have in common; the sweep sets size and tokens."""
  config = quickstart.get_config()
  config.name = "quickstart_seq2seq"
  config.model.family = "t5v1_1"
  config.model.positions = "relative"
  config.model.init_std = 0.02  # T5 starts by the number of inputs instead
  # As many bytes as ByT5 has them long (Xue et al. 2022, §3.1); more of them
  # than its 15%, as only what they hold teaches a model this small.
  config.objective.mean_span = 20.0
  config.objective.noise_density = 0.5
  config.optimizer.learning_rate = learning_rate(SIZES[0])
  config.evaluation.tokens = 2**18  # of which half has a loss
  config.evaluation.batch_size = 32
  return config


def get_sweep(
    config: ml_collections.ConfigDict,
    sizes: Sequence[str] = SIZES,
    most_tokens: int = MOST_TOKENS,
    budgets: int = quickstart.BUDGETS,
) -> list[dict[str, Any]]:
  """Every size with every number of tokens."""
  return quickstart.get_sweep(
      config, sizes, most_tokens, budgets, learning_rate)


def learning_rate(size: str) -> float:
  """Falls with the width; from short runs at widths 32 and 64."""
  d_model = families.LADDER[size][0]
  return 0.012 * (16 / d_model) ** 0.5
