# SPDX-License-Identifier: Apache-2.0
"""The mirrors of a run: whole when they work, unnoticed when they do not."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from typing import Any, Callable

import pytest

# Helpers of these tests are found beside them.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

# pylint: disable=wrong-import-position
import fake_wandb
import mirrored
import wandb_files
sys.path.pop(0)

from tfjax import config as config_lib
from tfjax import train
from tfjax.sweep import ensemble
from tfjax.sweep import halving
from tfjax.train import parts
from tfjax.train import records
from tfjax.train import tracking
from tfjax.train.mirrors import columns
from tfjax.train.mirrors import wandb_run

ROOT = pathlib.Path(__file__).parents[2]
# What differs between two runs of one config.
VARYING = {"started_at", "finished_at", "run_id", "tokens_per_second",
           "goodput", "resumes", "compile_cache_hits", "compile_cache_misses"}


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
  """Mirrors are kept by a process of the test's own."""
  monkeypatch.setattr(tracking, "_current", None)


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
  for name, value in environment.items():
    monkeypatch.setenv(name, value)


def rows_of(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  return records.read_metrics(run_dir / "metrics.jsonl")


def test_an_offline_run_mirrors_the_records(
    make_config, tmp_path: pathlib.Path) -> None:
  record = train.run(make_config({
      "tracking.wandb": "offline", "tracking.project": "mirror",
      "tracking.tags": ("pilot",)}), tmp_path, sweep="grid")
  run_dir = tmp_path / record.run_id
  assert mirrored.wait(run_dir, 60)
  found = wandb_files.Offline(run_dir, record.run_id)
  assert (found.run.run_id, found.run.project) == (record.run_id, "mirror")
  assert (found.run.run_group, found.run.job_type) == ("grid", "train")
  assert set(found.run.tags) == {"pilot", "gpt2", "causal", "3k"}

  rows = rows_of(run_dir)
  assert len(rows) == 7 and len(found.history) == 7
  for item, row in zip(found.history, rows):
    kind = row.pop("kind")
    assert item.pop("device_hours") == pytest.approx(
        row.pop("device_seconds") / 3600, rel=1e-12)
    # What is not known is left out: a chart has no point there.
    assert row.pop("energy_kwh") is None and "energy_kwh" not in item
    expected = {name if name in ("step", "tokens", "flops", "seconds")
                else f"{kind}/{name}": value
                for name, value in row.items() if value is not None}
    assert item == expected

  assert {"step", "tokens", "flops", "device_hours"} <= {
      name for name, axis in found.metrics.items() if not axis}
  assert {name: axis for name, axis in found.metrics.items() if axis} == {
      "train/*": "tokens", "evaluation/*": "tokens", "rollback/*": "tokens"}

  result = records.read_result(run_dir)
  for name, value in result.items():
    if value is not None:
      assert found.summary[name] == value, name
  given = json.loads((run_dir / "config.json").read_bytes())
  assert {name: found.config[name] for name in given} == given
  assert found.config["derived"] == dict(
      params_total=result["params_total"], batch_tokens=128,
      params_embedding=result["params_embedding"],
      params_non_embedding=result["params_non_embedding"],
      params_head=result["params_head"], tokens_planned=768, steps_planned=6,
      flops_planned=result["flops_total"])
  assert found.exit_code == 0


@pytest.mark.parametrize("waits", [True, False])
def test_a_resumed_run_is_mirrored_once_and_whole(
    waits: bool, make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"tracking.wandb": "offline",
                        "tracking.tensorboard": True})
  part = train.run(config, tmp_path, until_step=3)
  run_dir = tmp_path / part.run_id
  if waits:
    assert part.status == "interrupted" and mirrored.wait(run_dir, 60)
    found = wandb_files.Offline(run_dir, part.run_id)
    assert (len(found.history), found.exit_code) == (3, 1)
  assert train.run(config, tmp_path).status == "complete"
  assert mirrored.wait(run_dir, 60)
  found = wandb_files.Offline(run_dir, part.run_id)
  assert [item["step"] for item in found.history] == [
      row["step"] for row in rows_of(run_dir)] == [1, 2, 3, 4, 5, 6, 6]
  assert (found.summary["status"], found.exit_code) == ("complete", 0)
  assert len(list((run_dir / "tensorboard").iterdir())) == 1


def test_a_run_that_is_stopped_between_its_parts_is_marked_so(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"tracking.wandb": "offline"})
  part = train.run(config, tmp_path, until_step=3)
  run_dir = tmp_path / part.run_id
  assert mirrored.wait(run_dir, 60)
  halving.stop(tmp_path, types.SimpleNamespace(
      run_id=part.run_id, config=config), None, "hopeless")
  assert mirrored.wait(run_dir, 60)
  found = wandb_files.Offline(run_dir, part.run_id)
  assert (len(found.history), found.exit_code) == (3, 0)
  assert found.summary["status"] == "stopped"
  assert found.summary["status_reason"] == "hopeless"


def test_a_run_that_fails_is_marked_so(
    make_config, tmp_path: pathlib.Path) -> None:
  def fall(row: dict[str, Any]) -> None:
    if row["step"] == 4:
      raise ZeroDivisionError("a bug")
  with pytest.raises(ZeroDivisionError):
    train.run(make_config({"tracking.wandb": "offline"}), tmp_path,
              on_row=fall)
  run_dir = next(tmp_path.glob("gpt2-*"))
  assert mirrored.wait(run_dir, 60)
  found = wandb_files.Offline(run_dir, run_dir.name)
  assert (len(found.history), found.exit_code) == (4, 1)
  assert found.summary["status"] == "failed"
  assert "a bug" in found.summary["status_reason"]


def test_disabled_starts_nothing_and_leaves_nothing(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(subprocess, "Popen", None)
  mirror = tracking.Mirror(make_config(), tmp_path, None)
  mirror.close()
  mirror.finish()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["raise", "hang"])
@pytest.mark.parametrize("where", ["import", "init", "log", "finish"])
def test_what_goes_wrong_in_wandb_does_not_reach_the_run(
    where: str, how: str, make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  plain = train.run(make_config(), tmp_path / "plain")
  use(fake_wandb.install(tmp_path / "path", where, how), monkeypatch)
  begin = time.perf_counter()
  record = train.run(make_config({"tracking.wandb": "online"}), tmp_path)
  assert time.perf_counter() - begin < 60  # of the 300 that it hangs
  for name, value in vars(plain).items():
    if name not in VARYING and not name.endswith("_seconds"):
      assert getattr(record, name) == value, name
  run_dir = tmp_path / record.run_id

  def told(path: pathlib.Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items()
             if name not in records.MEASURED} for row in rows_of(path)]
  assert told(run_dir) == told(tmp_path / "plain" / plain.run_id)
  # The fault has been met, and what can be said about it is.
  answer = tracking._current.wait(str(run_dir), 5 if how == "hang" else 30)
  assert where in fake_wandb.calls(tmp_path / "path")
  assert (answer is None) == (how == "hang")
  if answer is not None:
    assert "no such host" in "".join(answer["problems"])
    asked = "\n".join(fake_wandb.calls(tmp_path / "path"))
    assert ("init offline" in asked) == (where == "init")
  tracking._current._process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("where, how", [("init", "hang"), ("log", "raise")])
def test_training_spends_less_than_2_percent_of_its_time_on_its_mirrors(
    where: str, how: str, make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """All that it calls of them: to start their process, and to wait at the
  end. The run takes its 30 seconds mostly asleep: what a busy machine adds to
  a call is small beside 2% of them."""
  use(fake_wandb.install(tmp_path / "path", where, how), monkeypatch)
  calls, seconds = [], [0.0]

  def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
      begin = time.perf_counter()
      try:
        return method(*args, **kwargs)
      finally:
        seconds[0] += time.perf_counter() - begin
        calls.append(name)
    return call
  for name, method in list(vars(tracking.Mirror).items()):
    if callable(method):
      monkeypatch.setattr(tracking.Mirror, name, timed(name, method))
  begin = time.perf_counter()
  record = train.run(
      make_config({"tracking.wandb": "online", "duration.steps": 30}),
      tmp_path, on_row=lambda row: time.sleep(1))
  taken = time.perf_counter() - begin
  assert record.status == "complete"
  assert calls == ["__init__", "close", "finish"]
  assert seconds[0] < 0.02 * taken
  assert where in fake_wandb.calls(tmp_path / "path")
  tracking._current._process.kill()


@pytest.mark.parametrize("where", ["init", "finish"])
def test_train_ends_in_time_and_well_while_wandb_hangs(
    where: str, make_config, tmp_path: pathlib.Path) -> None:
  experiment = tmp_path / "experiment.py"
  values = config_lib.to_dict(make_config({"tracking.wandb": "online"}))
  experiment.write_text(
      "import json\nimport ml_collections\nfrom tfjax import config\n\n"
      "def get_config():\n  result = config.default()\n"
      f"  result.update(json.loads({json.dumps(values)!r}))\n"
      "  return result\n", encoding="utf-8")
  given = fake_wandb.install(tmp_path / "path", where, "hang")
  ended = subprocess.run(
      [sys.executable, "scripts/train.py", f"--config={experiment}",
       f"--workdir={tmp_path / 'runs'}"], cwd=ROOT, capture_output=True,
      text=True, timeout=100, check=False, env={**os.environ, **given})
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.count("complete") == 1
  for word in ("Traceback", "Fatal"):
    assert word not in ended.stderr


def test_the_mirrors_process_ends_when_wandb_hangs(
    make_config, tmp_path: pathlib.Path) -> None:
  (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(
      make_config({"tracking.wandb": "offline"}))), encoding="utf-8")
  given = fake_wandb.install(tmp_path / "path", "init", "hang")
  begin = time.perf_counter()
  ended = subprocess.run(
      [sys.executable, "-c", "from tfjax.train.mirrors import follow\n"
       "follow._CLOSE_SECONDS = 1.5\nfollow.main()"],
      input=json.dumps(dict(event="begin", run=str(tmp_path))) + "\n",
      text=True, cwd=ROOT, timeout=60, check=False,
      env={**os.environ, **given})
  assert ended.returncode == 1 and time.perf_counter() - begin < 50
  assert "init" in fake_wandb.calls(tmp_path / "path")


def test_a_run_tells_its_mirror_without_waiting(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
  """Even where the other end does not read, and the pipe is full."""
  process = tracking._Process(tmp_path / "log")
  os.kill(process._process.pid, signal.SIGSTOP)
  begin = time.perf_counter()
  for _ in range(2000):
    process.tell("begin", str(tmp_path))
  assert process.wait(str(tmp_path)) is None
  assert time.perf_counter() - begin < 20
  assert "its mirrors do not follow" in caplog.text
  process._process.kill()


def test_the_wait_at_the_ends_of_runs_is_a_share_of_their_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  use(fake_wandb.install(tmp_path / "path", "init", "hang"), monkeypatch)
  process = tracking._Process(tmp_path / "log")
  now = time.monotonic()
  process._begun = now - 200  # seconds of training: two may be waited
  for expected in (2.0, 0.0, 0.0):  # in all, not at each of many runs
    begin = time.perf_counter()
    assert process.wait("another") is None
    assert time.perf_counter() - begin == pytest.approx(expected, abs=0.9)
  process._process.kill()


def test_tensorboard_that_is_not_installed_is_said_before_any_compute(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(parts, "make", lambda _: pytest.fail("data, and more"))
  config = make_config({"tracking.tensorboard": True})
  for run in (lambda: train.run(config, tmp_path),
              lambda: ensemble.run([config], tmp_path)):
    with pytest.raises(config_lib.ConfigError, match="tracking.tensorboard: "
                       "needs tensorboardX.*pip install"):
      run()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key, netrc, expected", [
    (None, None, "offline"), ("x" * 40, None, "online"),
    (None, "machine api.wandb.ai login user", "online"),
    (None, "machine example.org login user", "offline")])
def test_auto_is_online_only_with_a_key(
    key: str | None, netrc: str | None, expected: str,
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
  if key:
    monkeypatch.setenv("WANDB_API_KEY", key)
  if netrc:
    (tmp_path / "netrc").write_text(netrc, encoding="utf-8")
  assert wandb_run.mode_of("auto") == expected
  assert wandb_run.mode_of("disabled") == "disabled"


def test_a_full_disk_costs_the_mirror_alone(
    make_config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture) -> None:
  def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")
  monkeypatch.setattr(pathlib.Path, "write_text", full)
  mirror = tracking.Mirror(make_config({"tracking.wandb": "offline"}),
                           tmp_path, None)
  mirror.close()
  mirror.finish()
  assert "has no mirrors: " in caplog.text and not (
      tmp_path / columns.NOTE).exists()
