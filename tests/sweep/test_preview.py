# SPDX-License-Identifier: Apache-2.0
"""What a sweep would take, at once: from records, from a forecast's file, or
unknown."""

import io
import json
import pathlib
import time
from typing import Any

import ml_collections
import pytest
from rich import console as console_lib

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import forecast
from tfjax.sweep import pace
from tfjax.sweep import preview
from tfjax.train import records

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
STEP_FLOPS = 4 * 32 * 49_248  # of "3k", as worked out in test_grids.py
TAKEN = dict(status="complete", flops_total=10.0 * STEP_FLOPS, steps=10,
             device_seconds=4.0, device_count=2, wall_seconds=5.0)


def write_result(workdir: pathlib.Path, run_id: str, **result: Any) -> None:
  (workdir / run_id).mkdir(parents=True)
  records.write_result(workdir / run_id, dict(run_id=run_id, **result))
  (workdir / run_id / "config.json").write_text("{}")


def text_of(found: preview.Preview) -> str:
  file = io.StringIO()
  preview.show(console_lib.Console(file=file, width=160), found)
  return file.getvalue()


def test_a_pace_is_overhead_and_a_rate(base: ml_collections.ConfigDict,
                                       tmp_path: pathlib.Path) -> None:
  (spec,) = sweep.plan(base, [{"duration.steps": 30}])
  assert pace.of(tmp_path) is None
  write_result(tmp_path, "one", **TAKEN)
  # 10 steps in 4 / 2 s, and 3 s besides.
  assert pace.of(tmp_path).seconds(spec) == pytest.approx(3 + 30 * 0.2)
  # What was not alone, or has not ended well, or of another size, tells not.
  for number, changes in enumerate([
      dict(branched_from="one"), dict(ensemble_members=2),
      dict(status="diverged"), dict(wall_seconds=None),
      dict(steps=0)]):
    write_result(tmp_path, f"not-{number}", **(
        TAKEN | dict(device_seconds=99.0) | changes))
  write_result(tmp_path, "large", **(TAKEN | dict(
      flops_total=1e12, device_seconds=1.0)))
  found = pace.of(tmp_path)
  assert found.num_runs == 2
  # Overheads are 3 and 4.5 s.
  assert found.seconds(spec) == pytest.approx(3.75 + 30 * 0.2)


def test_hours_come_from_the_best_that_is_known(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  specs = sweep.plan(base, sweep.axis("duration.steps", [10, 30]))
  found = preview.look(specs, tmp_path, workers=1)
  assert found.seconds() is None and "unknown" in found.basis
  assert "with --timing every model is timed" in text_of(found)
  (tmp_path / forecast.FILE).write_text(json.dumps(dict(runs=[
      dict(run_id=spec.run_id, seconds=90.0) for spec in specs])))
  found = preview.look(specs, tmp_path, workers=1)
  assert found.seconds() == 180.0 and forecast.FILE in found.basis
  write_result(tmp_path, specs[0].run_id, **TAKEN)
  found = preview.look(specs, tmp_path, workers=1)
  assert found.basis.startswith("measured: the pace of 1 complete run of")
  assert found.seconds() == pytest.approx(6 + 40 * 0.2)
  assert found.seconds(left=True) == pytest.approx(3 + 30 * 0.2)
  assert found.flops_left == 30 * STEP_FLOPS
  assert [cell.state.status for cell in found.cells] == ["complete", "pending"]
  base.cost.hardware = "h100"
  elsewhere = sweep.plan(base, [{}])
  found = preview.look(elsewhere, tmp_path, workers=1)
  assert "MFU 0.4, assumed" in found.basis and "H100" in found.machine


def test_what_trunks_and_ensembles_share_is_said(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  config_lib.override(base, {
      "optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.2,
      "sweep.share_trunk": True, "sweep.ensemble": "on"})
  specs = sweep.plan(base, [
      *sweep.axis("duration.steps", [10, 40]),
      *sweep.product([{"sweep.share_trunk": False}],
                     sweep.axis("optimizer.learning_rate", [0.1, 0.2, 0.3]))])
  found = preview.look(specs, tmp_path, workers=1)
  # The decay of 10 steps is their last 2.
  assert [cell.shares for cell in found.cells] == [
      "off 2 at step 8", "trunk"] + ["one step with 2 others"] * 3
  assert found.flops_shared == 8 * STEP_FLOPS
  assert found.flops_total == (10 + 40 + 30) * STEP_FLOPS
  assert found.flops_left == (2 + 40 + 30) * STEP_FLOPS
  # A branch that has done 1 of its own 2 steps.
  run_dir = tmp_path / specs[0].run_id
  write_result(tmp_path, run_dir.name, status="interrupted", steps=9)
  assert preview.look(specs, tmp_path).flops_left == pytest.approx(
      (1 + 40 + 30) * STEP_FLOPS)
  write_result(tmp_path, "other", **TAKEN)
  found = preview.look(specs, tmp_path, workers=1)
  # 3 s and 0.2 s a step, of its own 2 alone, of which 1 is left.
  assert found.cells[0].seconds == pytest.approx(3 + 2 * 0.2)
  assert found.seconds(left=True) == pytest.approx(
      (3 + 2 * 0.2) / 2 + 4 * 3 + (40 + 30) * 0.2)
  text = text_of(found)
  assert "shared: 50.4M FLOPs of 504M, 10%" in text
  assert text.count("one step with 2 others") == 3


@pytest.mark.parametrize("name", ["quickstart", "quickstart_masked",
                                  "quickstart_seq2seq"])
def test_a_quickstart_takes_at_most_60_percent_of_its_runs_alone(
    name: str, tmp_path: pathlib.Path) -> None:
  experiment = config_lib.module(EXPERIMENTS / f"{name}.py")
  config = experiment.get_config()
  specs = sweep.plan(config, experiment.get_sweep(config))
  found = preview.look(specs, tmp_path)
  steps = {spec.budget.steps for spec in specs}
  # Budgets at even ratios from 1/16 to 1, of which a trunk has the last and
  # every other its decay of 20%.
  ratios = [16 ** -(place / 5) for place in range(6)]
  share = (1 + 0.2 * sum(ratios[1:])) / sum(ratios)
  assert min(steps) * 16 == max(steps) == 4096
  assert found.flops_left / found.flops_total == pytest.approx(share, abs=2e-3)
  assert share < 0.6
  config.sweep.share_trunk = False  # and alone they are the same runs
  assert [spec.run_id for spec in sweep.plan(
      config, experiment.get_sweep(config))] == [spec.run_id for spec in specs]


def test_who_finds_no_checkpoint_of_its_trunk_is_alone(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  config_lib.override(base, {
      "optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.2,
      "sweep.share_trunk": True})
  short, middle, long = specs = sweep.plan(
      base, sweep.axis("duration.steps", [10, 20, 40]))
  assert preview.look(specs, tmp_path).flops_left == (
      2 + 4 + 40) * STEP_FLOPS
  write_result(tmp_path, long.run_id, status="complete")
  (tmp_path / long.run_id / "checkpoints" / "8").mkdir(parents=True)
  found = preview.look(specs, tmp_path)
  assert [cell.shares for cell in found.cells] == [
      "off 3 at step 8", "alone", "trunk"]
  assert found.flops_left == (2 + 20) * STEP_FLOPS
  assert "alone: 1 run of those" in text_of(found)
  # Of its 20 steps the middle one has all to do, not the last 4 alone.
  (tmp_path / forecast.FILE).write_text(json.dumps(dict(runs=[
      dict(run_id=short.run_id, seconds=2.0),
      dict(run_id=middle.run_id, seconds=4.0),
      dict(run_id=long.run_id, seconds=40.0)])))
  found = preview.look(specs, tmp_path, workers=1)
  assert [cell.seconds for cell in found.cells] == pytest.approx([2, 20, 40])
  assert found.seconds(left=True) == pytest.approx(2 + 20)
  assert found.wall_seconds_left() == pytest.approx(2 + 20)
  # By the pace of others: 3 s, and 0.2 s for each step of its own.
  write_result(tmp_path, "other", **TAKEN)
  found = preview.look(specs, tmp_path, workers=1)
  assert [cell.seconds for cell in found.cells] == pytest.approx(
      [3 + 2 * 0.2, 3 + 20 * 0.2, 3 + 40 * 0.2])
  # Their records say what has become of it.
  write_result(tmp_path, short.run_id, status="complete", shared_flops=None)
  write_result(tmp_path, middle.run_id, status="complete",
               shared_flops=16.0 * STEP_FLOPS)
  found = preview.look(specs, tmp_path)
  assert [cell.shares for cell in found.cells] == [
      "alone", "off 3 at step 16", "trunk"]
  assert found.flops_shared == 16 * STEP_FLOPS and found.flops_left == 0
  assert "alone:" not in text_of(found)  # none is left that will be


def test_a_large_plan_is_shown_at_once(base: ml_collections.ConfigDict,
                                       tmp_path: pathlib.Path) -> None:
  specs = sweep.plan(base, sweep.product(
      sweep.axis("model.size", ["3k", "6k"]), sweep.axis("seed", range(50))))
  begun = time.process_time()
  found = preview.look(specs, tmp_path)
  assert time.process_time() - begun < 4
  assert len(found.cells) == 100
  assert text_of(found).count("pending") == 100
