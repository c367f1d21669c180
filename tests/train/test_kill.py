# SPDX-License-Identifier: Apache-2.0
"""A run killed at any moment ends as if it had not been."""

import json
import pathlib
import random
import subprocess
import sys
import time
from typing import Any, Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tfjax import config as config_lib
from tfjax.train import records

STEPS, EVERY = 60, 7
# Rows come slowly, most so before the first checkpoint, so that a kill finds
# its moment on a busy machine too.
PROGRAM = """
import json, sys, time
from tfjax import config, train
values = json.load(open(sys.argv[1], encoding="utf-8"))
train.run(config.from_dict(values), sys.argv[2], run_id="run",
          on_row=lambda row: time.sleep(0.1 if row["step"] < 7 else 0.02))
"""


def start(config: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
  workdir.mkdir(exist_ok=True)
  with open(workdir / "log", "a", encoding="utf-8") as log:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(config), str(workdir)],
        stdout=log, stderr=log)


def finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
  code = process.wait(timeout=300)
  assert code == 0, (workdir / "log").read_text("utf-8")[-3000:]


def steps_on_file(run_dir: pathlib.Path) -> int:
  path = run_dir / "metrics.jsonl"
  found = records.read_metrics(path) if path.exists() else []
  return max((row["step"] for row in found), default=0)


def saved(run_dir: pathlib.Path) -> list[str]:
  directory = run_dir / "checkpoints"
  return [p.name for p in directory.iterdir()] if directory.exists() else []


def unfinished(run_dir: pathlib.Path) -> bool:
  """Whether there is a checkpoint that is not whole yet."""
  return any("tmp" in name for name in saved(run_dir))


def kill_when(ready: Callable[[], bool], process: subprocess.Popen,
              delay: float) -> None:
  """SIGKILL, `delay` after `ready` first holds."""
  deadline = time.monotonic() + 300
  while not ready():
    assert process.poll() is None, "the run ended before it could be killed"
    assert time.monotonic() < deadline
    time.sleep(0.001)
  time.sleep(delay)
  process.kill()
  assert process.wait() == -9


def rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  return [{k: v for k, v in row.items()
           if k not in ("seconds", "tokens_per_second")}
          for row in records.read_metrics(run_dir / "metrics.jsonl")]


def final_state(run_dir: pathlib.Path) -> dict[str, np.ndarray]:
  with ocp.CheckpointManager(run_dir / "checkpoints") as manager:
    assert manager.latest_step() == STEPS
    restored = manager.restore(STEPS, args=ocp.args.Composite(
        state=ocp.args.StandardRestore()))
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in
          jax.tree_util.tree_leaves_with_path(restored.state)}


@pytest.mark.slow
def test_a_killed_run_ends_bit_by_bit_like_one_that_was_not(
    make_config, tmp_path: pathlib.Path) -> None:
  config = tmp_path / "config.json"
  config.write_text(json.dumps(config_lib.to_dict(make_config({
      "duration.steps": STEPS, "checkpoint.every_steps": EVERY,
      "evaluation.every_steps": 10}))), encoding="utf-8")
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  run_dir = killed / "run"
  choose = random.Random(0)
  beside = start(config, whole)

  # Before the first checkpoint is whole.
  process = start(config, killed)
  kill_when(lambda: steps_on_file(run_dir) >= 3, process, 0.0)
  assert not any(name.isdigit() for name in saved(run_dir))
  assert steps_on_file(run_dir) < EVERY
  finish(beside, whole)

  # While a checkpoint is being written: Orbax renames it when it is whole.
  for _ in range(5):
    process = start(config, killed)
    kill_when(lambda: unfinished(run_dir), process, 0.0)
    if unfinished(run_dir):
      break
  assert unfinished(run_dir), "every kill came after the rename"

  # At some moment between two checkpoints, and at some moment near the end.
  for step in (choose.randrange(16, 35), choose.randrange(40, 55)):
    process = start(config, killed)
    kill_when(lambda at=step: steps_on_file(run_dir) >= at, process,
              choose.uniform(0, 0.03))
    assert records.read_result(run_dir) is None
  finish(start(config, killed), killed)

  record = records.read_result(run_dir)
  assert record["status"] == "complete" and record["resumes"] >= 2
  assert not unfinished(run_dir)
  reference = records.read_result(whole / "run")
  assert reference["resumes"] == 0
  for name in ("loss", "loss_stderr", "bits_per_byte", "train_loss",
               "tokens_seen", "flops_total", "steps"):
    assert record[name] == reference[name], name
  assert rows(run_dir) == rows(whole / "run")
  state, expected = final_state(run_dir), final_state(whole / "run")
  assert state.keys() == expected.keys() and len(state) > 20
  for name, leaf in state.items():
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
