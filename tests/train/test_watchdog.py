# SPDX-License-Identifier: Apache-2.0
"""A stalled step is reported, with where every process is."""

import json
import logging
import pathlib
import re
import time

import jax
import pytest

from tfjax.train import watchdog

STALL = 0.2


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
  return [record.getMessage() for record in caplog.records]


def wait_for(text: str, caplog: pytest.LogCaptureFixture) -> None:
  deadline = time.monotonic() + 60
  while not any(text in line for line in messages(caplog)):
    assert time.monotonic() < deadline, messages(caplog)
    time.sleep(0.01)


def stuck_in_here(caplog: pytest.LogCaptureFixture, text: str) -> None:
  wait_for(text, caplog)


def test_a_stall_is_reported_with_stacks_until_it_moves(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
  caplog.set_level(logging.INFO, "tfjax")
  stacks = tmp_path / "stalls" / "process-0.txt"
  with watchdog.Watchdog(tmp_path, STALL) as dog:
    dog.at("data", 7)
    stuck_in_here(caplog, "at step 7 in 'data'")
    assert "moves again" not in "".join(messages(caplog))
    text = stacks.read_text("utf-8")
    assert "at step 7 in 'data'" in text
    assert "stuck_in_here" in text
    state = json.loads((tmp_path / "stalls" / "process-0.json").read_bytes())
    assert (state["step"], state["phase"]) == (7, "data")
    assert 0 <= time.time() - state["since"] < 60
    while len(messages(caplog)) < 2:  # it says so again
      time.sleep(0.01)
    dog.at("step", 7)
    wait_for("moves again", caplog)
  assert stacks.read_text("utf-8").count("no progress") >= 2
  assert not (tmp_path / "stalls" / "process-0.json").exists()


def test_steps_on_time_are_not_stalls(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
  with watchdog.Watchdog(tmp_path, 0.8) as dog:
    begin, step = time.monotonic(), 0
    while time.monotonic() < begin + 5:  # it looks first after 3.2 seconds
      step += 1
      dog.at("data", step)
      time.sleep(0.02)
  assert messages(caplog) == []
  assert not (tmp_path / "stalls").exists()


def test_a_compilation_may_take_longer(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
  with watchdog.Watchdog(tmp_path, STALL) as dog:
    begin = time.monotonic()
    dog.at("compile", 0)
    wait_for("in 'compile'", caplog)
    assert time.monotonic() - begin >= 4 * STALL


def test_without_a_limit_nothing_is_watched(tmp_path: pathlib.Path) -> None:
  with watchdog.Watchdog(tmp_path, None) as dog:
    dog.at("step", 1)
  assert dog._thread is None  # pylint: disable=protected-access


def test_saying_where_it_is_costs_nothing(tmp_path: pathlib.Path) -> None:
  with watchdog.Watchdog(tmp_path, 60.0) as dog:
    best = float("inf")
    for _ in range(20):
      begin = time.perf_counter()
      for step in range(1000):
        dog.at("step", step)
      best = min(best, (time.perf_counter() - begin) / 1000)
  assert best < 2e-6


def test_process_0_names_the_ones_behind_first(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(jax, "process_count", lambda: 7)
  stalls = tmp_path / "stalls"
  stalls.mkdir()

  def elsewhere(index: int, step: int, phase: str, host: str) -> None:
    (stalls / f"process-{index}.json").write_text(json.dumps(dict(
        process=index, host=host, pid=1, step=step, phase=phase,
        since=time.time() - 100)), encoding="utf-8")

  with watchdog.Watchdog(tmp_path, STALL) as dog:
    dog.at("step", 9)
    for index in (1, 2, 4):
      elsewhere(index, 9, "step", f"host{index}")
    elsewhere(5, 8, "data", "host5")
    wait_for("where the 7 processes are", caplog)
  report = next(line for line in messages(caplog) if "where the 7" in line)
  _, silent, behind, waiting = report.splitlines()
  assert silent.startswith("  processes 3, 6: no word in")
  assert re.fullmatch(
      r"  step 8 in 'data' for 1\d\d s: process 5 on host5", behind)
  assert re.match(
      r"  step 9 in 'step' for 1\d\d s: processes 0-2, 4 on host1, ", waiting)


def test_a_directory_that_cannot_be_written_is_said(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
  (tmp_path / "stalls").write_text("a file", encoding="utf-8")
  with watchdog.Watchdog(tmp_path, STALL) as dog:
    dog.at("step", 1)
    wait_for("cannot write to", caplog)
