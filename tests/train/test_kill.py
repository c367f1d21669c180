# SPDX-License-Identifier: Apache-2.0
"""A run killed at any moment, and often, ends as if it had not been; so does
one whose newest checkpoint is damaged meanwhile, and one that begins at a step
of another."""

import json
import multiprocessing
import os
import pathlib
import random
import time
from typing import Any, Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tfjax import config as config_lib
from tfjax import train
from tfjax.train import records

STEPS, EVERY = 150, 5
# What is killed does not import all over again: a server has, and forks.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tfjax.train", __name__])


def run(config: pathlib.Path, workdir: pathlib.Path,
        options: dict[str, Any]) -> None:
  """In the process that is killed. Rows come slowly, most so before the first
  checkpoint, so that a kill finds its moment on a busy machine too."""
  with open(workdir / "log", "a", encoding="utf-8") as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
  values = json.loads(config.read_text("utf-8"))
  train.run(config_lib.from_dict(values), workdir, **options,
            on_row=lambda row: time.sleep(
                0.1 if row["step"] < EVERY else 0.02))


def start(config: pathlib.Path, workdir: pathlib.Path, run_id: str = "run",
          **options: Any) -> multiprocessing.process.BaseProcess:
  workdir.mkdir(exist_ok=True)
  process = FORKS.Process(target=run, args=(
      config, workdir, dict(run_id=run_id, **options)))
  process.start()
  return process


def finish(process: multiprocessing.process.BaseProcess,
           workdir: pathlib.Path) -> None:
  process.join(timeout=300)
  assert process.exitcode == 0, (workdir / "log").read_text("utf-8")[-3000:]


def steps_on_file(run_dir: pathlib.Path) -> int:
  path = run_dir / "metrics.jsonl"
  found = records.read_metrics(path) if path.exists() else []
  return max((row["step"] for row in found), default=0)


def saved(run_dir: pathlib.Path) -> list[int]:
  return [int(path.name) for path in (run_dir / "checkpoints").glob("*")
          if path.name.isdigit()]


def unfinished(run_dir: pathlib.Path, holding: str = "") -> bool:
  """Whether there is a checkpoint, with this file, that is not whole yet."""
  return any((run_dir / "checkpoints").glob(f"*tmp*/{holding}"))


def kill_when(ready: Callable[[], bool], delay: float,
              process: multiprocessing.process.BaseProcess,
              workdir: pathlib.Path) -> None:
  """SIGKILL, `delay` after `ready` first holds."""
  deadline = time.monotonic() + 300
  while not ready():
    assert process.is_alive(), (workdir / "log").read_text("utf-8")[-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.0005)
  time.sleep(delay)
  process.kill()
  process.join()
  assert process.exitcode == -9, "the run ended before it could be killed"


def damage_newest(run_dir: pathlib.Path) -> None:
  """Turns over a bit of the arrays in the newest checkpoint."""
  checkpoint = run_dir / "checkpoints" / str(max(saved(run_dir)))
  path = max((path for path in (checkpoint / "state").rglob("*")
              if path.is_file()), key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  return [{k: v for k, v in row.items() if k not in records.MEASURED}
          for row in records.read_metrics(run_dir / "metrics.jsonl")]


def final_state(run_dir: pathlib.Path, steps: int = STEPS
                ) -> dict[str, np.ndarray]:
  with ocp.CheckpointManager(run_dir / "checkpoints") as manager:
    assert manager.latest_step() == steps
    restored = manager.restore(steps, args=ocp.args.Composite(
        state=ocp.args.StandardRestore()))
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in
          jax.tree_util.tree_leaves_with_path(restored.state)}


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_bit_by_bit_like_one_that_was_not(
    make_config, tmp_path: pathlib.Path) -> None:
  config = tmp_path / "config.json"
  config.write_text(json.dumps(config_lib.to_dict(make_config({
      "duration.steps": STEPS, "checkpoint.every_steps": EVERY,
      "evaluation.every_steps": 10}))), encoding="utf-8")
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  run_dir = killed / "run"
  choose = random.Random(0)
  finish(start(config, whole), whole)

  def moment(kind: str) -> tuple[Callable[[], bool], float]:
    done = steps_on_file(run_dir)
    if kind == "save":  # from the directory's creation to its rename
      return lambda: unfinished(run_dir), choose.uniform(0, 0.05)
    if kind == "manifest":  # written, and not yet renamed
      return lambda: unfinished(run_dir, "manifest.json"), 0.0
    if kind == "start":  # while it starts, restores, takes the first steps
      return lambda: True, choose.uniform(0, 1.5)
    step = done + choose.randrange(1, 10)
    return lambda: steps_on_file(run_dir) >= step, choose.uniform(0, 0.03)

  # Before the first checkpoint is whole.
  kill_when(lambda: steps_on_file(run_dir) >= 2, 0.0,
            start(config, killed), killed)
  assert not saved(run_dir) and steps_on_file(run_dir) < EVERY
  moments = ["save"] * 7 + ["manifest"] * 2 + ["step"] * 7 + ["start"] * 3
  choose.shuffle(moments)
  during_saves, damaged, reached = 0, 0, set()
  for number, kind in enumerate(moments):
    if number % 6 == 5 and len(saved(run_dir)) == 2:
      damage_newest(run_dir)
      damaged += 1
    kill_when(*moment(kind), start(config, killed), killed)
    assert records.read_result(run_dir) is None
    during_saves += unfinished(run_dir)
    reached.add(max(saved(run_dir), default=0))
  assert during_saves >= 4 and len(reached) >= 5
  finish(start(config, killed), killed)

  record = records.read_result(run_dir)
  # A resume counts once a checkpoint of it is kept, and each damaged one takes
  # its own with it: how many are left hangs on the moments of the kills.
  assert record["status"] == "complete"
  assert record["resumes"] >= max(1, len(reached) - 1 - damaged)
  assert not unfinished(run_dir)
  set_aside = list((run_dir / "checkpoints" / "damaged").iterdir())
  assert damaged >= 2 and len(set_aside) == damaged
  log = (killed / "log").read_text("utf-8")
  assert log.count("does not have its checksum) and now lies in") == damaged
  reference = records.read_result(whole / "run")
  assert reference["resumes"] == 0
  for name in ("loss", "loss_stderr", "bits_per_byte", "train_loss",
               "tokens_seen", "flops_total", "steps"):
    assert record[name] == reference[name], name
  assert rows(run_dir) == rows(whole / "run")
  # Spent though lost, and in what the rows say is spent.
  assert reference["lost_seconds"] == 0 < record["lost_seconds"]
  assert record["wall_seconds"] > (
      reference["step_seconds"] + record["lost_seconds"])
  taken = [row["device_seconds"] for row in records.read_metrics(
      run_dir / "metrics.jsonl")]
  assert taken == sorted(taken)
  assert taken[-1] < record["occupied_device_seconds"]
  state, expected = final_state(run_dir), final_state(whole / "run")
  assert state.keys() == expected.keys() and len(state) > 20
  for name, leaf in state.items():
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.slow
def test_a_trunk_and_its_branch_killed_again_and_again_end_as_if_alone(
    make_config, tmp_path: pathlib.Path) -> None:
  """Both go the same 32 steps; of 40 and of 60 the rest is decay."""
  paths = {}
  for name, steps in (("branch", 40), ("trunk", 60)):
    paths[name] = tmp_path / f"{name}.json"
    paths[name].write_text(json.dumps(config_lib.to_dict(make_config({
        "duration.steps": steps, "checkpoint.every_steps": EVERY,
        "optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.2,
        "optimizer.warmup_steps": 4}))), encoding="utf-8")
  alone, killed = tmp_path / "alone", tmp_path / "killed"
  finish(start(paths["branch"], alone, "branch"), alone)

  options = {"trunk": dict(keep_steps=[32]),
             "branch": dict(branch=dict(run_id="trunk", step=32))}

  def go(name: str) -> multiprocessing.process.BaseProcess:
    return start(paths[name], killed, name, **options[name])
  trunk, branch = killed / "trunk", killed / "branch"
  # While it saves what the branch begins with, then after that.
  kill_when(lambda: any((trunk / "checkpoints").glob("32.*tmp*")), 0.0,
            go("trunk"), killed)
  assert max(saved(trunk)) < 32 or 32 in saved(trunk)
  kill_when(lambda: steps_on_file(trunk) >= 43, 0.0, go("trunk"), killed)
  assert 32 in saved(trunk) and not records.read_result(trunk)
  # The branch: while it copies rows, with rows and no checkpoint, while it
  # saves its first, and while it starts.
  kill_when(lambda: 0 < steps_on_file(branch) < 30, 0.0, go("branch"), killed)
  kill_when(lambda: steps_on_file(branch) >= 33, 0.0, go("branch"), killed)
  assert not saved(branch)
  kill_when(lambda: unfinished(branch), 0.0, go("branch"), killed)
  kill_when(lambda: True, 0.8, go("branch"), killed)
  finish(go("branch"), killed)
  finish(go("trunk"), killed)

  record = records.read_result(branch)
  reference = records.read_result(alone / "branch")
  assert (record["branched_from"], record["branch_step"]) == ("trunk", 32)
  for name in ("status", "loss", "train_loss", "tokens_seen", "flops_total"):
    assert record[name] == reference[name], name
  found = [{k: v for k, v in row.items() if k != "shared"}
           for row in rows(branch)]
  assert found == rows(alone / "branch")
  assert record["lost_seconds"] > 0
  assert record["occupied_device_seconds"] > record["lost_seconds"]
  state, expected = (final_state(directory, 40)
                     for directory in (branch, alone / "branch"))
  assert state.keys() == expected.keys() and len(state) > 20
  for name, leaf in state.items():
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
  assert records.read_result(trunk)["status"] == "complete"
