# SPDX-License-Identifier: Apache-2.0
"""What tests of sweeps share: an experiment of a few steps."""

import pathlib

import ml_collections
import pytest

from tfjax import config as config_lib


@pytest.fixture(name="base")
def base_fixture(tmp_path: pathlib.Path) -> ml_collections.ConfigDict:
  """A run of 10 steps of 4 x 32 tokens on 20,000 bytes of synthetic text."""
  config = config_lib.default()
  config_lib.override(config, {
      "data.corpus": "synthetic", "data.synthetic.num_bytes": 20_000,
      "data.synthetic.document_bytes": 1_000, "data.tokenizer.kind": "byte",
      "data.cache_dir": str(tmp_path / "cache"), "model.size": "3k",
      "model.context_length": 32, "train.batch_size": 4,
      "duration.steps": 10})
  return config
