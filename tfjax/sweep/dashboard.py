# SPDX-License-Identifier: Apache-2.0
"""A sweep's workspace and report in wandb, as code.

What the panels show is declared here, once, in the names that the mirror of a
run logs (`tfjax.train.mirrors.columns`); wandb-workspaces makes the
specification of it, offline, and saves it where there is a key.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any, Sequence

from tfjax.train import records
from tfjax.train.mirrors import columns
from tfjax.train.mirrors import sync

# In the sweep's directory: what has been saved. Nobody's choice for --out.
_SAVED = ".wandb_dashboard.json"
_SIZE = "derived.params_total"  # of a run's config: what curves are grouped by
_RATE = "optimizer.learning_rate"
# Of the table of runs; `config` and `summary` columns of wandb.
_TABLE = ("summary:status", "config:derived.params_total",
          "config:derived.tokens_planned", "config:optimizer.learning_rate",
          "config:seed", "summary:loss", "summary:loss_stderr",
          "summary:bits_per_byte", "summary:flops_total", "summary:mfu",
          "summary:goodput", "summary:occupied_device_seconds",
          "summary:price_usd", "summary:energy_kwh", "summary:status_reason")
_GRADIENT = ("#440154", "#21918c", "#fde725")  # small to large


class SaveError(RuntimeError):
  """wandb did not take the dashboard. Says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Curves:
  """A column of the rows against another, grouped by size."""

  title: str
  x: str
  y: str
  log: bool = True


@dataclasses.dataclass(frozen=True)
class Points:
  """A point a run: numbers of its result, or of its config (`config:...`).

  `colour`: a third number. `minimum`: also the least y so far along x.
  """

  title: str
  x: str
  y: str
  colour: str | None = None
  minimum: bool = False
  log_y: bool = True


@dataclasses.dataclass(frozen=True)
class Bars:
  """A number of the results, grouped by size."""

  title: str
  metric: str
  of: str = "mean"


Panel = Curves | Points | Bars

SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Loss": (
        Curves("Training loss against tokens", "tokens", "train/loss"),
        Curves("Training loss against FLOPs", "flops", "train/loss"),
        Curves("Training loss against device-hours", "device_hours",
               "train/loss"),
        Curves("Held-out loss against tokens", "tokens", "evaluation/loss"),
        Curves("Held-out loss against FLOPs", "flops", "evaluation/loss"),
        Curves("Gradient norm", "tokens", "train/grad_norm")),
    "L(N, D)": (
        Points("Held-out loss by tokens, coloured by parameters",
               "tokens_seen", "loss", f"config:{_SIZE}"),
        Points("Held-out loss by parameters, coloured by tokens",
               f"config:{_SIZE}", "loss", "tokens_seen"),
        Points("Held-out loss by FLOPs, and the least so far", "flops_total",
               "loss", f"config:{_SIZE}", minimum=True)),
    "Efficiency": (
        Curves("Model FLOPs utilization (MFU)", "tokens", "train/mfu",
               log=False),
        Curves("Tokens a second", "tokens", "train/tokens_per_second",
               log=False),
        Bars("MFU", "mfu"), Bars("Goodput", "goodput"),
        Points("Held-out loss by device-hours", "device_hours",
               "loss", f"config:{_SIZE}", minimum=True)),
    "Learning rate": (
        Points("Held-out loss by learning rate, coloured by parameters",
               f"config:{_RATE}", "loss", f"config:{_SIZE}"),
        Points("Least held-out loss along the learning rate",
               f"config:{_RATE}", "loss", minimum=True),
        Bars("Least held-out loss of each size", "loss", "min")),
}


@dataclasses.dataclass(frozen=True)
class Board:
  """Whose dashboard: where in wandb, and of which sweeps."""

  workdir: pathlib.Path
  entity: str
  project: str
  sweeps: tuple[str, ...]

  @property
  def title(self) -> str:
    return f"Sweep {', '.join(self.sweeps)}"


def of_workdir(workdir: str | os.PathLike[str]) -> Board:
  """The dashboard of the sweep (or the sweeps) in a directory.

  Raises:
    FileNotFoundError: it holds no runs.
    ValueError: none of its runs is of a sweep, or they go to several projects.
  """
  workdir = pathlib.Path(workdir)
  found = [columns.about(run_dir) for run_dir in sync.runs(workdir)]
  sweeps = sorted({about.group for about in found} - {None})
  if not sweeps:
    raise ValueError(
        f"the runs in {workdir} are of no sweep; scripts/sweep.py runs one")
  places = {(about.tracking["entity"], about.tracking["project"])
            for about in found}
  if len(places) > 1:
    raise ValueError(
        f"the runs in {workdir} go to several projects in wandb "
        f"({', '.join(sorted('/'.join(place) for place in places))}); a "
        "dashboard is of one: set tracking.project and tracking.entity alike")
  (entity, project), = places
  return Board(workdir, entity, project, tuple(sweeps))


def specification(board: Board) -> dict[str, Any]:
  """What would be saved, as wandb's own JSON; asks no server.

  Raises:
    ValueError: wandb-workspaces is not installed.
  """
  def plain(model: Any) -> dict[str, Any]:
    return json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
  # pylint: disable=protected-access
  return dict(workspace=plain(_workspace(board)._to_model()),
              report=plain(_report(board, lookup=False)._to_model()))


def save(board: Board) -> dict[str, str]:
  """Saves workspace and report, over those saved before; returns their URLs.

  Raises:
    SaveError: wandb did not take them.
    ValueError: wandb-workspaces is not installed.
  """
  workspaces, _ = _libraries()
  path = board.workdir / _SAVED
  known = json.loads(path.read_bytes()) if path.exists() else {}
  try:
    if not board.entity:
      import wandb  # pylint: disable=import-outside-toplevel
      board = dataclasses.replace(
          board, entity=wandb.Api().default_entity or "")
    workspace = _workspace(board)
    if "workspace" in known:
      new, workspace = workspace, workspaces.Workspace.from_url(
          known["workspace"])
      workspace.name, workspace.sections = new.name, new.sections
      workspace.runset_settings = new.runset_settings
    known["workspace"] = workspace.save().url
    records.write_json(path, known)
    report = _report(board, lookup=True)
    report.id = known.get("report_id", "")
    report.save()
    known.update(report_id=report.id, report=report.url)
    records.write_json(path, known)
  except records.WriteError:
    raise
  except Exception as error:  # pylint: disable=broad-exception-caught
    raise SaveError(
        f"wandb did not take the dashboard ({error}); log in with `wandb "
        f"login`; where it was deleted there, delete {path}") from error
  return {name: known[name] for name in ("workspace", "report")}


def _libraries() -> tuple[Any, Any]:
  # pylint: disable=import-outside-toplevel
  try:
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2
  except ImportError as error:
    raise ValueError(f"dashboards need wandb-workspaces ({error}): "
                     "pip install 'tfjax[dashboards]'") from error
  return workspaces, v2


def _workspace(board: Board) -> Any:
  workspaces, _ = _libraries()
  return workspaces.Workspace(
      entity=board.entity, project=board.project, name=board.title,
      sections=[
          workspaces.Section(name=name, is_open=True, panels=_panels(panels))
          for name, panels in SECTIONS.items()],
      runset_settings=workspaces.RunsetSettings(
          filters=_filter(board), pinned_columns=_columns()))


def _report(board: Board, lookup: bool) -> Any:
  """`lookup`: the server is asked for the project's number."""
  _, v2 = _libraries()
  blocks: list[Any] = [v2.P(
      f"The runs of {board.title.lower()}: losses, what they cost, and the "
      "table of them all. Fits and their intervals are in the report that "
      "scripts/report.py writes, kept as an artifact of the run of type "
      "report.")]
  for name, panels in SECTIONS.items():
    blocks += [v2.H1(name), v2.PanelGrid(
        runsets=[_runset(board, lookup)], panels=_panels(panels))]
  blocks += [v2.H1("Runs"), v2.PanelGrid(
      runsets=[_runset(board, lookup)], panels=[])]
  return v2.Report(entity=board.entity, project=board.project,
                   title=board.title, blocks=blocks, width="fluid")


def _runset(board: Board, lookup: bool) -> Any:
  _, v2 = _libraries()
  where = dict(entity=board.entity, project=board.project) if lookup else {}
  return v2.Runset(name="runs", filters=_filter(board), lock_columns=True,
                   visible_columns=_columns(), **where)


def _filter(board: Board) -> Any:
  """Of these sweeps, and runs of training: not the report's own."""
  from wandb_workspaces import expr  # pylint: disable=import-outside-toplevel
  group = expr.Metric("Group")
  return expr.And(
      group == board.sweeps[0] if len(board.sweeps) == 1 else
      group.isin(list(board.sweeps)), expr.Metric("JobType") == "train")


def _columns() -> list[str]:
  return [_nested(name) if name.startswith("config:") else name
          for name in _TABLE]


def _nested(name: str) -> str:
  """wandb keeps the value of a config's first key one level down."""
  head, dot, rest = name.partition(".")
  return f"{head}.value{dot}{rest}"


def _panels(panels: Sequence[Panel]) -> list[Any]:
  """Three in a row, on a grid of 24 columns."""
  _, v2 = _libraries()
  made = [_MAKERS[type(panel)](panel) for panel in panels]
  for number, panel in enumerate(made):
    panel.layout = v2.Layout(x=8 * (number % 3), y=6 * (number // 3))
  return made


def _curves(panel: Curves) -> Any:
  _, v2 = _libraries()
  return v2.LinePlot(
      title=panel.title, x=panel.x, y=[panel.y], log_x=panel.log,
      log_y=panel.log, groupby=v2.Config(_SIZE), groupby_aggfunc="mean",
      groupby_rangefunc="minmax")


def _points(panel: Points) -> Any:
  _, v2 = _libraries()

  def metric(name: str | None) -> Any:
    if name is None:
      return None
    key = name.removeprefix("config:")
    return v2.SummaryMetric(name) if key == name else v2.Config(key)
  offsets = [100 * i / (len(_GRADIENT) - 1) for i in range(len(_GRADIENT))]
  return v2.ScatterPlot(
      title=panel.title, x=metric(panel.x), y=metric(panel.y),
      z=metric(panel.colour), log_x=True, log_y=panel.log_y,
      log_z=panel.colour is not None, running_ymin=panel.minimum,
      gradient=[v2.GradientPoint(color=color, offset=offset)
                for color, offset in zip(_GRADIENT, offsets)])


def _bars(panel: Bars) -> Any:
  _, v2 = _libraries()
  return v2.BarPlot(
      title=panel.title, metrics=[v2.SummaryMetric(panel.metric)],
      groupby=v2.Config(_SIZE), groupby_aggfunc=panel.of)


_MAKERS = {Curves: _curves, Points: _points, Bars: _bars}
