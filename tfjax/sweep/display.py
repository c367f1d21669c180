# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a sweep: the plan, its progress, how it ended.

On a terminal a live display; elsewhere a plain line at each event and a total
now and then. Numbers come from the ledger.
"""

import collections
import time
from typing import Any, Mapping, Sequence

from rich import console as console_lib
from rich import live
from rich import markup
from rich import progress_bar
from rich import table as table_lib
from rich import text

from tfjax import config as config_lib
from tfjax.sweep import ledger
from tfjax.sweep.launch import Observer
from tfjax.sweep.launch import Outcome
from tfjax.sweep.plan import flat
from tfjax.sweep.plan import RunSpec
from tfjax.train import records

_LIVE_SECONDS = 0.5  # between refreshes
_PLAIN_SECONDS = 15.0  # between totals
_RECENT = 5
_STATUS_WIDTH = len("complete")
_WIDE = 110  # columns from which run ids are shown too
_STOPPING = "stopping after a checkpoint; once more stops at once"
_STYLES = {"complete": "green", "diverged": "yellow", "failed": "red",
           "interrupted": "yellow", "running": "cyan", "pending": "dim"}


def make(console: console_lib.Console, specs: Sequence[RunSpec],
         workdir: str) -> "Display":
  """The display that suits where the output goes."""
  return (Live if console.is_terminal else Plain)(console, specs, workdir)


class Display(Observer):
  """Keeps count of a launch; subclasses show it."""

  def __init__(self, console: console_lib.Console, specs: Sequence[RunSpec],
               workdir: str):
    self.console = console
    self.outcomes: list[Outcome] = []
    self.seconds: dict[str, float] = {}  # wall time of runs of this launch
    self._specs = list(specs)
    self._labels = labels(specs)
    self._workdir = workdir
    self._begun = time.monotonic()
    self._shown = -float("inf")
    self._workers = 0
    self._running: dict[str, RunSpec] = {}
    self._started: dict[str, float] = {}
    self._states: dict[str, ledger.RunState] = {}
    self._resumed_at: dict[str, int] = {}

  def launched(self, specs: Sequence[RunSpec], workers: int) -> None:
    del specs
    self._workers = workers

  def started(self, spec: RunSpec) -> None:
    # What an earlier attempt has left does not count as this launch's work.
    state = ledger.progress(self._workdir, spec.run_id)
    self._resumed_at[spec.run_id] = state.step or 0
    self._states[spec.run_id] = state
    self._running[spec.run_id] = spec
    self._started[spec.run_id] = time.monotonic()

  def ended(self, outcome: Outcome) -> None:
    run_id = outcome.spec.run_id
    self._running.pop(run_id, None)
    if run_id in self._started:
      self.seconds[run_id] = time.monotonic() - self._started[run_id]
    self.outcomes.append(outcome)

  def tick(self) -> None:
    if time.monotonic() - self._shown >= self._interval:
      self._shown = time.monotonic()
      for run_id in self._running:
        self._states[run_id] = ledger.progress(self._workdir, run_id)
      self._show()

  _interval = _LIVE_SECONDS

  def _show(self) -> None:
    raise NotImplementedError

  @property
  def elapsed(self) -> float:
    return time.monotonic() - self._begun

  def flops(self) -> tuple[float, float, float]:
    """FLOPs that are done, that this launch did, and of the whole sweep."""
    done = mine = 0.0
    for outcome in self.outcomes:
      budget, status = outcome.spec.budget, outcome.state.status
      share = (outcome.state.step or 0) / budget.steps
      # Nothing is left to do of a run that ended early and for good.
      done += budget.flops_total * (share if status == "interrupted" else 1)
      if not outcome.skipped:
        begun = self._resumed_at.get(outcome.spec.run_id, 0) / budget.steps
        mine += budget.flops_total * max(0.0, share - begun)
    for run_id, spec in self._running.items():
      share = (self._states[run_id].step or 0) / spec.budget.steps
      begun = self._resumed_at[run_id] / spec.budget.steps
      done += spec.budget.flops_total * share
      mine += spec.budget.flops_total * max(0.0, share - begun)
    return done, mine, sum(spec.budget.flops_total for spec in self._specs)

  def remaining_seconds(self) -> float | None:
    """At this launch's FLOP/s so far; None before there are any."""
    done, mine, total = self.flops()
    return (total - done) * self.elapsed / mine if mine else None

  def counts(self) -> str:
    """How many runs stand where."""
    tally = collections.Counter(
        "skipped" if outcome.skipped else outcome.state.status
        for outcome in self.outcomes)
    tally["running"] += len(self._running)
    tally["waiting"] = (
        len(self._specs) - len(self.outcomes) - len(self._running))
    order = ("complete", "skipped", "diverged", "failed", "interrupted",
             "running", "waiting")
    return ", ".join(f"{tally[name]} {name}" for name in order if tally[name])


class Plain(Display):
  """Lines, for a file or a pipe."""

  _interval = _PLAIN_SECONDS

  def launched(self, specs: Sequence[RunSpec], workers: int) -> None:
    super().launched(specs, workers)
    self._shown = time.monotonic()
    self._say(f"{len(specs)} of {len(self._specs)} runs to do, "
              f"{len(self.outcomes)} done before; {workers} "
              f"worker{'s' if workers > 1 else ''}")

  def started(self, spec: RunSpec) -> None:
    super().started(spec)
    at = self._resumed_at[spec.run_id]
    self._say(f"start    {self._labels[spec.run_id]}  {spec.run_id}"
              + (f"  (resumes near step {at:,})" if at else ""))

  def ended(self, outcome: Outcome) -> None:
    super().ended(outcome)
    if not outcome.skipped or outcome.state.status == "running":
      self._say(ending(outcome, self._labels, self.seconds))

  def stopping(self) -> None:
    self._say(_STOPPING)

  def _show(self) -> None:
    done, _, total = self.flops()
    self._say(f"total    {done / total:.0%} of {si(total)} FLOPs; "
              f"{self.counts()}; ETA {clock(self.remaining_seconds())}")

  def _say(self, line: str) -> None:
    self.console.print(f"[{clock(self.elapsed)}] {line}", markup=False,
                       highlight=False, soft_wrap=True)


class Live(Display):
  """A display that stays in place, a line a running run."""

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
      self._live.stop()

  def _show(self) -> None:
    self._live.refresh()

  def render(self) -> console_lib.Group:
    """The display as it stands."""
    done, _, total = self.flops()
    head = table_lib.Table.grid(padding=(0, 1), expand=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    head.add_row(
        progress_bar.ProgressBar(total=1.0, completed=done / total),
        f"[bold]{done / total:.0%}[/] of {si(total)} FLOPs  "
        f"{clock(self.elapsed)} gone  [bold]ETA "
        f"{clock(self.remaining_seconds())}[/]")
    parts: list[Any] = [head, text.Text(
        f"{self.counts()}; {self._workers} "
        f"worker{'s' if self._workers > 1 else ''}{self._note}", style="dim")]
    if self._running:
      parts.append(self._running_table())
    fresh = [one for one in self.outcomes if not one.skipped][-_RECENT:]
    parts += [text.Text(ending(one, self._labels, self.seconds),
                        style=_STYLES[one.state.status], no_wrap=True,
                        overflow="ellipsis") for one in fresh]
    return console_lib.Group(*parts)

  def _running_table(self) -> table_lib.Table:
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
    for run_id, spec in self._running.items():
      state, steps = self._states[run_id], spec.budget.steps
      step = state.step or 0
      speed = state.tokens_per_second
      left = ((steps - step) * spec.budget.batch_tokens / speed
              if speed else None)
      cells: list[Any] = [text.Text(self._labels[run_id])]
      if wide:
        cells.append(text.Text(run_id))
      cells += [progress_bar.ProgressBar(total=steps, completed=step),
                f"{step:,}/{steps:,}", si(speed),
                "-" if state.loss is None else f"{state.loss:.3f}",
                clock(left)]
      result.add_row(*cells)
    return result


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
  if state.reason:
    parts.append(state.reason.splitlines()[0])
  return "  ".join(parts)


def plan_table(specs: Sequence[RunSpec],
               states: Mapping[str, ledger.RunState]) -> table_lib.Table:
  """Every cell of a plan, with its size and what is done of it."""
  result = table_lib.Table(box=None, padding=(0, 1), pad_edge=False,
                           header_style="bold", show_footer=True,
                           footer_style="bold")
  sums = [sum(getattr(spec.budget, name) for spec in specs)
          for name in ("tokens", "steps", "flops_total")]
  finished = sum(states[spec.run_id].status in records.FINISHED
                 for spec in specs)
  result.add_column("run", f"{len(specs)} runs", no_wrap=True,
                    overflow="ellipsis")
  for name, footer in (
      ("N", ""), ("D", si(sums[0])), ("D/N", ""), ("epochs", ""),
      ("steps", f"{sums[1]:,}"), ("FLOPs", si(sums[2])),
      ("state", f"{finished} done")):
    result.add_column(name, footer, no_wrap=True,
                      justify="left" if name == "state" else "right")
  for spec in specs:
    budget, status = spec.budget, states[spec.run_id].status
    result.add_row(
        markup.escape(spec.run_id), si(budget.params_total),
        si(budget.tokens), f"{budget.tokens_per_parameter:.3g}",
        "-" if budget.epochs is None else f"{budget.epochs:.2f}",
        f"{budget.steps:,}", si(budget.flops_total),
        f"[{_STYLES[status]}]{status}[/]")
  return result


def labels(specs: Sequence[RunSpec]) -> dict[str, str]:
  """A short label a run: N and D, and what else tells it from its like."""
  sizes = {spec.run_id: f"{si(spec.budget.params_total)} × "
           f"{si(spec.budget.tokens)}" for spec in specs}
  alike = collections.defaultdict(list)
  for spec in specs:
    alike[sizes[spec.run_id]].append(spec)
  result = {}
  for size, group in alike.items():
    values = [flat(config_lib.to_dict(spec.config)) for spec in group]
    apart = [key for key in values[0]
             if any(one[key] != values[0][key] for one in values)]
    for spec, own in zip(group, values):
      extra = [f"{key.rpartition('.')[2]}={own[key]}" for key in apart
               if not key.startswith("duration.")]
      result[spec.run_id] = " ".join([size, *extra])
  return result


def si(value: float | None) -> str:
  """Three digits and a decimal prefix: '1.23M'."""
  if value is None:
    return "-"
  for power, prefix in zip(range(24, 0, -3), "YZEPTGMk"):
    if abs(value) >= 0.9995 * 10.0**power:
      return f"{value / 10.0**power:.3g}{prefix}"
  return f"{value:.3g}"


def clock(seconds: float | None) -> str:
  """m:ss, or h:mm:ss."""
  if seconds is None:
    return "-:--"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (f"{hours}:{minutes:02}:{rest:02}" if hours
          else f"{minutes}:{rest:02}")
