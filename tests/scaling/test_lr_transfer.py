# SPDX-License-Identifier: Apache-2.0
"""The best learning rate of each width, by hand."""

import json
import math
import pathlib

import numpy as np
import pandas as pd
import pytest

from tfjax import scaling
from tfjax.scaling.figures import lr_transfer

RATES = (0.01, 0.02, 0.04)


def write(workdir: pathlib.Path, name: str, width: int, rate: float,
          loss: float | None, status: str = "complete") -> None:
  """`name`: of the parametrization; standard is left out, as older runs do."""
  run = workdir / f"{name}-{width}-{rate}"
  run.mkdir(parents=True)
  model = {"d_model": width, "num_layers": 2}
  if name != "standard":
    model["parametrization"] = name
  (run / "config.json").write_text(json.dumps(
      {"model": model, "optimizer": {"learning_rate": rate}}))
  (run / "result.json").write_text(json.dumps(
      {"run_id": run.name, "status": status, "loss": loss,
       "loss_stderr": 0.01, "steps": 5, "seed": 0}))


def write_all(workdir: pathlib.Path) -> None:
  # 2 + (log2(rate / 0.02) - shift)^2: the vertex is a known rate.
  for name, width, shift in (("mup", 32, 0.25), ("mup", 64, 0.0),
                             ("standard", 32, 0.25)):
    for rate in RATES:
      write(workdir, name, width, rate,
            2 + (math.log2(rate / 0.02) - shift) ** 2)
  write(workdir, "standard", 64, 0.01, 2.5)
  write(workdir, "standard", 64, 0.02, 2.6)
  write(workdir, "standard", 64, 0.04, 9.0, "diverged")
  write(workdir, "standard", 64, 0.08, None, "failed")


def test_minima_by_hand(tmp_path: pathlib.Path) -> None:
  write_all(tmp_path)
  table = lr_transfer.losses(scaling.load(tmp_path))
  # The failed run has not ended, the diverged one has no loss.
  assert len(table) == 12
  assert table["loss"].isna().sum() == 1
  best = lr_transfer.minima(table).set_index(["parametrization", "d_model"])
  assert best["learning_rate"].to_dict() == {
      ("mup", 32): 0.02, ("mup", 64): 0.02, ("standard", 32): 0.02,
      ("standard", 64): 0.01}
  assert best["inside"].to_list() == [True, True, True, False]
  np.testing.assert_allclose(
      best["vertex"], [0.02 * 2 ** 0.25, 0.02, 0.02 * 2 ** 0.25, np.nan])


def test_the_picture_marks_minima_and_says_how_they_move(
    tmp_path: pathlib.Path) -> None:
  write_all(tmp_path)
  picture = lr_transfer.picture(lr_transfer.losses(scaling.load(tmp_path)))
  assert "mup: from width 32 to 64 the best learning rate changes by a factor "\
      "of 0.84." in picture.caption
  assert "standard: fewer than two widths" in picture.caption
  panels = picture.figure.axes
  assert [panel.get_title() for panel in panels] == ["standard", "mup"]
  stars = [[line.get_fillstyle() for line in panel.lines
            if line.get_marker() == "*"] for panel in panels]
  assert stars == [["full", "none"], ["full", "full"]]


def test_what_cannot_be_shown_is_said(tmp_path: pathlib.Path) -> None:
  write(tmp_path, "mup", 32, 0.01, None, "failed")
  with pytest.raises(ValueError, match="nothing to show"):
    lr_transfer.losses(scaling.load(tmp_path))
  write(tmp_path / "one", "mup", 64, 0.01, 2.0)
  write(tmp_path / "two", "mup", 64, 0.01, 2.1)
  with pytest.raises(ValueError, match="two runs have .*64"):
    lr_transfer.losses(scaling.load(tmp_path))


def test_a_vertex_needs_both_neighbours() -> None:
  table = pd.DataFrame(dict(
      parametrization="mup", d_model=32.0, learning_rate=RATES,
      loss=[2.1, 2.0, math.nan]))
  row = lr_transfer.minima(table).iloc[0]
  assert row["inside"] and math.isnan(row["vertex"])
