# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a sweep while it goes on, and how its runs are called.

On a screen a display that stays in place; elsewhere a plain line at each event
and a total now and then. Numbers come from `watch`, and so from the files.
"""

import collections
import math
import os
import pathlib
import shlex
import sys
import time
from typing import Any, Mapping, Sequence

from rich import console as console_lib
from rich import live
from rich import progress_bar
from rich import table as table_lib
from rich import text

import tfjax
from tfjax import config as config_lib
from tfjax.sweep import ledger
from tfjax.sweep import watch as watch_lib
from tfjax.sweep.launch import Observer
from tfjax.sweep.launch import Outcome
from tfjax.sweep.specs import flat
from tfjax.sweep.specs import RunSpec

_LIVE_SECONDS = 0.5  # between refreshes
_ALL_SECONDS = 5.0  # between looks at runs that others may be at
# Between totals: often at first, at last a few an hour.
_LEAST_PLAIN_SECONDS, _MOST_PLAIN_SECONDS, _PLAIN_SHARE = 15.0, 600.0, 0.05
_RECENT = 5
_STATUS_WIDTH = len("complete")
_WIDE = 110  # columns from which run ids are shown too
_STOPPING = "stopping after a checkpoint; once more stops at once"
STYLES = {"complete": "green", "stopped": "magenta", "diverged": "yellow",
          "failed": "red", "damaged": "red", "interrupted": "yellow",
          "running": "cyan", "pending": "dim"}
_WORDS = {"pending": "waiting"}


def make(console: console_lib.Console, specs: Sequence[RunSpec],
         workdir: str) -> "Display":
  """The display that suits where the output goes."""
  # FORCE_COLOR makes rich take a pipe for a terminal; it is none to draw on.
  is_screen = console.is_interactive and console.file.isatty()
  return (Live if is_screen else Plain)(console, specs, workdir)


class Display(Observer):
  """Keeps count of a launch; subclasses show it."""

  def __init__(self, console: console_lib.Console, specs: Sequence[RunSpec],
               workdir: str):
    self.console = console
    self.outcomes: list[Outcome] = []  # that were not there before
    self.seconds: dict[str, float] = {}  # wall time of runs of this launch
    self.watch = watch_lib.Watch(workdir, [spec.run_id for spec in specs])
    self._specs = list(specs)
    self._labels = labels(specs)
    self._workdir = workdir
    self._begun = time.monotonic()
    self._shown = self._looked = -float("inf")
    self._workers = 0
    self._running: dict[str, RunSpec] = {}  # here
    self._started: dict[str, float] = {}

  def launched(self, specs: Sequence[RunSpec], workers: int) -> None:
    del specs
    self._workers = workers
    self._look()

  def started(self, spec: RunSpec) -> None:
    self._running[spec.run_id] = spec
    self._started[spec.run_id] = time.monotonic()
    self.watch.refresh([spec.run_id])

  def put_back(self, spec: RunSpec, reason: str) -> None:
    self._running.pop(spec.run_id, None)
    self.watch.refresh([spec.run_id])

  def ended(self, outcome: Outcome) -> None:
    run_id = outcome.spec.run_id
    self._running.pop(run_id, None)
    if run_id in self._started:
      self.seconds[run_id] = time.monotonic() - self._started[run_id]
    if self._workers:  # launched: the others had ended before
      self.outcomes.append(outcome)
      self.watch.refresh([run_id])

  def tick(self) -> None:
    if time.monotonic() - self._shown >= self._interval():
      self._shown = time.monotonic()
      if self._shown - self._looked >= _ALL_SECONDS:
        self._look()
      else:
        self.watch.refresh(list(self._running))
      self._show()

  def _look(self) -> None:
    self._looked = time.monotonic()
    self.watch.refresh()

  def _interval(self) -> float:
    raise NotImplementedError

  def _show(self) -> None:
    raise NotImplementedError

  @property
  def elapsed(self) -> float:
    return time.monotonic() - self._begun

  def elsewhere(self) -> list[str]:
    """Runs that other launchers are at."""
    return [run_id for run_id, run in self.watch.runs.items()
            if run.state.status == "running" and run_id not in self._running]

  def progress(self) -> str:
    """The share of all FLOPs, and the time that the rest will take."""
    share, left = self.watch.share_done, self.watch.seconds_left()
    total = sum(run.flops_total for run in self.watch.runs.values())
    return (f"{percent(share)} of {si(total)} FLOPs  {clock(self.elapsed)} gone"
            f"  ETA {'unknown' if left is None else clock(left)}")

  def counts(self) -> str:
    """How many runs stand where."""
    tally = collections.Counter(
        "running" if run_id in self._running else run.state.status
        for run_id, run in self.watch.runs.items())
    elsewhere = len(self.elsewhere())
    parts = [f"{tally[name]} {_WORDS.get(name, name)}" + (
        f" ({elsewhere} elsewhere)" if name == "running" and elsewhere else "")
             for name in STYLES if tally[name]]
    return ", ".join(parts)

  def last_failure(self) -> Outcome | None:
    """Of this launch."""
    return next((one for one in reversed(self.outcomes)
                 if one.state.status == "failed"), None)


class Plain(Display):
  """Lines, for a file or a pipe."""

  def launched(self, specs: Sequence[RunSpec], workers: int) -> None:
    super().launched(specs, workers)
    self._shown = time.monotonic()
    self._say(f"{len(specs)} of {len(self._specs)} runs to do, "
              f"{len(self._specs) - len(specs)} done before; {workers} "
              f"worker{'s' if workers > 1 else ''}")

  def started(self, spec: RunSpec) -> None:
    super().started(spec)
    run = self.watch.runs.get(spec.run_id)
    at = run.state.step if run else None
    self._say(f"start    {self._labels[spec.run_id]}  {spec.run_id}"
              + (f"  (has rows up to step {at:,})" if at else ""))

  def put_back(self, spec: RunSpec, reason: str) -> None:
    super().put_back(spec, reason)
    self._say(f"put back {self._labels[spec.run_id]}  "
              f"{_first_line(reason)}")

  def ended(self, outcome: Outcome) -> None:
    first = self.last_failure() is None
    super().ended(outcome)
    if not self._workers:
      return
    self._say(ending(outcome, self._labels, self.seconds))
    if outcome.state.status == "failed":
      self._say(f"         its log: {_log(self._workdir, outcome)}")
      if first:
        self._say("         to try again what has failed: "
                  f"{retry_command(self._workdir)}")

  def stopping(self) -> None:
    self._say(_STOPPING)

  def _interval(self) -> float:
    return min(_MOST_PLAIN_SECONDS,
               max(_LEAST_PLAIN_SECONDS, _PLAIN_SHARE * self.elapsed))

  def _show(self) -> None:
    self._say(f"total    {self.progress()}; {self.counts()}")

  def _say(self, line: str) -> None:
    self.console.print(f"[{clock(self.elapsed)}] {line}", markup=False,
                       highlight=False, soft_wrap=True)


class Live(Display):
  """A display that stays in place and within the screen: the runs that go on,
  a line each, those that ended last, and the last failure."""

  def __init__(self, console: console_lib.Console, specs: Sequence[RunSpec],
               workdir: str):
    super().__init__(console, specs, workdir)
    self._note = ""
    # Refreshed by `tick`, without a thread of its own.
    self._live = live.Live(console=console, auto_refresh=False,
                           get_renderable=self.render)

  def launched(self, specs: Sequence[RunSpec], workers: int) -> None:
    super().launched(specs, workers)
    self._live.start()

  def stopping(self) -> None:
    self._note = f"; {_STOPPING}"

  def closed(self) -> None:
    if self._live.is_started:
      self._look()
      self._live.stop()

  def _interval(self) -> float:
    return _LIVE_SECONDS

  def _show(self) -> None:
    self._live.refresh()

  def render(self) -> console_lib.Group:
    """The display as it stands, no higher than the screen."""
    workers = f"{self._workers} worker{'s' if self._workers > 1 else ''}"
    above: list[Any] = [self._head(), text.Text(
        f"{self.counts()}; {workers}{self._note}", style="dim",
        overflow="fold")]
    failed = self.last_failure()
    others = [one for one in self.outcomes if one is not failed]
    recent = max(0, min(_RECENT, (self.console.height - 10) // 4))
    below = [self._ending(one)
             for one in others[max(0, len(others) - recent):]]
    below += [] if failed is None else self._failure(failed)
    shown = [*self._running, *self.elsewhere()]
    if not shown:
      return console_lib.Group(*above, *below)
    # Less the table's header and the line that the cursor stays in.
    room = self.console.height - 2 - sum(
        len(self.console.render_lines(part)) for part in [*above, *below])
    if len(shown) > room:
      room = max(1, room - 1)
      below.insert(0, self._line(f"and {len(shown) - room} more", "dim"))
    return console_lib.Group(*above, self._running_table(shown[:room]), *below)

  def _line(self, words: str, style: str) -> text.Text:
    """One line, whatever the width."""
    return text.Text(words, style=style, no_wrap=True, overflow="ellipsis")

  def _head(self) -> table_lib.Table:
    head = table_lib.Table.grid(padding=(0, 1), expand=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    head.add_row(_bar(self.watch.share_done or 0.0),
                 text.Text(self.progress(), style="bold"))
    return head

  def _ending(self, outcome: Outcome) -> text.Text:
    return self._line(ending(outcome, self._labels, self.seconds),
                      STYLES.get(outcome.state.status, ""))

  def _failure(self, failed: Outcome) -> list[text.Text]:
    """How a run failed, and how to try again."""
    return [
        self._ending(failed),
        self._line(f"its log: {_log(self._workdir, failed)}", "red"),
        # A command that is cut short is of no use.
        text.Text(f"to try again what failed: {retry_command(self._workdir)}",
                  style="red", overflow="fold")]

  def _running_table(self, run_ids: Sequence[str]) -> table_lib.Table:
    wide = self.console.width >= _WIDE
    result = table_lib.Table(box=None, padding=(0, 1), expand=True,
                             header_style="dim", pad_edge=False)
    result.add_column("params × tokens", no_wrap=True, overflow="ellipsis",
                      ratio=None)
    if wide:
      result.add_column("run", no_wrap=True, overflow="ellipsis")
    result.add_column("", ratio=1, min_width=8)
    for name in ("step", "tokens/s", "loss", "ETA"):
      result.add_column(name, justify="right", no_wrap=True)
    for run_id in run_ids:
      run = self.watch.runs.get(run_id)
      if run is not None:
        result.add_row(*self._cells(run, wide))
    return result

  def _cells(self, run: watch_lib.Run, wide: bool) -> list[Any]:
    """Of a run that goes on, here or elsewhere."""
    state, steps = run.state, run.row["steps"]
    step, speed = state.step or 0, state.tokens_per_second
    left = ((1 - step / steps) * run.row["tokens"] / speed if speed else None)
    label = self._labels[run.run_id]
    here = run.run_id in self._running
    if not here:
      label += f"  on {state.host or 'another host'}"
    style = "" if here else "dim"
    return [text.Text(label, style=style),
            *([text.Text(run.run_id, style=style)] if wide else []),
            _bar(step / steps),
            f"{step:,}/{steps:,}", si(speed),
            "-" if state.loss is None else f"{state.loss:.3f}", clock(left)]


def _bar(share: float) -> progress_bar.ProgressBar:
  return progress_bar.ProgressBar(total=1.0, completed=share,
                                  complete_style="cyan",
                                  finished_style="green")


def ending(outcome: Outcome, names: Mapping[str, str],
           seconds: Mapping[str, float]) -> str:
  """How one run ended, in a line."""
  state = outcome.state
  parts = [f"{state.status:<{_STATUS_WIDTH}} {names[state.run_id]}"]
  if state.status == "complete" and state.loss is not None:
    parts.append(f"loss {state.loss:.4f}")
  if state.status == "complete" and state.run_id in seconds:
    parts.append(clock(seconds[state.run_id]))
  if state.status == "running":
    parts.append("by another process; left to it")
  elif outcome.skipped:
    parts.append("by another process")
  if state.reason:
    parts.append(_first_line(state.reason))
  return "  ".join(parts)


def _first_line(reason: str) -> str:
  return next(iter(reason.splitlines()), "")


def _log(workdir: str | os.PathLike[str], outcome: Outcome) -> str:
  return _near(pathlib.Path(workdir) / outcome.spec.run_id / ledger.LOG)


def labels(specs: Sequence[RunSpec]) -> dict[str, str]:
  """A short label a run: N and D, and what else tells it from its like."""
  return _labels([
      (spec.run_id, spec.budget.params_total, spec.budget.tokens,
       flat(config_lib.to_dict(spec.config))) for spec in specs])


def row_labels(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """The same of rows of the ledger's plan."""
  return _labels([(row["run_id"], row["params_total"], row["tokens"],
                   row["config"]) for row in rows])


def _labels(runs: Sequence[tuple[str, int, int, Mapping[str, Any]]]
            ) -> dict[str, str]:
  """Of run ids, N, D, and all that may differ by dotted keys."""
  alike = collections.defaultdict(list)
  for run_id, params, tokens, values in runs:
    alike[f"{si(params)} × {si(tokens)}"].append((run_id, values))
  result = {}
  for size, group in alike.items():
    apart = [key for key in group[0][1]
             if any(values.get(key) != group[0][1][key]
                    for _, values in group)]
    for run_id, values in group:
      extra = [f"{key.rpartition('.')[2]}={values.get(key)}" for key in apart
               if not key.startswith("duration.")]
      result[run_id] = " ".join([size, *extra])
  return result


def retry_command(workdir: str | os.PathLike[str],
                  command: str = "retry") -> str:
  """What to type to try again what has failed there, or to `run` the rest."""
  script = pathlib.Path(tfjax.__file__).resolve().parents[1] / "scripts"
  return shlex.join([_near(sys.executable), _near(script / "sweep.py"),
                     command, f"--workdir={_near(workdir)}"])


def _near(path: str | os.PathLike[str]) -> str:
  """As it is called from the current directory, if it lies below that."""
  path = pathlib.Path(os.path.abspath(path))
  try:
    return str(path.relative_to(pathlib.Path.cwd()))
  except ValueError:
    return str(path)


def si(value: float | None) -> str:
  """Three digits and a decimal prefix: '1.23M'."""
  if value is None:
    return "-"
  for power, prefix in zip(range(24, 0, -3), "YZEPTGMk"):
    if abs(value) >= 0.9995 * 10.0**power:
      return f"{value / 10.0**power:.3g}{prefix}"
  return f"{value:.3g}"


def percent(share: float | None) -> str:
  """100% only of all of it."""
  return "-" if share is None else f"{math.floor(100 * share + 1e-9)}%"


def clock(seconds: float | None) -> str:
  """m:ss, or h:mm:ss."""
  if seconds is None:
    return "-:--"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (f"{hours}:{minutes:02}:{rest:02}" if hours
          else f"{minutes}:{rest:02}")
