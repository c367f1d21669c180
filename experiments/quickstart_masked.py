# SPDX-License-Identifier: Apache-2.0
"""A scaling law of masked language models on a laptop, in minutes.

The quickstart with encoders of the ModernBERT kind: a masked byte is predicted
from those on both sides. The runs with the most compute are left out of the
fit and predicted.
"""

import pathlib
from typing import Any, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax.models import families

quickstart = config_lib.module(
    pathlib.Path(__file__).with_name("quickstart.py"))

SIZES = ("6k", "14k", "25k", "55k", "98k")
MOST_TOKENS = 2**22


def get_config() -> ml_collections.ConfigDict:
  """What the runs have in common; the sweep sets size and tokens."""
  config = quickstart.get_config()
  config.name = "quickstart_masked"
  config.model.family = "modernbert"
  config.model.window = 32
  config.optimizer.learning_rate = learning_rate(SIZES[0])
  config.evaluation.tokens = 2**19  # of which 15% are predicted
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
