# SPDX-License-Identifier: Apache-2.0
"""What a terminal, and what a file, is told of a sweep."""

import contextlib
import io
import os
import pathlib
import pty
import re
from typing import Any, Callable

import ml_collections
import pytest
from rich import console as console_lib

from tfjax import sweep
from tfjax.sweep import display as display_lib
from tfjax.sweep import ledger
from tfjax.train import lease

WriteRun = Callable[..., pathlib.Path]


@pytest.fixture(name="specs")
def specs_fixture(base: ml_collections.ConfigDict,
                  tmp_path: pathlib.Path) -> list[sweep.RunSpec]:
  """Twelve runs of 10 steps, planned."""
  specs = sweep.plan(base, sweep.axis("seed", list(range(12))))
  ledger.write_plan(tmp_path, "some", specs)
  return specs


def _console(**options: Any) -> console_lib.Console:
  return console_lib.Console(file=io.StringIO(), **options)


def _outcome(spec: sweep.RunSpec, workdir: pathlib.Path,
             skipped: bool = False) -> sweep.Outcome:
  return sweep.Outcome(spec, ledger.run_state(workdir, spec.run_id), skipped)


def _drawn(display: display_lib.Live, width: int, height: int) -> list[str]:
  console = _console(width=width, height=height, force_terminal=True,
                     color_system=None)
  display.console = console
  console.print(display.render())
  return console.file.getvalue().splitlines()


def test_a_file_gets_a_line_an_event(
    specs: list[sweep.RunSpec], write_run: WriteRun,
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("FORCE_COLOR", "1")  # as many CI systems do
  console = _console(width=200)
  display = display_lib.make(console, specs, str(tmp_path))
  assert isinstance(display, display_lib.Plain)
  write_run(specs[0], "complete", 10)
  display.ended(_outcome(specs[0], tmp_path, skipped=True))
  display.launched(specs[1:], 2)
  display.started(specs[1])
  write_run(specs[1], "failed", 4, status_reason="no luck\nat length")
  display.ended(_outcome(specs[1], tmp_path))
  display.started(specs[2])
  display.put_back(specs[2], "waits for others")
  display.tick()  # too early for a total
  display._shown = -float("inf")
  display.tick()
  lines = [re.sub("\033.*?m", "", line)
           for line in console.file.getvalue().splitlines()]
  assert all(re.match(r"\[\d+:\d\d\] ", line) for line in lines)
  lines = [line.partition("] ")[2] for line in lines]
  size = display_lib.labels(specs)[specs[1].run_id]
  assert size.endswith(" seed=1")
  assert lines[:3] == [
      "11 of 12 runs to do, 1 done before; 2 workers",
      f"start    {size}  {specs[1].run_id}",
      f"failed   {size}  no luck"]
  assert lines[3].endswith(f"{specs[1].run_id}/log.txt")
  assert lines[4].endswith(f"sweep.py retry --workdir={tmp_path}")
  assert lines[6].startswith("put back ") and "waits for others" in lines[6]
  assert lines[7].startswith("total    8% of ")  # one of twelve
  assert lines[7].endswith(
      "ETA unknown; 1 complete, 1 failed, 10 waiting")
  assert len(lines) == 8


@pytest.mark.parametrize("width, height", [(80, 24), (120, 40), (60, 12)])
def test_the_screen_is_never_too_small(
    specs: list[sweep.RunSpec], write_run: WriteRun, tmp_path: pathlib.Path,
    width: int, height: int) -> None:
  display = display_lib.Live(_console(), specs, str(tmp_path))
  display.watch.refresh()
  display._workers = 6
  for spec in specs[:3]:
    write_run(spec, "complete", 10)
    display.started(spec)
    display.ended(_outcome(spec, tmp_path))
  write_run(specs[3], "failed", 4, status_reason="no luck, " * 50)
  display.ended(_outcome(specs[3], tmp_path))
  with contextlib.ExitStack() as held:
    for spec in specs[4:]:
      held.enter_context(lease.hold(write_run(spec, "running", 5)))
      if spec is not specs[-1]:
        display.started(spec)
    display.watch.refresh()
    lines = _drawn(display, width, height)
  # The cursor stays in the line below, and nothing scrolls.
  assert len(lines) < height and max(map(len, lines)) <= width
  text = "\n".join(lines)
  assert "58% of" in text  # 3 x 10 + 8 x 5 of 120 steps
  assert "8 running (1 elsewhere)" in " ".join(text.split())
  assert "no luck" in text
  command = "".join(line.strip() for line in lines[-4:])
  assert f"--workdir={tmp_path}" in command  # whole, over several lines
  shown = [line for line in lines if "5/10" in line]
  if len(shown) < 8:
    assert f"and {8 - len(shown)} more" in text
  else:
    assert "on " in shown[-1] and shown[-1].startswith("7.94k × 1.28k seed=11")


def test_states_come_from_the_files_whoever_wrote_them(
    specs: list[sweep.RunSpec], write_run: WriteRun,
    tmp_path: pathlib.Path) -> None:
  display = display_lib.Live(_console(), specs[:4], str(tmp_path))
  display.watch.refresh()
  write_run(specs[0], "stopped", 5, status_reason="hopeless")
  write_run(specs[1], "diverged", 5)
  write_run(specs[5], "complete", 10)  # of another sweep in the directory
  (write_run(specs[2], "failed", 1) / "result.json").write_text("{")
  display.watch.refresh()
  assert display.counts() == (
      "1 stopped, 1 diverged, 1 damaged, 1 waiting")
  assert display.progress().startswith("50% of ")
  display.ended(_outcome(specs[0], tmp_path))
  assert display.outcomes == []  # it had ended before the launch


def test_a_screen_is_told_from_all_else(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  leader, follower = pty.openpty()
  with os.fdopen(leader, "rb"), os.fdopen(follower, "w") as screen:
    def kind(**environment: str) -> type:
      for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
      for name, value in environment.items():
        monkeypatch.setenv(name, value)
      return type(display_lib.make(
          console_lib.Console(file=screen), specs, str(tmp_path)))
    assert kind(TERM="xterm") is display_lib.Live
    assert kind(TERM="xterm", NO_COLOR="1") is display_lib.Live
    assert kind(TERM="dumb") is display_lib.Plain
  monkeypatch.setenv("TERM", "xterm")
  assert isinstance(display_lib.make(_console(), specs, str(tmp_path)),
                    display_lib.Plain)


def test_labels_say_what_differs(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  specs = sweep.plan(base, sweep.chain(
      [{"duration.steps": 20}],
      sweep.product(sweep.axis("optimizer.learning_rate", [1e-3, 2e-3]),
                    [{"duration.steps": 10}])))
  found = display_lib.labels(specs)
  assert list(found.values()) == [
      "7.94k × 2.56k", "7.94k × 1.28k learning_rate=0.001",
      "7.94k × 1.28k learning_rate=0.002"]
  ledger.write_plan(tmp_path, "some", specs)
  assert display_lib.row_labels(ledger.read_plan(tmp_path)["runs"]) == found


@pytest.mark.parametrize("value, text", [
    (None, "-"), (0.0, "0%"), (0.999, "99%"), (1.0, "100%"), (0.29, "29%")])
def test_all_is_not_said_before_it_is(value: float | None, text: str) -> None:
  assert display_lib.percent(value) == text


@pytest.mark.parametrize("value, text", [
    (None, "-"), (0, "0"), (999.6, "1k"), (1234567, "1.23M"), (2e15, "2P")])
def test_amounts(value: float | None, text: str) -> None:
  assert display_lib.si(value) == text
