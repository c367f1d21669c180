# SPDX-License-Identifier: Apache-2.0
"""The dashboard: what wandb is told to show, and that runs log all of it."""

import dataclasses
import json
import pathlib
import sys
from typing import Any, Iterator

import pytest

from tfjax import train
from tfjax.sweep import dashboard
from tfjax.train import records
from tfjax.train.mirrors import columns


def make(run_dir: pathlib.Path, sweep: str | None, **tracking: str) -> None:
  run_dir.mkdir(parents=True)
  (run_dir / "config.json").write_text(json.dumps(dict(
      model=dict(family="gpt2", size="3k"), objective=dict(name="causal"),
      tracking=dict(wandb="disabled", project="p", entity="e") | tracking)))
  (run_dir / columns.NOTE).write_text(json.dumps(dict(sweep=sweep)))


@pytest.fixture
def specification(tmp_path: pathlib.Path) -> dict[str, Any]:
  for number in range(2):
    make(tmp_path / f"run{number}", "grid")
  return dashboard.specification(dashboard.of_workdir(tmp_path))


def panels(value: Any) -> Iterator[dict[str, Any]]:
  """Every panel in a specification, wherever it lies."""
  if isinstance(value, dict):
    if "viewType" in value:
      yield value
    else:
      for one in value.values():
        yield from panels(one)
  elif isinstance(value, list):
    for one in value:
      yield from panels(one)


def runsets(value: Any) -> Iterator[dict[str, Any]]:
  if isinstance(value, dict):
    yield from value.get("runSets", [])
    for one in value.values():
      yield from runsets(one)
  elif isinstance(value, list):
    for one in value:
      yield from runsets(one)


def named(specification: dict[str, Any]) -> dict[str, set[str]]:
  """What panels and tables name: columns of rows, of the summary, and dotted
  keys of the config."""
  found: dict[str, set[str]] = dict(row=set(), summary=set(), config=set())

  def add(name: str, section: str = "row") -> None:
    for prefix, kind in (("summary:", "summary"), ("config:", "config"),
                         ("summary_metrics.", "summary")):
      if name.startswith(prefix):
        section, name = kind, name.removeprefix(prefix)
    if section == "config":  # KEY.value.REST, as wandb keeps it
      head, value, *rest = name.split(".", 2)
      assert value == "value", name
      name = ".".join([head, *rest])
    found[section].add(name)
  for panel in panels(specification):
    config = panel["config"]
    for key in ("xAxis", "yAxis", "zAxis"):
      if key in config:
        add(config[key])
    for name in config.get("metrics", []):
      add(name)
    if "groupBy" in config:
      add(config["groupBy"], "config")
  for runset in runsets(specification):
    for name in runset["runFeed"]["columnVisible"]:
      if name != "run:displayName":
        add(name)
  return found


def test_every_name_is_one_that_a_run_logs(
    specification: dict[str, Any], make_config,
    tmp_path: pathlib.Path) -> None:
  record = train.run(make_config(), tmp_path / "runs")
  run_dir = tmp_path / "runs" / record.run_id
  logged = set()
  for row in records.read_metrics(run_dir / "metrics.jsonl"):
    # Unknown here, and known elsewhere: a column all the same.
    logged |= columns.of_row({name: 1.0 if value is None else value
                              for name, value in row.items()}).keys()
  names = named(specification)
  assert {"tokens", "flops", "device_hours", "train/loss", "evaluation/loss",
          "train/mfu"} <= names["row"] <= logged
  known = columns.summary(dict.fromkeys(
      (field.name for field in dataclasses.fields(records.RunRecord)), 1.0))
  assert {"loss", "tokens_seen", "goodput", "mfu",
          "device_hours"} <= names["summary"] <= known.keys()
  config = columns.about(run_dir).config
  for name in names["config"]:
    value: Any = config
    for key in name.split("."):
      assert key in value, name
      value = value[key]
  assert {"derived.params_total", "optimizer.learning_rate"} <= (
      names["config"])


@pytest.mark.parametrize("part", ["workspace", "report"])
def test_what_a_reader_looks_for_is_there(
    part: str, specification: dict[str, Any]) -> None:
  def curve(x: str, y: str) -> dict[str, Any]:
    (panel,) = [one["config"] for one in panels(specification[part])
                if one["viewType"] == "Run History Line Plot" and
                (one["config"]["xAxis"], one["config"]["metrics"]) == (x, [y])]
    return panel
  for axis in ("tokens", "flops", "device_hours"):
    panel = curve(axis, "train/loss")
    assert panel["groupBy"] == "derived.value.params_total"
    assert panel["xLogScale"] and panel["yLogScale"]
  curve("tokens", "train/mfu")
  scatters = [one["config"] for one in panels(specification[part])
              if one["viewType"] == "Scatter Plot"]
  assert any((one["xAxis"], one["yAxis"], one["zAxis"]) == (
      "summary:tokens_seen", "summary:loss",
      "config:derived.value.params_total") for one in scatters)
  assert any((one["xAxis"], one["yAxis"], one["showMinYAxisLine"]) == (
      "config:optimizer.value.learning_rate", "summary:loss", True)
             for one in scatters)
  assert ["summary_metrics.goodput"] in [
      one["config"]["metrics"] for one in panels(specification[part])
      if one["viewType"] == "Bar Chart"]
  for runset in runsets(specification[part]):
    assert [(one["key"]["name"], one["op"], one["value"])
            for one in runset["filters"]["filters"]] == [
                ("group", "=", "grid"), ("jobType", "=", "train")]
    assert runset["runFeed"]["columnVisible"]["summary:loss"]
  places = [(one["layout"]["x"], one["layout"]["y"])
            for one in panels(specification["workspace"])]
  assert set(places[:3]) == {(0, 0), (8, 0), (16, 0)} and places[3] == (0, 6)


def test_several_sweeps_of_one_directory_are_one_dashboard(
    tmp_path: pathlib.Path) -> None:
  for number, sweep in enumerate(("b", "a", None)):
    make(tmp_path / f"run{number}", sweep)
  board = dashboard.of_workdir(tmp_path)
  assert (board.sweeps, board.entity, board.project) == (("a", "b"), "e", "p")
  runset = next(runsets(dashboard.specification(board)))
  assert runset["filters"]["filters"][0]["op"].lower() == "in"
  assert runset["filters"]["filters"][0]["value"] == ["a", "b"]


def test_a_specification_beside_the_runs_is_not_what_was_saved(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  make(tmp_path / "run0", "grid")
  board = dashboard.of_workdir(tmp_path)
  (tmp_path / "dashboard.json").write_text(
      json.dumps(dashboard.specification(board)))

  class Taken:  # by a server
    id, url = "one", "https://wandb.test/one"

    def save(self) -> "Taken":
      return self
  monkeypatch.setattr(dashboard, "_workspace", lambda board: Taken())
  monkeypatch.setattr(dashboard, "_report", lambda board, lookup: Taken())
  assert dashboard.save(board) == dict(
      workspace=Taken.url, report=Taken.url)


def test_what_cannot_be_shown_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  with pytest.raises(FileNotFoundError, match="no runs in"):
    dashboard.of_workdir(tmp_path)
  make(tmp_path / "run0", None)
  with pytest.raises(ValueError, match="are of no sweep"):
    dashboard.of_workdir(tmp_path)
  make(tmp_path / "run1", "grid", project="q")
  with pytest.raises(ValueError, match=r"several projects.*e/p, e/q"):
    dashboard.of_workdir(tmp_path)
  make(tmp_path / "other" / "run0", "grid")
  monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
  with pytest.raises(ValueError, match=r"pip install 'tfjax\[dashboards\]'"):
    dashboard.specification(dashboard.of_workdir(tmp_path / "other"))
