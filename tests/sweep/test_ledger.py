# SPDX-License-Identifier: Apache-2.0
"""The state of a sweep as its directory tells it."""

import contextlib
import json
import pathlib
import subprocess
import sys
from typing import Iterator

import pytest

from tfjax.sweep import ledger
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
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
  fcntl.flock(file, fcntl.LOCK_EX)
  print("held", flush=True)
  time.sleep(60)
"""


@contextlib.contextmanager
def _at_work(workdir: pathlib.Path) -> Iterator[None]:
  """A process that holds the run's lock, and that is killed at the end."""
  lock = workdir / RUN / ".lock"
  with subprocess.Popen([sys.executable, "-c", HOLDER, lock],
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
