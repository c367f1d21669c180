# SPDX-License-Identifier: Apache-2.0
"""wandb itself, against a stub of its server on loopback."""

import copy
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
# pylint: disable=wrong-import-position
import mirrored
import wandb_stub
sys.path.pop(0)

from tfjax import train
from tfjax.train import records
from tfjax.train import tracking
from tfjax.train.mirrors import columns

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch
         ) -> Iterator[wandb_stub.WandbStub]:
  monkeypatch.setattr(tracking, "_current", None)
  with wandb_stub.WandbStub() as made:
    for name, value in made.environment().items():
      monkeypatch.setenv(name, value)
    yield made


def sync(*arguments: object) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, "scripts/track.py", "sync", *map(str, arguments)],
      cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def told(stub: wandb_stub.WandbStub, run_id: str) -> list[dict[str, Any]]:
  """The history, without wandb's own columns."""
  return [{name: value for name, value in one.items()
           if not name.startswith("_")}
          for one in stub.runs[run_id]["history"]]


def expected(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  # Numbers travel as JSON twice.
  return [{name: pytest.approx(value, rel=1e-12)
           for name, value in columns.of_row(one).items()}
          for one in records.read_metrics(run_dir / "metrics.jsonl")]


def without_measures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  return [{name: value for name, value in one.items()
           if name.split("/")[-1] not in (*records.MEASURED, "device_hours")}
          for one in rows]


def check_result(run: dict[str, Any], run_dir: pathlib.Path) -> None:
  result = records.read_result(run_dir)
  for name, value in result.items():
    if value is not None:
      assert run["summary"][name] == value, name
  config = {name: one["value"] for name, one in run["config"].items()}
  given = json.loads((run_dir / "config.json").read_bytes())
  assert {name: config[name] for name in given} == given
  assert config["derived"]["params_total"] == result["params_total"]
  assert config["derived"]["flops_planned"] == result["flops_total"]


def test_a_run_that_is_interrupted_resumed_and_synced_is_there_once(
    stub: wandb_stub.WandbStub, make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"tracking.wandb": "auto", "evaluation.every_steps": 2,
                        "tracking.tags": ("pilot",)})
  part = train.run(config, tmp_path, sweep="grid", until_step=3)
  run_dir = tmp_path / part.run_id
  assert mirrored.wait(run_dir, 60)
  run = stub.runs[part.run_id]
  assert (run["groupName"], run["jobType"]) == ("grid", "train")
  assert run["tags"] == ["pilot", "gpt2", "causal", "3k"]
  assert told(stub, part.run_id) == expected(run_dir)
  assert (len(run["history"]), run["exitcode"]) == (4, 1)

  # It dies after a row that its checkpoint does not know, and is resumed.
  with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write(json.dumps(dict(kind="train", step=4, tokens=512, loss=5.4,
                               flops=1.0)) + "\n")
  done = train.run(config, tmp_path, sweep="grid")
  assert done.status == "complete" and mirrored.wait(run_dir, 60)
  assert told(stub, part.run_id) == expected(run_dir)
  assert len(run["history"]) == run["lines"] == 9 and run["exitcode"] == 0
  check_result(run, run_dir)

  for _ in range(2):  # the truth, any number of times
    before = copy.deepcopy([run["history"], run["config"]["model"],
                            run["tags"]])
    ended = sync(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert [run["history"], run["config"]["model"], run["tags"]] == before
    assert list(stub.runs) == [part.run_id] and run["lines"] == 9
    check_result(run, run_dir)
  assert not stub.unknown

  # Its records say otherwise than wandb: what they say is right.
  rows = records.read_metrics(run_dir / "metrics.jsonl")
  rows[5]["loss"] += 1
  (run_dir / "metrics.jsonl").write_text(
      "".join(json.dumps(one) + "\n" for one in rows))
  assert sync(tmp_path).returncode == 0
  assert told(stub, part.run_id) == expected(run_dir)
  assert "RewindRun" in stub.operations and run["lines"] == 9 + 4


def test_a_redone_step_is_not_sent_again(
    stub: wandb_stub.WandbStub, make_config, tmp_path: pathlib.Path) -> None:
  """Killed after rows that no checkpoint has: they are done again."""
  config = make_config({"tracking.wandb": "online"})

  def fall(row: dict[str, Any]) -> None:
    if row["step"] == 4:
      raise ZeroDivisionError("a bug")
  with pytest.raises(ZeroDivisionError):
    train.run(config, tmp_path, on_row=fall)
  run_dir = next(tmp_path.glob("gpt2-*"))
  assert mirrored.wait(run_dir, 60)
  run = stub.runs[run_dir.name]
  assert (len(run["history"]), run["exitcode"]) == (4, 1)
  assert train.run(config, tmp_path).status == "complete"
  assert mirrored.wait(run_dir, 60)
  assert run["lines"] == len(run["history"]) == 7
  # The redone steps took another time than those that wandb has.
  assert without_measures(told(stub, run_dir.name)) == without_measures(
      [columns.of_row(one) for one in records.read_metrics(
          run_dir / "metrics.jsonl")])


@pytest.mark.slow
def test_the_network_is_lost_on_the_way(
    stub: wandb_stub.WandbStub, make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"tracking.wandb": "online"})
  plain = train.run(make_config(), tmp_path / "plain")

  lost_at = []

  def lose(row: dict[str, Any]) -> None:
    if row["step"] == 3 and row["kind"] == "train":
      end = time.monotonic() + 60
      while not stub.runs and time.monotonic() < end:
        time.sleep(0.1)
      stub.is_down = True
      lost_at.append(time.perf_counter())
  record = train.run(config, tmp_path, on_row=lose)
  assert time.perf_counter() - lost_at[0] < 30
  assert record.loss == plain.loss and record.status == "complete"
  run_dir = tmp_path / record.run_id
  assert mirrored.wait(run_dir, 90)  # that it has been given up, and why
  answer = tracking._current.wait(str(run_dir))
  assert "not taken everything" in answer["problems"][0]
  assert len(stub.runs[record.run_id]["history"]) < 7
  stub.is_down = False
  assert sync(tmp_path).returncode == 0
  assert told(stub, record.run_id) == expected(run_dir)
  check_result(stub.runs[record.run_id], run_dir)


def test_a_server_that_is_not_there_leaves_an_offline_directory(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(tracking, "_current", None)
  with wandb_stub.WandbStub() as gone:
    pass
  for name, value in gone.environment().items():
    monkeypatch.setenv(name, value)
  config = make_config({"tracking.wandb": "online",
                        "tracking.init_timeout_seconds": 2.0})
  record = train.run(config, tmp_path)
  run_dir = tmp_path / record.run_id
  assert record.status == "complete" and mirrored.wait(run_dir, 90)
  answer = tracking._current.wait(str(run_dir))
  assert "not reachable" in answer["problems"][0]
  assert len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) == 1
  assert os.path.exists(run_dir / "result.json")
