# SPDX-License-Identifier: Apache-2.0
"""scripts/track.py as people call it."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "train"))

# pylint: disable=wrong-import-position
import wandb_files
import wandb_stub
sys.path.pop(0)

from tfjax import train
from tfjax.train import records
from tfjax.train.mirrors import columns


def track(*arguments: object, **environment: str
          ) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, "scripts/track.py", *map(str, arguments)], cwd=ROOT,
      capture_output=True, text=True, timeout=120, check=False,
      env={**os.environ, **environment})


@pytest.fixture(scope="module")
def workdir(make_config, tmp_path_factory: pytest.TempPathFactory
            ) -> pathlib.Path:
  """Two runs of a sweep, one of them interrupted, that no mirror has seen."""
  made = tmp_path_factory.mktemp("track")
  train.run(make_config({"seed": 1}), made, sweep="grid")
  train.run(make_config({"tracking.tensorboard": True}), made, sweep="grid",
            until_step=3)
  (made / "report.html").write_text("<h1>report</h1>")
  (made / "figures").mkdir()
  (made / "figures" / "loss.png").write_bytes(b"png")
  return made


def run_dirs(workdir: pathlib.Path) -> list[pathlib.Path]:
  return [path.parent for path in sorted(workdir.glob("*/config.json"))]


def told(found: wandb_files.Offline) -> dict[str, Any]:
  """What does not depend on when it was written."""
  return dict(config=found.config, history=found.history,
              metrics=found.metrics, exit_code=found.exit_code,
              summary={name: value for name, value in found.summary.items()
                       if not name.startswith("_")})


def test_sync_writes_offline_what_the_records_hold_as_often_as_it_is_asked(
    workdir: pathlib.Path) -> None:
  before = None
  for _ in range(2):
    ended = track("sync", workdir)
    assert ended.returncode == 0, ended.stderr
    after = {}
    for run_dir in run_dirs(workdir):
      found = wandb_files.Offline(run_dir, run_dir.name)
      after[run_dir.name] = told(found)
      rows = records.read_metrics(run_dir / "metrics.jsonl")
      assert found.history == [columns.of_row(row) for row in rows]
      result = columns.summary(records.read_result(run_dir))
      assert found.run.run_group == "grid"
      assert {name: found.summary[name] for name in result} == result
      assert found.exit_code == (0 if result["status"] == "complete" else 1)
      assert f"{run_dir.name}: {len(rows)} rows in " in ended.stdout
    assert before in (None, after)
    before = after
    report = wandb_files.Offline(workdir, "report-grid")
    assert report.run.job_type == "report"
    assert report.artifacts == {
        "report-grid": {"report.html", "figures/loss.png"}}
    assert report.summary["runs"] == {"complete": 1, "interrupted": 1}


def test_sync_sends_online_what_the_records_hold_once(
    workdir: pathlib.Path) -> None:
  with wandb_stub.WandbStub() as stub:
    for _ in range(2):
      ended = track("sync", workdir, **stub.environment())
      assert ended.returncode == 0, ended.stderr
      assert stub.url in ended.stdout
      for run_dir in run_dirs(workdir):
        run = stub.runs[run_dir.name]
        rows = records.read_metrics(run_dir / "metrics.jsonl")
        assert run["lines"] == len(run["history"]) == len(rows)
        assert [one["train/loss"] for one in run["history"]
                if "train/loss" in one] == [
                    row["loss"] for row in rows if row["kind"] == "train"]
        assert run["summary"]["status"] == records.read_result(
            run_dir)["status"]
      (artifact,) = stub.artifacts.values()
      assert (artifact["type"], artifact["state"]) == ("report", "COMMITTED")
      assert artifact["files"] == {"report.html": b"<h1>report</h1>",
                                   "figures/loss.png": b"png"}
      assert stub.runs["report-grid"]["jobType"] == "report"
      assert len(stub.runs) == 3


def test_sync_of_some_runs_and_of_what_is_damaged(
    workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
  one, other = (path.name for path in run_dirs(workdir))
  ended = track("sync", workdir, f"--run={one}", "--mode=offline")
  assert ended.returncode == 0 and other not in ended.stdout
  ended = track("sync", workdir, "--run=nobody")
  assert ended.returncode == 2
  assert f"no run 'nobody' in {workdir}; it has {one}, {other}" in ended.stderr
  ended = track("sync", tmp_path)
  assert ended.returncode == 2 and "no runs in" in ended.stderr
  # One damaged run holds up no other.
  for name in (one, other):
    (tmp_path / name).mkdir()
    for file in ("config.json", "metrics.jsonl", "result.json"):
      (tmp_path / name / file).write_bytes(
          (workdir / name / file).read_bytes())
  (tmp_path / one / "metrics.jsonl").write_text("{broken\n")
  ended = track("sync", tmp_path)
  assert ended.returncode == 1
  assert ended.stderr.startswith(f"{one}: ") and other not in ended.stderr
  assert wandb_files.Offline(tmp_path / other, other).history


def test_sync_loads_no_jax() -> None:
  ended = subprocess.run(
      [sys.executable, "-c", "import runpy, sys\n"
       "sys.argv = ['track.py', 'sync', '/nowhere']\n"
       "try:\n  runpy.run_path('scripts/track.py', run_name='__main__')\n"
       "except SystemExit as end:\n  assert end.code == 2\n"
       "heavy = {'jax', 'flax', 'numpy', 'wandb', 'pandas'}\n"
       "print(heavy & sys.modules.keys())"],
      cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
  assert ended.stdout == "set()\n"


def test_the_dashboard_is_written_without_a_server(
    workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
  out = tmp_path / "dashboard.json"
  ended = track("dashboard", workdir, f"--out={out}")
  assert ended.returncode == 0, ended.stderr
  written = json.loads(out.read_bytes())
  assert set(written) == {"workspace", "report"}
  assert written["workspace"]["displayName"] == "Sweep grid"
  ended = track("dashboard", workdir, "--save")
  assert ended.returncode == 1 and "wandb login" in ended.stderr


def test_the_dashboard_is_saved_over_the_one_before(
    workdir: pathlib.Path) -> None:
  with wandb_stub.WandbStub() as stub:
    for _ in range(2):
      ended = track("dashboard", workdir, "--save", **stub.environment())
      assert ended.returncode == 0, ended.stderr
    assert [view["type"] for view in stub.views] == ["project-view", "runs"]
    for view in stub.views:
      assert view["displayName"] == "Sweep grid"
      for name in ("train/loss", "derived.value.params_total", '"grid"'):
        assert name in view["spec"]
    assert not stub.unknown
    assert f"workspace: {stub.url}/me/tfjax?nw=" in ended.stdout
    assert f"report: {stub.url}/me/tfjax/reports/Sweep-grid" in ended.stdout
