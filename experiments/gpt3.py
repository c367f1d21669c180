# SPDX-License-Identifier: Apache-2.0
"""GPT-3's sizes (Brown et al. 2020, Table 2.1), for plans of large machines.

Not meant for a laptop: `scripts/plan.py --config=experiments/gpt3.py` says
what a size takes on which machine, before there is one.
"""

import ml_collections

from tfjax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """6.7B; --config.model.size=175b and the others are in the same table."""
  config = config_lib.default()
  config.name = "gpt3"
  config.model.family = "gpt3"
  config.model.size = "6.7b"
  config.model.context_length = 2048
  # GPT-2's 50257 rounded up to a multiple of 128, which tensor sharding and
  # the hardware like.
  config.model.vocab_size = 50304
  config.model.scan_layers = True
  config.model.remat = "full"
  config.data.tokenizer.vocab_size = 50257
  # Brown et al. 2020: 300 billion tokens; 2M a batch at 6.7B.
  config.duration.tokens = 300_000_000_000
  config.train.batch_size = 1024
  config.train.dtype = "bfloat16"
  config.optimizer.learning_rate = 1.2e-4
  return config
