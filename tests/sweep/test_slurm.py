# SPDX-License-Identifier: Apache-2.0
"""Sweeps on a real SLURM of one node: one job stopped and requeued, others
cancelled or refused, against what the local launcher makes of the same sweep.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Iterator

import ml_collections
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import slurm as slurm_lib
from tfjax.train import lease

# Now: its log goes to what is standard output when it is imported first.
pytest.importorskip("submitit")

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import one_node_slurm  # pylint: disable=wrong-import-position
sys.path.pop(0)

# Of a record: what says how a run ended, not when, where and at what cost.
FIELDS = ("run_id", "sweep", "status", "status_reason", "config_hash", "steps",
          "tokens_seen", "loss", "loss_stderr", "train_loss", "params_total",
          "flops_total")
LONG_STEPS = 4000


@pytest.fixture(name="slurm", scope="module")
def slurm_fixture() -> Iterator[None]:
  """A cluster whose commands are on the PATH."""
  cache = pathlib.Path(__file__).parents[2] / ".pytest_cache"
  directory = pathlib.Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
  with pytest.MonkeyPatch.context() as patch:
    try:
      with one_node_slurm.running(directory, cache) as environment:
        for name, value in environment.items():
          patch.setenv(name, value)
        yield
    except one_node_slurm.Unavailable as error:
      pytest.skip(f"no SLURM here: {error}")
    finally:
      shutil.rmtree(directory, ignore_errors=True)


class Journal(sweep.Observer):
  """What the observer was told."""

  def __init__(self) -> None:
    self.started_ids: list[str] = []
    self.ended_ids: list[str] = []

  def started(self, spec: sweep.RunSpec) -> None:
    self.started_ids.append(spec.run_id)

  def ended(self, outcome: sweep.Outcome) -> None:
    self.ended_ids.append(outcome.spec.run_id)


@pytest.fixture(name="specs")
def specs_fixture(base: ml_collections.ConfigDict,
                  cache_dir: pathlib.Path) -> list[sweep.RunSpec]:
  """Three short runs and one that is long enough to be stopped."""
  config_lib.override(base, {
      "tracking.wandb": "disabled", "data.cache_dir": str(cache_dir),
      "runtime.num_devices": 1, "sweep.ensemble": "off",
      "data.max_epochs": 100.0, "train.log_every_steps": 20,
      "runtime.compilation_cache_dir": os.environ[
          "JAX_COMPILATION_CACHE_DIR"]})
  return sweep.plan(base, [
      {"seed": 1}, {"seed": 2}, {"seed": 3},
      {"seed": 4, "duration.steps": LONG_STEPS}])


@pytest.mark.slow
def test_a_requeued_job_ends_with_the_ledger_of_the_local_launcher(
    slurm: None, specs: list[sweep.RunSpec], tmp_path: pathlib.Path) -> None:
  del slurm
  long, workdir = specs[-1], tmp_path / "slurm"
  journal, stopped = Journal(), []

  def stop() -> None:
    wait_for(lambda: step(workdir, long) > 200)
    stopped.append(task_of(workdir, long))
    call("scancel", "--signal=TERM", "--full", stopped[0])
    wait_for(lambda: state(stopped[0]) == "PENDING")

  thread = threading.Thread(target=stop)
  thread.start()
  outcomes = sweep.launch(
      specs, workdir, launcher="slurm", workers=2, sweep="test",
      observer=journal, options={"cpus_per_task": 1, "timeout_min": 5})
  thread.join()
  (task,) = stopped
  log = (workdir / f".slurm/{task}_0_log.err").read_text(encoding="utf-8")
  assert f"job {task} goes back into the queue" in log
  # By that job or by the other, whichever was there first.
  assert record(workdir, long)["resumes"] == 1
  assert sorted(journal.started_ids) == sorted(journal.ended_ids) == sorted(
      spec.run_id for spec in specs)
  assert [(one.state.status, one.skipped) for one in outcomes] == [
      ("complete", False)] * 4

  sweep.launch(specs, tmp_path / "local", workers=1, sweep="test")
  for spec in specs:
    ours, theirs = (record(tmp_path / name, spec)
                    for name in ("slurm", "local"))
    assert {name: ours[name] for name in FIELDS} == {
        name: theirs[name] for name in FIELDS}
    assert losses(workdir, spec) == losses(tmp_path / "local", spec)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(
    slurm: None, specs: list[sweep.RunSpec], tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
  del slurm
  monkeypatch.setattr(slurm_lib, "_QUEUE_SECONDS", 1.0)
  long = specs[-1]

  def cancel() -> None:
    wait_for(lambda: step(tmp_path, long) > 200)
    call("scancel", task_of(tmp_path, long))

  thread = threading.Thread(target=cancel)
  thread.start()
  (outcome,) = sweep.launch([long], tmp_path, launcher="slurm")
  thread.join()
  assert outcome.state.status == "interrupted"
  assert 200 < outcome.state.step < LONG_STEPS
  assert "1 runs are not done" in capfd.readouterr().err
  assert call("squeue", "--noheader").stdout == ""


def test_slurms_refusal_is_the_error(
    slurm: None, specs: list[sweep.RunSpec], tmp_path: pathlib.Path) -> None:
  del slurm
  with pytest.raises(sweep.LaunchError, match="invalid partition specified"):
    sweep.launch(specs, tmp_path, launcher="slurm",
                 options={"partition": "none"})


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, call("squeue").stdout
    time.sleep(0.2)


def call(*command: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(command, capture_output=True, text=True, timeout=30,
                        check=False)


def state(task: str) -> str:
  return call("squeue", "--noheader", f"--jobs={task}", "--format=%T"
              ).stdout.strip()


def task_of(workdir: pathlib.Path, spec: sweep.RunSpec) -> str:
  """The job that the process is of which trains the run, as SLURM says."""
  holder = lease.holder(workdir / spec.run_id)
  variables = pathlib.Path(f"/proc/{holder.pid}/environ").read_bytes()
  known = dict(line.split("=", 1) for line in variables.decode().split("\0")
               if "=" in line)
  if "SLURM_ARRAY_JOB_ID" not in known:
    return known["SLURM_JOB_ID"]
  return "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**known)


def step(workdir: pathlib.Path, spec: sweep.RunSpec) -> int:
  return sweep.ledger.progress(workdir, spec.run_id).step or 0


def record(workdir: pathlib.Path, spec: sweep.RunSpec) -> dict[str, Any]:
  path = workdir / spec.run_id / "result.json"
  return json.loads(path.read_text(encoding="utf-8"))


def losses(workdir: pathlib.Path,
           spec: sweep.RunSpec) -> list[tuple[str, int, float]]:
  """Every logged loss, the last where a step was done twice."""
  lines = (workdir / spec.run_id / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [(row["kind"], row["step"], row["loss"]) for row in rows
          if row["kind"] in ("train", "evaluation")]
