# SPDX-License-Identifier: Apache-2.0
"""The mirror in wandb: whole when it works, unnoticed when it does not."""

import json
import pathlib
import subprocess
import sys
import threading
import time
import types
from typing import Any, Callable

import pytest

from tfjax import config as config_lib
from tfjax import train
from tfjax.train import records
from tfjax.train import tracking

VARYING = {"started_at", "finished_at", "device_seconds", "compile_seconds",
           "tokens_per_second", "run_id", "wall_seconds", "startup_seconds",
           "input_seconds", "step_seconds", "evaluation_seconds",
           "checkpoint_seconds", "occupied_device_seconds", "goodput"}


def inspect(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records in an offline run's file, by wandb's own reader."""
  lines = subprocess.run(
      [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
      check=True, capture_output=True, text=True).stdout.splitlines()
  return [json.loads(line) for line in lines]


def test_an_offline_run_mirrors_the_records(
    make_config, tmp_path: pathlib.Path) -> None:
  record = train.run(make_config({"tracking.wandb": "offline",
                                  "tracking.project": "mirror"}),
                     tmp_path, sweep="grid")
  run_dir = tmp_path / record.run_id
  (path,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
  found = inspect(path)
  (run,) = (one["run"] for one in found if one["type"] == "run")
  assert (run["run_id"], run["project"]) == (record.run_id, "mirror")
  assert run["run_group"] == "grid"
  history = [one["history"]["item"] for one in found
             if one["type"] == "history"]
  rows = records.read_metrics(run_dir / "metrics.jsonl")
  assert len(history) == len(rows) == 7
  for item, row in zip(history, rows):
    assert item[f"{row['kind']}/loss"] == row["loss"]
    assert (item["step"], item["tokens"]) == (row["step"], row["tokens"])
    assert item["device_seconds"] == row["device_seconds"]
    # What is not known is left out: a chart has no point there.
    assert row["energy_kwh"] is None and "energy_kwh" not in item
    assert "train/mfu" not in item
  # Whatever a chart may be against; most often tokens.
  axes = {one["metric"]["name"] for one in found if one["type"] == "metric"
          and "name" in one["metric"]}
  assert axes == {"step", "tokens", "flops", "seconds", "device_seconds",
                  "energy_kwh"}
  assert {one["metric"]["glob_name"]: one["metric"]["step_metric"]
          for one in found if one["type"] == "metric"
          and "glob_name" in one["metric"]} == {
              "train/*": "tokens", "evaluation/*": "tokens"}
  summary: dict[str, Any] = {}
  for one in found:
    if one["type"] == "summary":
      summary |= one["summary"].get("update", {})
  assert summary["loss"] == record.loss
  assert summary["status"] == "complete"
  assert [one["exit"]["exit_code"] for one in found
          if one["type"] == "exit"] == [0]


def test_disabled_leaves_nothing_and_imports_nothing(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
  threads = threading.active_count()
  mirror = tracking.Mirror(make_config(), tmp_path, None)
  mirror.log({"kind": "train", "step": 1})
  mirror.finish({})
  assert threading.active_count() == threads
  assert not list(tmp_path.iterdir())


def fake(where: str, behave: Callable[[], None], modes: list[str]
         ) -> types.ModuleType:
  """A wandb whose `where` (init, log or finish) misbehaves."""
  def call(name: str) -> Callable[..., Any]:
    def function(*_, **__) -> None:
      if name == where:
        behave()
    return function
  run = types.SimpleNamespace(
      log=call("log"), finish=call("finish"), define_metric=call("define"),
      summary={})

  def init(*_, mode: str, **__) -> types.SimpleNamespace:
    modes.append(mode)
    call("init")()
    return run
  module = types.ModuleType("wandb")
  module.init, module.Settings = init, types.SimpleNamespace
  return module


def fail() -> None:
  raise RuntimeError("no such host")


def hang() -> None:
  time.sleep(300)


@pytest.mark.parametrize("behave", [fail, hang])
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_what_goes_wrong_in_wandb_does_not_reach_the_run(
    where: str, behave: Callable[[], None], make_config,
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture) -> None:
  monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.3)
  plain = train.run(make_config(), tmp_path / "plain")
  modes: list[str] = []
  monkeypatch.setitem(sys.modules, "wandb", fake(where, behave, modes))
  begin = time.perf_counter()
  record = train.run(make_config({"tracking.wandb": "online"}), tmp_path)
  assert time.perf_counter() - begin < 10
  assert modes[0] == "online"
  assert ("wandb stopped mirroring" if behave is fail else
          "wandb did not finish") in caplog.text
  if (where, behave) == ("init", fail):
    assert modes == ["online", "offline"]
  for name, value in vars(plain).items():
    if name not in VARYING:
      assert getattr(record, name) == value, name
  run_dir = tmp_path / record.run_id
  assert len(records.read_metrics(run_dir / "metrics.jsonl")) == 7
  assert records.read_result(run_dir)["status"] == "complete"


def test_the_process_ends_cleanly_while_wandb_hangs(
    make_config, tmp_path: pathlib.Path) -> None:
  package = tmp_path / "path" / "wandb.py"
  package.parent.mkdir()
  package.write_text("import time\nSettings = dict\n"
                     "def init(**_):\n  time.sleep(300)\n", encoding="utf-8")
  config = tmp_path / "config.json"
  config.write_text(json.dumps(config_lib.to_dict(
      make_config({"tracking.wandb": "offline"}))), encoding="utf-8")
  program = (
      "import json, sys\n"
      "sys.path.insert(0, sys.argv[1])\n"
      "from tfjax import config, train\n"
      "from tfjax.train import tracking\n"
      "tracking._CLOSE_SECONDS = 0.2\n"
      "values = json.load(open(sys.argv[2]))\n"
      "print(train.run(config.from_dict(values), sys.argv[3]).status)\n")
  ended = subprocess.run(
      [sys.executable, "-c", program, str(package.parent), str(config),
       str(tmp_path)], capture_output=True, text=True, timeout=120,
      check=False)
  assert (ended.returncode, ended.stdout) == (0, "complete\n"), ended.stderr
  assert "wandb did not finish" in ended.stderr
  for word in ("Traceback", "Fatal"):
    assert word not in ended.stderr


def test_a_full_queue_drops_rows_and_does_not_wait(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(tracking, "_QUEUE_ROWS", 3)
  monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.1)
  monkeypatch.setitem(sys.modules, "wandb", fake("init", hang, []))
  mirror = tracking.Mirror(make_config({"tracking.wandb": "offline"}),
                           tmp_path, None)
  begin = time.perf_counter()
  for step in range(1000):
    mirror.log({"kind": "train", "step": step})
  mirror.finish({})
  assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("key, netrc, expected", [
    (None, None, "offline"), ("x" * 40, None, "online"),
    (None, "machine api.wandb.ai login user", "online"),
    (None, "machine example.org login user", "offline")])
def test_auto_is_online_only_with_a_key(
    key: str | None, netrc: str | None, expected: str, make_config,
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  modes: list[str] = []
  monkeypatch.setitem(sys.modules, "wandb", fake("none", fail, modes))
  monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
  if key:
    monkeypatch.setenv("WANDB_API_KEY", key)
  if netrc:
    (tmp_path / "netrc").write_text(netrc, encoding="utf-8")
  mirror = tracking.Mirror(make_config({"tracking.wandb": "auto"}), tmp_path,
                           None)
  mirror.finish({})
  assert modes == [expected]
