# SPDX-License-Identifier: Apache-2.0
"""The quickstart's scaling law for about half of its compute.

With a warmup-stable-decay schedule all numbers of tokens of one size share
what they have in common (sweep.share_trunk): each size is trained once, and
every shorter run of it branches off for its own decay. The same runs with
--config.sweep.share_trunk=False train alone.
"""

import pathlib
from typing import Any, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax import sweep

quickstart = config_lib.module(
    pathlib.Path(__file__).with_name("quickstart.py"))

SIZES = quickstart.SIZES
MOST_TOKENS = quickstart.MOST_TOKENS
LEAST_FRACTION = quickstart.FRACTIONS[0]


def get_config() -> ml_collections.ConfigDict:
  """What the runs have in common; the sweep sets size and tokens."""
  config = quickstart.get_config()
  config.name = "quickstart_trunk"
  config.optimizer.schedule = "wsd"
  config.optimizer.decay_fraction = 0.2
  # Of the shortest run; the others of its size get as many steps.
  config.optimizer.warmup_fraction = 0.1
  config.sweep.share_trunk = True
  return config


def get_sweep(
    config: ml_collections.ConfigDict,
    sizes: Sequence[str] = SIZES,
    most_tokens: int = MOST_TOKENS,
    budgets: int = 6,
) -> list[dict[str, Any]]:
  """Every size with `budgets` numbers of tokens, at even ratios.

  Each of them costs its decay alone, so that more of them make the share of
  the compute that is saved larger: of six a trunk takes 55%, of the
  quickstart's four 69%.
  """
  del config
  models = [{"model.size": size,
             "optimizer.learning_rate": quickstart.learning_rate(size)}
            for size in sizes]
  tokens = [round(most_tokens * LEAST_FRACTION ** (place / (budgets - 1)))
            for place in reversed(range(budgets))]
  return sweep.product(models, sweep.axis("duration.tokens", tokens))
