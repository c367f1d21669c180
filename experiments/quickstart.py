# SPDX-License-Identifier: Apache-2.0
"""A scaling law of byte-level language models on a laptop, in minutes.

Six decoders of 11k to 217k parameters, each trained on 262k to 4.2M bytes of
State of the Union addresses. The runs with the most compute are left out of
the fit and predicted.
"""

from typing import Any, Callable, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax.models import families
from tfjax import sweep

SIZES = ("6k", "14k", "25k", "55k", "98k", "197k")
MOST_TOKENS = 2**22
FRACTIONS = (1 / 16, 0.4**2, 0.4, 1)


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
  config.optimizer.warmup_fraction = 0.1
  config.train.batch_size = 8
  config.evaluation.tokens = 2**17
  config.evaluation.batch_size = 16
  # 24 short runs: their own records and the report say it all.
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
    rate: Callable[[str], float] = learning_rate,
) -> list[dict[str, Any]]:
  """Every size, at its learning rate, with every number of tokens."""
  del config
  models = [{"model.size": size, "optimizer.learning_rate": rate(size)}
            for size in sizes]
  tokens = [round(most_tokens * fraction) for fraction in FRACTIONS]
  return sweep.product(models, sweep.axis("duration.tokens", tokens))
