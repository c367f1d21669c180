# SPDX-License-Identifier: Apache-2.0
"""A sweep before it runs: every cell with what it takes, what is done of it
and what it shares, at once and without a change to anything.

A forecast that times real steps is `tfjax.sweep.calibrate`'s, how a sweep
stands while it runs `tfjax.sweep.watch`'s.
"""

import dataclasses
import os
from typing import Mapping, Sequence

from rich import console as console_lib
from rich import table as table_lib
from rich import text

from tfjax.cost import footprint
from tfjax.sweep import branch
from tfjax.sweep import calibrate
from tfjax.sweep import display
from tfjax.sweep import ensemble
from tfjax.sweep import forecast as forecast_lib
from tfjax.sweep import halving
from tfjax.sweep import ledger
from tfjax.sweep.specs import RunSpec
from tfjax.train import out_of_memory
from tfjax.train import records


@dataclasses.dataclass(frozen=True)
class Cell:
  """A run of the plan; what is not known is None.

  Attributes:
    memory_bytes: of a device, estimated.
    fits: whether that is there.
    seconds: of what it does itself.
    shared_flops: that its trunk spends for it, or has spent by its record.
    shares: with whom, in words; empty: with nobody.
  """

  spec: RunSpec
  state: ledger.RunState
  memory_bytes: int
  fits: bool | None
  seconds: float | None
  shared_flops: float
  shares: str

  @property
  def own(self) -> float:
    """Share of its steps, and FLOPs, that it does itself: the last ones."""
    return 1.0 - self.shared_flops / self.spec.budget.flops_total

  @property
  def left(self) -> float:
    """Share of these that are yet to be done."""
    if self.state.status in records.FINISHED:
      return 0.0
    done = (self.state.step or 0) / self.spec.budget.steps
    return min(1.0, max(0.0, 1.0 - done) / self.own)


@dataclasses.dataclass(frozen=True)
class Preview:
  """A whole plan.

  Attributes:
    workers: runs that go on at the same time.
    basis: how hours were obtained, or why they are unknown.
    machine: whose hours and memory they are.
  """

  cells: tuple[Cell, ...]
  workers: int
  basis: str
  machine: str

  @property
  def flops_total(self) -> float:
    """Of all runs, each as if it were alone."""
    return sum(cell.spec.budget.flops_total for cell in self.cells)

  @property
  def flops_shared(self) -> float:
    """Of these, those that are spent once for several runs."""
    return sum(cell.shared_flops for cell in self.cells)

  @property
  def flops_left(self) -> float:
    """That are yet to be spent."""
    return sum(cell.spec.budget.flops_total * cell.own * cell.left
               for cell in self.cells)

  def seconds(self, left: bool = False) -> float | None:
    """Of all runs one after another, or of what is left of them."""
    return footprint.total(
        None if cell.seconds is None else
        cell.seconds * (cell.left if left else 1.0)
        for cell in self.cells)

  def wall_seconds_left(self) -> float | None:
    """Until the last run ends, were the workers to begin now."""
    return forecast_lib.makespan(
        [None if cell.seconds is None else cell.seconds * cell.left
         for cell in self.cells], self.workers)


def look(specs: Sequence[RunSpec], workdir: str | os.PathLike[str],
         workers: int | None = None,
         calibration: calibrate.Calibration | None = None) -> Preview:
  """What running the specs in `workdir` would take.

  Args:
    workers: as of `tfjax.sweep.launch`.
    calibration: of real steps; None: hours are by what is known without.

  Raises:
    ConfigError: as `tfjax.cost.estimate` does.
    RecordError: a result in `workdir` is damaged.
  """
  states = {spec.run_id: ledger.run_state(workdir, spec.run_id)
            for spec in specs}
  settled = _settled_shares(specs, workdir, states)
  alone = {run_id for run_id, flops in settled.items() if not flops}
  forecast = (
      forecast_lib.at_once(specs, workers, workdir, alone)
      if calibration is None else
      forecast_lib.here(specs, workers, calibration, alone))
  words = _shares(specs, forecast.workers) | dict.fromkeys(alone, _ALONE)
  cells = tuple(
      Cell(spec, states[spec.run_id], one.memory_bytes["total"], one.fits,
           one.seconds, settled.get(
               spec.run_id, spec.budget.flops_total - one.budget.flops_total),
           words.get(spec.run_id, ""))
      for spec, one in zip(specs, forecast.estimates))
  machine = forecast.estimates[0].machine
  kind = (machine.hardware.label if machine.hardware else
          machine.device_kind or "an unknown device")
  return Preview(cells, forecast.workers, forecast.basis,
                 f"{machine.num_devices:,} x {kind} a run")


def show(console: console_lib.Console, preview: Preview) -> None:
  """Prints the cells and, below them, what they come to."""
  console.print(_table(preview))
  for line in _words(preview):
    console.print(line, markup=False, highlight=False, soft_wrap=True)


# --- Details -----------------------------------------------------------------

_ALONE = "alone"


def _settled_shares(
    specs: Sequence[RunSpec], workdir: str | os.PathLike[str],
    states: Mapping[str, ledger.RunState]) -> dict[str, float]:
  """By run id, of branches of which it is settled: the FLOPs that a trunk has
  spent for them, which is none where it left them no checkpoint."""
  found = {}
  for run_id, given in branch.options(specs).items():
    state = states[run_id]
    if "branch" in given and state.status in records.FINISHED:
      found[run_id] = (state.result or {}).get("shared_flops") or 0.0
    elif not state.step and branch.is_alone(workdir, given):
      found[run_id] = 0.0
  return found


def _shares(specs: Sequence[RunSpec], workers: int) -> dict[str, str]:
  """By run id, in words, whom it shares work or its fate with."""
  numbers = {spec.run_id: number for number, spec in enumerate(specs, 1)}
  found = {}
  for run_id, given in branch.options(specs).items():
    if "branch" in given:
      trunk = given["branch"]
      found[run_id] = (f"off {numbers[trunk['run_id']]} at step "
                       f"{trunk['step']:,}")
    else:
      found[run_id] = "trunk"
  for group in halving.groups(specs):
    for spec in group:
      found[spec.run_id] = f"halving of {len(group)}"
  others = [spec for spec in specs if spec.run_id not in found]
  for group in ensemble.groups(others, workers):
    if len(group) > 1:
      found |= {spec.run_id: f"one step with {len(group) - 1} others"
                for spec in group}
  return found


def _table(preview: Preview) -> table_lib.Table:
  cells, si = preview.cells, display.si
  budgets = [cell.spec.budget for cell in cells]
  finished = sum(cell.state.status in records.FINISHED for cell in cells)
  shares = any(cell.shares for cell in cells)
  columns = [
      ("", ""), ("run", f"{len(cells)} runs"), ("N", ""),
      ("D", si(sum(one.tokens for one in budgets))), ("D/N", ""),
      ("epochs", ""), ("steps", f"{sum(one.steps for one in budgets):,}"),
      ("FLOPs", si(preview.flops_total)), ("memory", ""),
      ("hours", hours(preview.seconds())), ("shares", ""),
      ("state", f"{finished} done")]
  result = table_lib.Table(
      box=None, padding=(0, 1), pad_edge=False, header_style="bold",
      show_footer=True, footer_style="bold")
  for name, footer in columns:
    if name != "shares" or shares:
      result.add_column(
          name, footer, no_wrap=True, overflow="ellipsis",
          justify="left" if name in ("run", "state", "shares") else "right")
  for number, cell in enumerate(cells, 1):
    budget = cell.spec.budget
    row = [str(number), cell.spec.run_id, si(budget.params_total),
           si(budget.tokens), f"{budget.tokens_per_parameter:.3g}",
           "-" if budget.epochs is None else f"{budget.epochs:.2f}",
           f"{budget.steps:,}", si(budget.flops_total),
           out_of_memory.binary(cell.memory_bytes) + "!" * (cell.fits is False),
           hours(cell.seconds)]
    row += [cell.shares] if shares else []
    result.add_row(*map(text.Text, row), _state(cell))
  return result


def _state(cell: Cell) -> text.Text:
  done = cell.state.status in records.FINISHED
  words = cell.state.status
  if not done and 0.0 < cell.left < 1.0:
    words += f" at {1.0 - cell.left:.0%}"
  return text.Text(words, style="green" if done else "")


def _words(preview: Preview) -> list[str]:
  """What the table does not say, a line each."""
  si, lines = display.si, []
  if preview.flops_shared:
    lines.append(
        f"shared: {si(preview.flops_shared)} FLOPs of "
        f"{si(preview.flops_total)}, "
        f"{preview.flops_shared / preview.flops_total:.0%}, are a trunk's and "
        "are spent once")
  alone = sum(cell.shares == _ALONE and cell.left > 0 for cell in preview.cells)
  if alone:
    lines.append(
        f"alone: {alone} run{'s' * (alone > 1)} of those that could share a "
        "trunk, which is past where they would branch off and has left no "
        "checkpoint there")
  lines.append(
      f"left: {si(preview.flops_left)} FLOPs, {hours(preview.seconds(True))} "
      f"h of runs, {hours(preview.wall_seconds_left())} h with "
      f"{preview.workers} at a time on {preview.machine}")
  unknown = any(cell.seconds is None for cell in preview.cells)
  lines.append(f"hours: {preview.basis}" + (
      "; with --timing every model is timed for a moment" if unknown else ""))
  too_large = sum(cell.fits is False for cell in preview.cells)
  if too_large:
    lines.append(
        f"memory: {too_large} run{'s' * (too_large > 1)} (marked !) would not "
        "fit by estimate; scripts/plan.py says the ways out")
  return lines


def hours(seconds: float | None) -> str:
  """Three digits of hours; unknown is '-'."""
  return "-" if seconds is None else f"{seconds / 3600:.3g}"
