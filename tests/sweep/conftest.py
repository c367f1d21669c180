# SPDX-License-Identifier: Apache-2.0
"""What tests of sweeps share: an experiment of a few steps."""

import json
import pathlib
from typing import Any, Callable

import ml_collections
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.train import records


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


@pytest.fixture(name="write_run")
def write_run_fixture(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
  """Writes the files of a run as training leaves them, without training.

  write_run(spec, status, step): rows of steps 1 to `step`, each of which took
  a device-second and has the loss 6 - step / 10. A run that is pending has no
  file, one that is running or was interrupted by a kill has no record.
  """
  def write(spec: sweep.RunSpec, status: str, step: int = 0,
            **record: Any) -> pathlib.Path:
    run_dir = tmp_path / spec.run_id
    if status == "pending":
      return run_dir
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.json").write_text("{}")
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
      for number in range(1, step + 1):
        share = number / spec.budget.steps
        file.write(json.dumps(dict(
            kind="train", step=number, tokens=share * spec.budget.tokens,
            flops=share * spec.budget.flops_total, loss=6 - number / 10,
            tokens_per_second=128.0, device_seconds=float(number))) + "\n")
    if status not in ("running", "killed"):
      records.write_result(run_dir, dict(
          run_id=spec.run_id, status=status, loss=6 - step / 10, steps=step,
          config_hash=config_lib.config_hash(spec.config),
          flops_total=step / spec.budget.steps * spec.budget.flops_total,
          occupied_device_seconds=float(step), **record))
    return run_dir
  return write
