# SPDX-License-Identifier: Apache-2.0
"""Where the runs of a sweep's directory stand, as a table.

One look, whoever is at the runs; what goes on looking is `tfjax.sweep.display`
and `tfjax.sweep.live`.
"""

import os
from typing import Sequence

from rich import console as console_lib
from rich import table as table_lib
from rich import text

from tfjax.sweep import display
from tfjax.sweep import watch as watch_lib
from tfjax.train import records

_ORDER = ("complete", "diverged", "stopped", "running", "interrupted", "failed",
          "damaged", "pending")


def show(console: console_lib.Console, workdir: str | os.PathLike[str],
         run_ids: Sequence[str] | None = None) -> list[watch_lib.Run]:
  """Prints every planned run and, below, what they come to; returns them.

  Args:
    run_ids: these alone.

  Raises:
    FileNotFoundError: no sweep was launched there, or its plan is damaged.
  """
  watch = watch_lib.Watch(workdir)
  watch.refresh()
  if watch.problem:
    raise FileNotFoundError(watch.problem)
  runs = [run for run_id, run in watch.runs.items()
          if run_ids is None or run_id in run_ids]
  console.print(_table(runs))
  for line in _words(runs, watch if run_ids is None else None, workdir):
    console.print(line, markup=False, highlight=False, soft_wrap=True)
  return runs


def _table(runs: Sequence[watch_lib.Run]) -> table_lib.Table:
  labels = display.row_labels([run.row for run in runs])
  result = table_lib.Table(box=None, padding=(0, 1), pad_edge=False,
                           header_style="bold")
  for name in ("state", "run", "params × tokens", "step", "loss", "tokens/s",
               "why"):
    result.add_column(
        name, overflow="ellipsis", no_wrap=name != "why",
        justify="right" if name in ("step", "loss", "tokens/s") else "left")
  for run in runs:
    state, step = run.state, run.state.step
    why = (state.reason or "").partition("\n")[0]
    if state.status == "running" and state.host:
      why = f"on {state.host}"
    result.add_row(
        text.Text(state.status, style=display.STYLES.get(state.status, "")),
        text.Text(run.run_id), text.Text(labels[run.run_id]),
        f"{'-' if step is None else f'{step:,}'}/{run.row['steps']:,}",
        "-" if state.loss is None else f"{state.loss:.4f}",
        display.si(state.tokens_per_second), text.Text(why))
  return result


def _words(runs: Sequence[watch_lib.Run], watch: watch_lib.Watch | None,
           workdir: str | os.PathLike[str]) -> list[str]:
  """Totals, and what to type where something is to be done."""
  counts = {name: sum(run.state.status == name for run in runs)
            for name in _ORDER}
  total = sum(run.flops_total for run in runs)
  done = sum(run.flops_settled for run in runs)
  lines = [
      f"{num_runs(len(runs))}: " + ", ".join(
          f"{count} {name}" for name, count in counts.items() if count),
      f"{done / total if total else 0:.0%} of {display.si(total)} FLOPs done, "
      + _spent(runs)]
  left = watch and watch.device_seconds_left()
  if left:
    lines[-1] += f"; about {left / 3600:.3g} left"
  # Of what is settled, what runs that were stopped or diverged leave undone.
  spared = sum(run.flops_total - run.flops_done for run in runs
               if run.state.status in ("stopped", "diverged"))
  if spared:
    lines.append(f"of these, {display.si(spared)} FLOPs were spared, as "
                 "their runs were stopped or diverged")
  if counts["damaged"]:
    lines.append("a damaged record stands in the way of its run; the table "
                 "says what to delete")
  if counts["failed"] or counts["interrupted"]:
    lines.append("to run what failed or was interrupted: "
                 + display.retry_command(workdir))
  if counts["pending"] and not counts["running"]:
    lines.append("to run all that is not done: "
                 + display.retry_command(workdir, "run"))
  return lines


def _spent(runs: Sequence[watch_lib.Run]) -> str:
  """Device-hours so far; what no run has begun takes nothing yet."""
  begun = [run.device_seconds for run in runs if run.state.status != "pending"]
  known = [seconds for seconds in begun if seconds is not None]
  if begun and not known:
    return "device-hours unknown"
  unknown = len(begun) - len(known)
  return f"{sum(known) / 3600:.3g} device-hours" + (
      f" and those of {num_runs(unknown)} without a record" if unknown else "")


def num_runs(count: int) -> str:
  """So many runs, in words."""
  return f"{count} run{'s' * (count != 1)}"


def is_done(run: watch_lib.Run) -> bool:
  """Whether a run has ended for good."""
  return run.state.status in records.FINISHED
