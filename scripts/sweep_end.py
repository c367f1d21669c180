# SPDX-License-Identifier: Apache-2.0
"""How scripts/sweep.py ends: what it says, and its exit codes."""

import collections
import pathlib
import shlex
import sys
from typing import Sequence

from rich import console as console_lib

from tfjax import sweep
from tfjax.sweep import status
from tfjax.train import records

OK, FAILED, STOPPED = 0, 1, 130


def say(console: console_lib.Console, outcomes: Sequence[sweep.Outcome],
        seconds: float, workdir: str, stopped: bool) -> int:
  """Prints how the runs stand, and what to type for those that are not done;
  returns the exit code."""
  console.print(_summary(outcomes, seconds), markup=False, highlight=False,
                soft_wrap=True)
  undone = [one for one in outcomes
            if one.state.status not in records.FINISHED]
  failed = [one for one in undone if one.state.status == "failed"]
  for one in failed if stopped else undone:
    print(f"{one.state.status}: {one.spec.run_id}: {reason(one.state)}",
          file=sys.stderr)
    log = pathlib.Path(workdir) / one.spec.run_id / sweep.ledger.LOG
    if log.exists():  # a worker's
      print(f"  log: {log}", file=sys.stderr)
  if undone:
    if len(failed) == len(undone):
      again = sweep.display.retry_command(workdir)
    else:
      again = shlex.join([sys.executable, *sys.argv])
    print(f"{'stopped; ' if stopped else ''}to run what is not done: {again}",
          file=sys.stderr)
  return STOPPED if stopped else FAILED if undone else OK


def reason(state: sweep.ledger.RunState) -> str:
  """Why a run is not done, in a line."""
  return (state.reason or (
      "another process is at it" if state.status == "running" else
      "no reason is known")).splitlines()[0]


def _summary(outcomes: Sequence[sweep.Outcome], seconds: float) -> str:
  """One line: runs by how they ended, wall time, tokens and FLOPs trained."""
  tally = collections.Counter(
      "skipped (done before)"
      if one.skipped and one.state.status in records.FINISHED
      else one.state.status for one in outcomes)
  done = [(_own(one), one.spec.budget) for one in outcomes
          if one.state.status == "complete" and not one.skipped]
  si = sweep.display.si
  runs = ", ".join(f"{count} {name}" for name, count in tally.items())
  return (f"{status.num_runs(len(outcomes))}: {runs}; "
          f"{sweep.display.clock(seconds)}; "
          f"{si(sum(own * one.tokens for own, one in done))} tokens, "
          f"{si(sum(own * one.flops_total for own, one in done))} FLOPs in "
          "completed runs")


def _own(one: sweep.Outcome) -> float:
  """The share of a run's steps that it has done itself, not its trunk."""
  shared = (one.state.result or {}).get("shared_flops") or 0.0
  return 1.0 - shared / one.spec.budget.flops_total
