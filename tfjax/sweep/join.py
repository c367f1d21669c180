# SPDX-License-Identifier: Apache-2.0
r"""Joins a sweep that others have launched, and works it off beside them.

    python -m tfjax.sweep.join WORKDIR [--sweep=NAME] [--only RUN_ID ...] \
        [--workers=N] [--linger=SECONDS]

What a SLURM array's jobs and printed commands run: the runs come from the
ledger, so that no experiment file is needed, and the local launcher runs
those that nobody else is at.

Exits with 0 when every run has ended for good, 1 when some have not, 2 when
there is nothing that could be run, 130 when it was stopped.
"""

import argparse
import os
import pathlib
import sys
import time
from typing import Collection, Sequence

from rich import console as console_lib

from tfjax import config as config_lib
from tfjax.sweep import display
from tfjax.sweep import ledger
from tfjax.sweep import worker
from tfjax.sweep.launch import launch
from tfjax.sweep.launch import Observer
from tfjax.sweep.launch import Outcome
from tfjax.sweep.launch import RUNNER
from tfjax.sweep.process import LaunchError
from tfjax.sweep.specs import RunSpec
from tfjax.train import records

OK, FAILED, REFUSED, STOPPED = 0, 1, 2, 130
# A machine that waits for others costs as much as one that works; but a worker
# that dies is soon replaced, and short runs are soon done.
LINGER_SECONDS = 600.0


class _Idle(Exception):
  """Nothing has been at work here for too long."""


class _Lingering(Observer):
  """Passes everything on, and ends a launch in which nothing is at work."""

  def __init__(self, observer: Observer, seconds: float | None):
    self._observer, self._seconds = observer, seconds
    self._at_work: set[str] = set()
    self._idle_since = time.monotonic()

  def launched(self, specs: Sequence[RunSpec], workers: int) -> None:
    self._observer.launched(specs, workers)

  def started(self, spec: RunSpec) -> None:
    self._at_work.add(spec.run_id)
    self._observer.started(spec)

  def put_back(self, spec: RunSpec, reason: str) -> None:
    self._leave(spec)
    self._observer.put_back(spec, reason)

  def ended(self, outcome: Outcome) -> None:
    self._leave(outcome.spec)
    self._observer.ended(outcome)

  def tick(self) -> None:
    self._observer.tick()
    if self._seconds is None or self._at_work:
      return
    if time.monotonic() - self._idle_since > self._seconds:
      raise _Idle

  def stopping(self) -> None:
    self._observer.stopping()

  def closed(self) -> None:
    self._observer.closed()

  def _leave(self, spec: RunSpec) -> None:
    self._at_work.discard(spec.run_id)
    self._idle_since = time.monotonic()


def join(
    workdir: str | os.PathLike[str],
    sweep: str | None = None,
    workers: int | None = None,
    observer: Observer | None = None,
    *,
    only: Collection[str] = (),
    linger: float | None = None,
    runner: str = RUNNER,
) -> list[Outcome]:
  """Works off what is left of a sweep; blocks until nothing is left to do.

  Args:
    workdir: where the sweep was launched.
    sweep: which of its sweeps; unset: all of them.
    workers: processes, as of `launch`.
    observer: is told of progress.
    only: ids of the runs that are meant; empty: all of the sweep.
    linger: seconds after which it leaves when others are at all that is left,
      or it waits for them; unset: it stays, and takes up what they let go.
    runner: "module:function" with the signature of `tfjax.train.run`.

  Returns:
    One outcome a run, in the plan's order.

  Raises:
    FileNotFoundError: no sweep was launched there.
    LaunchError: a run of `only` is not planned, or as `launch` does.
    Interrupted, RecordError: as `launch` does.
  """
  specs = _specs(workdir, sweep, only)
  try:
    return launch(
        specs, workdir, workers=workers, sweep=sweep, runner=runner,
        observer=_Lingering(observer or Observer(), linger), planned=True)
  except _Idle:
    return [Outcome(spec, ledger.run_state(workdir, spec.run_id), skipped=True)
            for spec in specs]


def only_of(workdir: str | os.PathLike[str], sweep: str,
            specs: Sequence[RunSpec]) -> list[str]:
  """What `only` has to be so that these runs are done and no others; empty
  where no other run of the sweep is left."""
  own = {spec.run_id for spec in specs}
  others = [spec for spec in ledger.read_specs(workdir, sweep)
            if spec.run_id not in own and not ledger.is_finished(
                pathlib.Path(workdir) / spec.run_id,
                config_lib.config_hash(spec.config))]
  return [spec.run_id for spec in specs] if others else []


def _specs(workdir: str | os.PathLike[str], sweep: str | None,
           only: Collection[str]) -> list[RunSpec]:
  specs = ledger.read_specs(workdir, sweep)
  if unknown := sorted(set(only) - {spec.run_id for spec in specs}):
    raise LaunchError(
        f"{unknown[0]} is not, or no longer, planned in {workdir}; launch it "
        "again")
  return [spec for spec in specs if not only or spec.run_id in only]


def main(arguments: Sequence[str]) -> int:
  """Joins as the command line says, with plain progress; the exit code."""
  parser = argparse.ArgumentParser(
      prog="python -m tfjax.sweep.join",
      description="Works off a sweep beside whoever else is at it.")
  parser.add_argument("workdir", type=pathlib.Path,
                      help="where the sweep was launched")
  parser.add_argument("--sweep", help="its name; unset: all in the workdir")
  parser.add_argument("--only", nargs="+", default=[], metavar="RUN_ID",
                      help="these runs; unset: all that are left")
  parser.add_argument("--workers", type=int,
                      help="processes; 0: none, in this one; unset: one a "
                      "core, or as many as the GPUs suffice for")
  parser.add_argument("--linger", type=float, default=LINGER_SECONDS,
                      metavar="SECONDS", help="stay for so long when others "
                      "are at all that is left; %(default)s")
  parser.add_argument("--runner", default=RUNNER, help=argparse.SUPPRESS)
  given = parser.parse_args(arguments)
  worker.log_to_stderr()
  try:
    specs = _specs(given.workdir, given.sweep, given.only)
    observer = display.make(console_lib.Console(), specs, given.workdir)
    outcomes = join(given.workdir, given.sweep, given.workers, observer,
                    only=given.only, linger=given.linger, runner=given.runner)
  except (OSError, config_lib.ConfigError, LaunchError,
          records.RecordError) as error:
    print(f"error: {error}", file=sys.stderr)
    return REFUSED
  undone = sum(one.state.status not in records.FINISHED for one in outcomes)
  print(f"{len(outcomes)} runs, {undone} not done", flush=True)
  return FAILED if undone else OK


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except KeyboardInterrupt:  # `Interrupted` too: the workers have saved
    sys.exit(STOPPED)
