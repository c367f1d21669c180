# SPDX-License-Identifier: Apache-2.0
"""Sweeps whose workers are killed all the time, and that two launchers work off
at once, end with the same records as those that nobody disturbs.

The runs train in earnest; that a run is done twice would show in a file to
which each appends when it is complete.
"""

import collections
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any, Callable

import ml_collections
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax import train
from tfjax.train import lease
from tfjax.train import records

RUNNER = "test_torture:run"
COMPLETIONS = "completions.txt"


def run(config: config_lib.ExperimentConfig, workdir: str,
        **others: Any) -> records.RunRecord:
  """Trains, and tells of every result that it writes."""
  write = records.write_result

  def tell(run_dir: pathlib.Path, result: dict[str, Any]) -> None:
    write(run_dir, result)
    if result["status"] == "complete":
      with open(pathlib.Path(workdir) / COMPLETIONS, "a", encoding="utf-8"
                ) as file:
        file.write(f"{run_dir.name}\n")
  records.write_result = tell
  try:
    return train.run(config, workdir, **others)
  finally:
    records.write_result = write


@pytest.fixture(name="plan")
def plan_fixture(
    base: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int], list[sweep.RunSpec]]:
  """So many tiny runs, of one program each of two sizes."""
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))

  def make(count: int) -> list[sweep.RunSpec]:
    config_lib.override(base, {
        "checkpoint.every_steps": 4, "sweep.ensemble": "off",
        "evaluation.tokens": 256, "train.log_every_steps": 1,
        "tracking.wandb": "disabled", "runtime.num_devices": 1,
        "runtime.compilation_cache_dir": os.environ[
            "JAX_COMPILATION_CACHE_DIR"]})
    return sweep.plan(base, [
        {"seed": seed, "duration.steps": steps}
        for seed in range(count // 2) for steps in (12, 16)])
  return make


class Killer(threading.Thread):
  """Kills a process that is at a run, every so many seconds; on a machine that
  is so busy that nothing gets done meanwhile, once something is."""

  def __init__(self, workdir: pathlib.Path, specs: list[sweep.RunSpec],
               seconds: float):
    super().__init__(daemon=True)
    self.kills = 0
    self.idle = 0  # times that nothing was done meanwhile
    self._workdir, self._seconds = workdir, seconds
    self._run_ids = [spec.run_id for spec in specs]
    self._choose = random.Random(0)
    self._closed = threading.Event()

  def __enter__(self) -> "Killer":
    self.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
    self.join()

  def run(self) -> None:
    done = 0
    while not self._closed.wait(self._seconds):
      before, done = done, completions(self._workdir)
      if done == before:
        self.idle += 1
        continue
      # Runs are so short that there are moments without one.
      while not (at_work := self._at_work()) and not self._closed.is_set():
        time.sleep(0.01)
      if at_work:
        os.kill(self._choose.choice(at_work), signal.SIGKILL)
        self.kills += 1

  def _at_work(self) -> list[int]:
    return sorted({
        holder.pid for run_id in self._run_ids
        if (holder := lease.holder(self._workdir / run_id)) is not None
        and holder.pid != os.getpid()})


def completions(workdir: pathlib.Path) -> int:
  path = workdir / COMPLETIONS
  return len(path.read_text().split()) if path.exists() else 0


def results(workdir: pathlib.Path, specs: list[sweep.RunSpec]) -> list[tuple]:
  """What is right or wrong in the records, and never differs."""
  found = []
  for spec in specs:
    result = records.read_result(workdir / spec.run_id)
    assert result is not None, f"{spec.run_id} is lost"
    rows = [{name: value for name, value in row.items()
             if name not in records.MEASURED} for row in
            records.read_metrics(workdir / spec.run_id / "metrics.jsonl")]
    found.append((result["status"], result["steps"], result["loss"],
                  result["train_loss"], result["config_hash"], rows))
  return found


def assert_right(workdir: pathlib.Path, specs: list[sweep.RunSpec],
                 undisturbed: pathlib.Path,
                 some: list[sweep.RunSpec]) -> None:
  """All are complete, once; and some are as they are elsewhere, undisturbed."""
  assert results(workdir, some) == results(undisturbed, some)
  found = results(workdir, specs)
  assert {one[0] for one in found} == {"complete"}
  assert [one[1] for one in found] == [spec.budget.steps for spec in specs]
  assert len({one[2] for one in found}) == len(specs)  # losses, of each its own
  done = collections.Counter((workdir / COMPLETIONS).read_text().split())
  # A process may be killed between its record and its word of it.
  assert max(done.values()) == 1
  assert len(done) >= min(0.95 * len(specs), len(specs) - 1)
  assert not any(lease.holder(workdir / spec.run_id) for spec in specs)


def tortured(specs: list[sweep.RunSpec], workdir: pathlib.Path,
             workers: int, seconds: float) -> None:
  """Runs them while every so many seconds a worker is killed."""
  begin = time.monotonic()
  with Killer(workdir, specs, seconds) as killer:
    outcomes = sweep.launch(specs, workdir, workers=workers, runner=RUNNER)
  times = (time.monotonic() - begin) / seconds
  assert [one.state.status for one in outcomes] == ["complete"] * len(specs)
  assert killer.kills >= max(3, (times - killer.idle) / 2)


def test_a_kill_a_second(plan: Callable, tmp_path: pathlib.Path) -> None:
  specs = plan(12)
  sweep.launch(specs, tmp_path / "whole", workers=3, runner=RUNNER)
  tortured(specs, tmp_path / "killed", workers=3, seconds=1.0)
  assert_right(tmp_path / "killed", specs, tmp_path / "whole", specs)


@pytest.mark.slow
def test_200_runs_of_8_workers_of_which_one_is_killed_every_5_seconds(
    plan: Callable, tmp_path: pathlib.Path) -> None:
  specs = plan(200)
  some = specs[::10]
  sweep.launch(some, tmp_path / "whole", workers=8, runner=RUNNER)
  tortured(specs, tmp_path / "killed", workers=8, seconds=5.0)
  assert_right(tmp_path / "killed", specs, tmp_path / "whole", some)


LAUNCHER = textwrap.dedent("""
    import sys
    from tfjax import sweep
    specs = sweep.ledger.read_specs(sys.argv[1])
    outcomes = sweep.launch(specs, sys.argv[1], workers=2, planned=True,
                            runner="test_torture:run")
    print(*(one.state.status for one in outcomes))
    """)


def test_two_launchers_at_once_of_which_one_is_killed(
    plan: Callable, tmp_path: pathlib.Path) -> None:
  """What one has done the other does not do again, and what a dead one was at
  the other takes up."""
  specs = plan(12)
  sweep.launch(specs, tmp_path / "whole", workers=2, runner=RUNNER)
  workdir = tmp_path / "two"
  workdir.mkdir()
  sweep.ledger.write_plan(workdir, "two", specs)
  first, second = (subprocess.Popen(
      [sys.executable, "-c", LAUNCHER, str(workdir)],
      stdout=subprocess.PIPE, text=True) for _ in range(2))
  deadline = time.monotonic() + 200
  while completions(workdir) < 4:
    assert time.monotonic() < deadline and second.poll() is None
    time.sleep(0.1)
  second.kill()
  second.communicate()
  said, _ = first.communicate(timeout=200)
  assert said.split() == ["complete"] * len(specs)
  assert_right(workdir, specs, tmp_path / "whole", specs)
