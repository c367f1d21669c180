# SPDX-License-Identifier: Apache-2.0
"""The state of a sweep as its directory tells it."""

import contextlib
import json
import pathlib
import subprocess
import sys
import threading
import time
from typing import Iterator

import ml_collections
import pytest

from tfjax import sweep
from tfjax.sweep import ledger
from tfjax.train import lease
from tfjax.train import records

RUN = "run-1"


def _metrics(workdir: pathlib.Path, *rows: dict, tail: str = "") -> None:
  (workdir / RUN).mkdir(exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows) + tail
  (workdir / RUN / "metrics.jsonl").write_text(text)


def _train(step: int) -> dict:
  return dict(kind="train", step=step, loss=9.0 - step,
              tokens_per_second=100.0 * step)


def test_pending_until_something_has_begun(tmp_path: pathlib.Path) -> None:
  assert ledger.run_state(tmp_path, RUN) == ledger.RunState(RUN, "pending")


HOLDER = """
import sys, time
from tfjax.train import lease
with lease.hold(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


@contextlib.contextmanager
def _at_work(workdir: pathlib.Path) -> Iterator[None]:
  """A process that holds the run's claim, and that is killed at the end."""
  with subprocess.Popen([sys.executable, "-c", HOLDER, workdir / RUN],
                        stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b"held\n"
    try:
      yield
    finally:
      process.kill()


def test_running_while_its_process_lives(tmp_path: pathlib.Path) -> None:
  _metrics(tmp_path, _train(1), _train(2))
  (tmp_path / RUN / "config.json").write_text("{}")
  with _at_work(tmp_path):
    state = ledger.run_state(tmp_path, RUN)
    assert (state.status, state.step, state.loss, state.tokens_per_second) == (
        "running", 2, 7.0, 200.0)
  state = ledger.run_state(tmp_path, RUN)
  assert (state.status, state.step) == ("interrupted", 2)


def test_an_old_result_does_not_hide_a_new_attempt(
    tmp_path: pathlib.Path) -> None:
  _metrics(tmp_path, _train(1))
  records.write_result(tmp_path / RUN, dict(
      status="failed", status_reason="out of memory", loss=None))
  with _at_work(tmp_path):
    assert ledger.run_state(tmp_path, RUN).status == "running"
  state = ledger.run_state(tmp_path, RUN)
  assert (state.status, state.reason) == ("failed", "out of memory")
  assert (state.step, state.loss) == (1, None)


@pytest.mark.parametrize("tail", [
    '{"kind": "train", "step": 3', '{"kind": "train", "step": 3}', '{"k'])
def test_half_a_row_is_not_read(tmp_path: pathlib.Path, tail: str) -> None:
  _metrics(tmp_path, _train(1), _train(2), tail=tail)
  assert ledger.progress(tmp_path, RUN).step == 2


def test_rows_of_another_kind_and_long_files(tmp_path: pathlib.Path) -> None:
  rows = [_train(step) for step in range(3000)]  # longer than the tail read
  _metrics(tmp_path, *rows, dict(kind="evaluation", step=2999, loss=1.0))
  assert ledger.progress(tmp_path, RUN).step == 2999
  path = tmp_path / RUN / "metrics.jsonl"
  assert ledger.last_row(path, "evaluation")["loss"] == 1.0
  assert ledger.last_row(path, "no such kind") is None


@pytest.mark.parametrize("status", ["complete", "diverged", "interrupted"])
def test_the_result_tells_how_it_ended(tmp_path: pathlib.Path,
                                       status: str) -> None:
  _metrics(tmp_path, _train(1))
  result = dict(status=status, status_reason=None, config_hash="abc", loss=2.5)
  records.write_result(tmp_path / RUN, result)
  state = ledger.run_state(tmp_path, RUN)
  assert (state.status, state.loss, state.result["loss"]) == (status, 2.5, 2.5)
  finished = status != "interrupted"
  assert ledger.is_finished(tmp_path / RUN, "abc") == finished
  assert not ledger.is_finished(tmp_path / RUN, "def")


def test_no_plan_is_said(tmp_path: pathlib.Path) -> None:
  with pytest.raises(FileNotFoundError, match="no sweep was launched"):
    ledger.sweep_state(tmp_path)
  with pytest.raises(FileNotFoundError, match="no sweep was launched"):
    ledger.ask(tmp_path, ["run-1"])


def _plan(base: ml_collections.ConfigDict,
          *seeds: int) -> list[sweep.RunSpec]:
  return sweep.plan(base, [
      {"seed": seed, "tracking.tags": ("a", f"s{seed}")} for seed in seeds])


def test_specs_come_back_as_they_were_planned(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  """Without the experiment file."""
  specs = _plan(base, 0, 1, 2)
  ledger.write_plan(tmp_path, "one", specs)
  found = ledger.read_specs(tmp_path)
  assert [(one.run_id, one.config, one.budget) for one in found] == [
      (one.run_id, one.config, one.budget) for one in specs]
  assert [one.overrides["seed"] for one in found] == [0, 1, 2]
  row = ledger.read_plan(tmp_path)["runs"][1]
  # What all have in common is there once.
  assert row["config"] == {"seed": 1, "tracking.tags": ["a", "s1"]}
  assert row["flops_total"] == specs[1].budget.flops_total


def test_several_sweeps_share_a_directory_and_their_runs(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture) -> None:
  ids = [spec.run_id for spec in _plan(base, 0, 1, 2, 3)]
  ledger.write_plan(tmp_path, "one", _plan(base, 0, 1))
  ledger.write_plan(tmp_path, "two", _plan(base, 1, 2))
  plan = ledger.read_plan(tmp_path)
  assert plan["sweep"] == "two"
  assert plan["sweeps"] == {"one": ids[:2], "two": ids[1:3]}
  assert [row["run_id"] for row in plan["runs"]] == ids[:3]
  assert [one.run_id for one in ledger.read_specs(tmp_path, "one")] == ids[:2]
  assert ledger.read_plan(tmp_path, "one")["sweep"] == "one"
  assert len(ledger.sweep_state(tmp_path, "two")) == 2
  # Launched again, a sweep has what it is now, and comes last.
  assert not caplog.messages
  ledger.write_plan(tmp_path, "one", _plan(base, 3))
  said, = caplog.messages
  assert said.startswith("1 unfinished runs") and said.endswith(ids[0])
  plan = ledger.read_plan(tmp_path)
  assert list(plan["sweeps"].items()) == [("two", ids[1:3]), ("one", ids[3:])]
  assert [one.config.seed for one in ledger.read_specs(tmp_path)] == [1, 2, 3]
  with pytest.raises(FileNotFoundError, match="no sweep 'three'.*'two', 'one'"):
    ledger.read_specs(tmp_path, "three")


def test_a_run_is_asked_for_by_the_file_system_s_clock(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  def asked() -> list[float]:
    return [row["asked_at"] for row in ledger.read_plan(tmp_path)["runs"]]
  specs = _plan(base, 0, 1)
  ledger.write_plan(tmp_path, "one", specs)
  first = asked()
  assert first[0] == first[1]
  marker = tmp_path / "marker"
  time.sleep(0.02)  # the kernel's clock for files goes by ticks
  marker.touch()
  ledger.ask(tmp_path, [specs[1].run_id])
  assert asked()[0] == first[0]
  assert asked()[1] >= marker.stat().st_mtime > first[1]
  assert ledger.read_specs(tmp_path)[0].config == specs[0].config


def test_many_write_the_plan_at_once(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  specs = _plan(base, *range(6))
  threads = [threading.Thread(target=ledger.write_plan, args=(
      tmp_path, f"sweep-{spec.config.seed}", [spec])) for spec in specs]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert {one.run_id for one in ledger.read_specs(tmp_path)} == {
      one.run_id for one in specs}


def test_a_damaged_plan_is_named(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  (tmp_path / "sweep.json").write_text("[]")
  with pytest.raises(records.RecordError, match="sweep.json is damaged"):
    ledger.write_plan(tmp_path, "one", _plan(base, 0))


def test_200_states_are_read_in_no_time(tmp_path: pathlib.Path) -> None:
  rows = "".join(json.dumps(_train(step)) + "\n" for step in range(500))
  for index in range(200):
    run_dir = tmp_path / f"run-{index}"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text(rows)
    (run_dir / "config.json").write_text("{}")
    with lease.hold(run_dir):
      pass
    if index % 2:
      records.write_result(run_dir, dict(status="complete", steps=500))
  begun = time.process_time()
  states = [ledger.run_state(tmp_path, f"run-{i}") for i in range(200)]
  assert time.process_time() - begun < 1  # 0.03 s as a rule
  assert [one.status for one in states] == ["interrupted", "complete"] * 100
