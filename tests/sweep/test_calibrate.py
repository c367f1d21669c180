# SPDX-License-Identifier: Apache-2.0
"""Hours from a short timing: how it is done, and what is made of it."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import calibrate
from tfjax.sweep import forecast as forecast_lib
from tfjax.sweep import timing
from tfjax.train import out_of_memory
from tfjax.train import tuning

TIMING = timing.Timing(
    compile_seconds=5.0, run_seconds=1.0, step_seconds=0.1, batch_seconds=0.5,
    batches=4, end_seconds=0.25)


def note(config: config_lib.ExperimentConfig, workdir: str, *,
         sweep: str, run_id: str) -> Any:
  """In place of `tfjax.sweep.timing.run`, as it is called, at once."""
  del sweep
  mesh = dict(data=1, fsdp=1, sequence=1, tensor=1)
  (pathlib.Path(workdir) / run_id / timing.FILE).write_text(json.dumps(
      dict(device_kind="cpu", mesh=mesh, available_bytes=None,
           timing=dataclasses.asdict(TIMING))))
  return timing._Done()  # pylint: disable=protected-access


def specs(base: Any, cells: list[dict[str, Any]],
          **changes: Any) -> list[sweep.RunSpec]:
  config_lib.override(base, {key.replace("__", "."): value
                             for key, value in changes.items()})
  return sweep.plan(base, cells, read_data=False)


def calibration(found: dict[str, timing.Timing], planned: list[Any],
                workers: int = 2) -> calibrate.Calibration:
  timed = {key: timing.Timed("cpu", dict(
      data=1, fsdp=1, sequence=1, tensor=1), None, one)
           for key, one in found.items()}
  flops = {calibrate.speed_key(spec.config):
           spec.budget.flops_total / spec.budget.steps for spec in planned}
  return calibrate.Calibration(workers, 3.0, timed,
                               {key: flops[key] for key in found}, 1.0)


@pytest.fixture
def base() -> Any:
  config = config_lib.default()
  config_lib.override(config, {
      "model.size": "3k", "model.context_length": 16, "train.batch_size": 8,
      "data.tokenizer.kind": "byte", "duration.steps": 10,
      "data.corpus": "synthetic", "data.synthetic.num_bytes": 20_000,
      "tracking.wandb": "disabled", "evaluation.tokens": 128})
  return config


def test_a_run_by_hand(base: Any) -> None:
  (spec,) = specs(base, [{}])
  # Start, steps, one evaluation, end.
  assert TIMING.run(spec.config, 10) == pytest.approx(1 + 1 + 2 + 0.25)
  (often,) = specs(base, [{}], evaluation__every_steps=3,
                   checkpoint__every_steps=5)
  # After steps 3, 6, 9 and 10; saved after 5 and 10.
  assert TIMING.run(often.config, 10) == pytest.approx(1 + 1 + 8 + 0.5)
  # After the last step there is one evaluation, not two.
  (twice,) = specs(base, [{}], evaluation__every_steps=5)
  assert TIMING.run(twice.config, 10) == pytest.approx(1 + 1 + 4 + 0.5)
  # 60 s are over twice before the end.
  assert TIMING.run(spec.config, 1250) == pytest.approx(
      1 + 125 + 2 + 3 * 0.25)


def test_runs_are_packed_as_the_launcher_does(base: Any) -> None:
  cells = sweep.product(sweep.axis("seed", [0, 1]),
                        sweep.axis("duration.steps", [10, 50, 100]))
  planned = specs(base, cells)
  key, = {calibrate.speed_key(spec.config) for spec in planned}
  found = calibration({key: TIMING}, planned)
  seconds, total = calibrate.pack(planned, found)
  # The longest first, each worker compiles once: 18.25 | 18.25 after 3 s of
  # start, then 8.25 each, then 4.25 each.
  assert seconds == pytest.approx([4.25, 8.25, 18.25] * 2)
  assert total == pytest.approx(3 + 18.25 + 8.25 + 4.25)


def test_another_optimizer_is_compiled_anew_and_as_fast(base: Any) -> None:
  planned = specs(base, sweep.chain(
      sweep.axis("optimizer.clip_norm", [None, 2.0]),
      sweep.axis("optimizer.learning_rate", [0.1, 0.2])))
  key, = {calibrate.speed_key(spec.config) for spec in planned}
  seconds, total = calibrate.pack(planned, calibration(
      {key: TIMING}, planned, workers=1))
  assert sorted(seconds) == pytest.approx([4.25, 4.25, 9.25, 9.25])
  assert total == pytest.approx(3 + 4 * 4.25 + 2 * 5)


def test_a_model_that_was_not_timed_is_scaled_from_the_nearest(
    base: Any) -> None:
  planned = specs(base, sweep.axis("model.size", ["3k", "25k", "98k"]))
  small, middle, large = planned
  found = calibration({
      calibrate.speed_key(small.config): TIMING,
      calibrate.speed_key(large.config): dataclasses.replace(
          TIMING, step_seconds=1.0)}, planned)
  ratio = middle.budget.flops_total / large.budget.flops_total
  got = found.timing(middle)
  assert got.step_seconds == pytest.approx(ratio)
  assert got.batch_seconds == pytest.approx(0.5 * ratio)
  assert got.run_seconds == TIMING.run_seconds
  assert found.timing(large).step_seconds == 1.0


def test_what_is_timed_together(base: Any) -> None:
  def keys(*cells: dict[str, Any]) -> int:
    return len({calibrate.speed_key(spec.config)
                for spec in specs(base, list(cells))})
  assert keys({"seed": 1}, {"duration.steps": 20},
              {"optimizer.weight_decay": 0.5}, {"data.unique_tokens": 1000},
              {"data.shuffle_seed": 3}) == 1
  assert keys({}, {"model.size": "6k"}, {"train.batch_size": 4},
              {"evaluation.tokens": 64}, {"model.remat": "full"}) == 5


@pytest.mark.slow
def test_real_steps_are_timed_by_the_sweep_s_workers(base: Any) -> None:
  planned = sweep.plan(base, sweep.product(
      sweep.axis("model.size", ["3k", "6k"]),
      sweep.axis("duration.steps", [10, 20])))
  found = calibrate.measure(planned, workers=2, most_seconds=300)
  assert found.workers == 2
  assert set(found.timed) == {calibrate.speed_key(spec.config)
                              for spec in planned}
  for one in found.timed.values():
    assert one.device_kind == "cpu"
    # 128 held-out tokens are 8 windows of 16: one batch.
    assert one.timing.batches == 1
    assert 0 < one.timing.step_seconds < 10
    assert one.timing.batch_seconds > 0 and one.timing.end_seconds > 0
  forecast = forecast_lib.here(planned, 2, found)
  assert forecast.seconds > 0
  assert forecast.seconds >= max(one.seconds for one in forecast.estimates)
  assert "2 of 2 models timed" in forecast.basis


@pytest.mark.parametrize("changes, cells", [
    ({"sweep.share_trunk": True, "optimizer.schedule": "wsd"},
     sweep.axis("duration.steps", [10, 20])),
    ({"sweep.halving": 2, "train.log_every_steps": 1},
     sweep.axis("optimizer.learning_rate", [0.1, 0.2, 0.3]))])
def test_what_is_timed_shares_no_work(
    base: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any],
    cells: list[dict[str, Any]]) -> None:
  """No trunk, and no rung that they would wait at."""
  monkeypatch.setattr(calibrate, "_RUNNER", "test_calibrate:note")
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
  config_lib.override(base, changes)
  planned = sweep.plan(base, cells)
  found = calibrate.measure(planned, workers=1)
  assert [found.timing(spec) for spec in planned] == [TIMING] * len(cells)


@pytest.mark.parametrize("workers, runs, needed, expected", [
    (None, 8, 1, 4), (None, 8, 2, 2), (None, 3, 1, 3), (2, 8, 1, 2),
    (6, 8, 1, 6), (0, 8, 1, 1)])
def test_so_many_runs_at_a_time_as_the_launcher_has(
    base: Any, monkeypatch: pytest.MonkeyPatch, workers: int | None, runs: int,
    needed: int, expected: int) -> None:
  monkeypatch.setattr(tuning, "has_accelerator", lambda: True)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
  planned = specs(base, sweep.axis("seed", range(runs)),
                  runtime__num_devices=needed)
  assert calibrate.num_workers(planned, workers) == expected
  assert forecast_lib.here(planned, workers).workers == expected


def test_memory_is_that_of_the_container(
    base: Any, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  limit = tmp_path / "memory.limit_in_bytes"  # as of cgroups of version 1
  limit.write_text("64000000\n")
  monkeypatch.setattr(out_of_memory, "_CGROUP_LIMITS", (str(limit),))
  planned = specs(base, [{"seed": 0}, {"seed": 1}], runtime__num_devices=1)
  one, _ = forecast_lib.here(planned, 2).estimates
  assert one.machine.available_bytes == 32_000_000


def test_a_model_that_cannot_be_trained_is_named(base: Any) -> None:
  planned = specs(base, [{"init_from": "/no/such/run"}])
  with pytest.raises(calibrate.CalibrationError, match="could not be timed"):
    calibrate.measure(planned, workers=1)


def test_the_file_that_a_report_reads(base: Any,
                                      tmp_path: pathlib.Path) -> None:
  planned = specs(base, sweep.axis("duration.steps", [10, 50]),
                  cost__hardware="h100", train__dtype="bfloat16")
  forecast = forecast_lib.assumed(planned, 1, 0.5, 2)
  forecast.write(tmp_path / "new")
  values = json.loads((tmp_path / "new" / "cost.json").read_text())
  assert values["hardware"] == "h100" and values["workers"] == 2
  assert "MFU 0.5" in values["basis"]
  runs, total = values["runs"], values["total"]
  assert [row["run_id"] for row in runs] == [one.run_id for one in planned]
  assert total["runs"] == 2
  assert total["flops"] == sum(row["flops"] for row in runs)
  assert total["price_usd"] == pytest.approx(
      sum(row["price_usd"] for row in runs))
  # Side by side: as long as the longer of the two.
  assert total["hours"] == pytest.approx(
      max(row["seconds"] for row in runs) / 3600)
  assert total["co2e_kg"] is None and runs[0]["co2e_kg"] is None


def test_runs_end_level() -> None:
  assert forecast_lib.makespan([3.0, 5.0, 4.0, 2.0], 2) == 7.0
  assert forecast_lib.makespan([3.0, None], 2) is None
