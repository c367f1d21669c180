# SPDX-License-Identifier: Apache-2.0
"""Does the best learning rate of a narrow model hold for wide ones?

Byte-level decoders of widths 32 to 256, each at seven learning rates, once
parametrized as usual and once with mup, whose base is the narrowest. At the
base both are the same model. What came out is in experiments/lr_transfer/.

    scripts/sweep.py --config=experiments/lr_transfer.py \
        --workdir=runs/lr_transfer
    scripts/lr_transfer.py --workdir=runs/lr_transfer
"""

from typing import Any, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax import sweep

WIDTHS = (32, 64, 128, 256)
RATES = tuple(2.0 ** -n for n in range(10, 3, -1))
HEAD_DIM = 16


def get_config() -> ml_collections.ConfigDict:
  """What the runs have in common."""
  config = config_lib.default()
  config.name = "lr_transfer"
  config.model.d_model = WIDTHS[0]
  config.model.num_layers = 2
  config.model.num_heads = WIDTHS[0] // HEAD_DIM
  config.model.context_length = 32
  config.model.positions = "rotary"
  # As in the quickstart: at 0.02 models this narrow are slow to start.
  config.model.init_std = 0.1
  config.model.tie_embedding = False
  config.data.corpus = "sotu"
  config.data.tokenizer.kind = "byte"
  config.duration.steps = 200
  config.optimizer.schedule = "linear"
  config.optimizer.warmup_fraction = 0.1
  config.train.batch_size = 8
  config.evaluation.tokens = 2**14
  config.evaluation.batch_size = 16
  config.tracking.wandb = "disabled"
  config.sweep.ensemble = "on"  # the rates of one model in one step
  return config


def get_sweep(
    config: ml_collections.ConfigDict,
    widths: Sequence[int] = WIDTHS,
    rates: Sequence[float] = RATES,
) -> list[dict[str, Any]]:
  """Both parametrizations of every width at every learning rate."""
  del config
  shapes = [{"model.d_model": width, "model.num_heads": width // HEAD_DIM}
            for width in widths]
  mup = {"model.parametrization": "mup", "model.base_d_model": widths[0],
         "model.base_head_dim": HEAD_DIM}
  return sweep.product(
      [{"model.parametrization": "standard"}, mup], shapes,
      sweep.axis("optimizer.learning_rate", rates))
