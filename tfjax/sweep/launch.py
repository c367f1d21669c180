# SPDX-License-Identifier: Apache-2.0
"""Runs the specs of a sweep: skips what is done, survives what fails.

What a launch is, whoever does the work, and who can do it: `LAUNCHERS`. Where
a run stands is asked of the ledger alone.
"""

import dataclasses
import importlib
import os
import pathlib
from typing import Any, Mapping, Sequence

from tfjax import config as config_lib
from tfjax.sweep import ledger
from tfjax.sweep import process as process_lib
from tfjax.sweep.agenda import RUNNER
from tfjax.sweep.specs import RunSpec

# "module:class", imported when it is asked for. A launcher is made with
# (workdir, sweep, observer, runner, options); its run(specs, workers,
# num_runs) blocks until all it can do is done, after which `outcomes` has what
# it knows by run_id, and `stopping` tells whether a signal has ended it.
LAUNCHERS = {
    "local": "tfjax.sweep.local:LocalLauncher",
    "print": "tfjax.sweep.printed:PrintLauncher",
    "slurm": "tfjax.sweep.slurm:SlurmLauncher",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run stands after the launch; `skipped`: it was not touched."""

  spec: RunSpec
  state: ledger.RunState
  skipped: bool


class Interrupted(KeyboardInterrupt):
  """The launch was stopped by a signal; `outcomes` is where the runs stand."""

  def __init__(self, outcomes: Sequence[Outcome]):
    super().__init__("the sweep was interrupted")
    self.outcomes = list(outcomes)


class Observer:
  """Is told what happens in a launch; a display overrides what it shows."""

  def launched(self, specs: Sequence[RunSpec], workers: int) -> None:
    """The specs that are to run, and on how many workers."""

  def started(self, spec: RunSpec) -> None:
    """A worker was given the run, for the first time or once more."""

  def put_back(self, spec: RunSpec, reason: str) -> None:
    """Nobody is at the run for now, and it will be gone on with."""

  def ended(self, outcome: Outcome) -> None:
    """The run has ended, or was skipped."""

  def tick(self) -> None:
    """Time has passed, a fraction of a second."""

  def stopping(self) -> None:
    """A signal has come: the workers write their checkpoints and end."""

  def closed(self) -> None:
    """The launch is over, in whatever way."""


def launch(
    specs: Sequence[RunSpec],
    workdir: str | os.PathLike[str],
    *,
    launcher: str = "local",
    workers: int | None = None,
    sweep: str | None = None,
    observer: Observer | None = None,
    runner: str = RUNNER,
    options: Mapping[str, Any] | None = None,
    planned: bool = False,
) -> list[Outcome]:
  """Runs every spec that has not ended for good yet; blocks until done.

  Any number of launches may work in one workdir at once. What one of them is
  at the others leave to it, and wait for in the end; should it die, they take
  it up.

  Args:
    specs: from `tfjax.sweep.plan`.
    workdir: the sweep's directory; each run has its own below it.
    launcher: who runs them, of `LAUNCHERS`: "local" does on this machine.
    workers: processes; unset: one a core or a GPU; 0: in this process, where
      the launcher is "local".
    sweep: name in the records; unset: the workdir's.
    observer: is told of progress.
    runner: "module:function" with the signature of `tfjax.train.run`.
    options: of the launcher.
    planned: the specs are of the ledger, which stays as it is: a launch joins
      one that is going on. What failed since that was asked for is left.

  Returns:
    One outcome a spec, in their order.

  Raises:
    Interrupted: on SIGINT or SIGTERM, after the workers have stopped.
    LaunchError: there is no such launcher, or it cannot start.
    RecordError: a record is damaged.
  """
  check(launcher, workers)
  workdir = pathlib.Path(workdir).absolute()
  sweep = _planned(specs, workdir, sweep, planned)
  observer = observer or Observer()
  pool = _load(LAUNCHERS[launcher])(
      workdir, sweep, observer, runner, dict(options or {}))
  outcomes, waiting = {}, []
  for spec in specs:
    digest = config_lib.config_hash(spec.config)
    if ledger.is_finished(workdir / spec.run_id, digest):
      state = ledger.run_state(workdir, spec.run_id)
      outcomes[spec.run_id] = Outcome(spec, state, skipped=True)
    else:
      waiting.append(spec)
  try:
    for outcome in outcomes.values():
      observer.ended(outcome)
    if waiting:
      pool.run(waiting, workers, num_runs=_num_runs(specs, workdir))
  finally:
    observer.closed()
  outcomes |= pool.outcomes
  for spec in specs:
    if spec.run_id not in outcomes:
      outcomes[spec.run_id] = Outcome(
          spec, ledger.run_state(workdir, spec.run_id), skipped=True)
  ordered = [outcomes[spec.run_id] for spec in specs]
  if pool.stopping:
    raise Interrupted(ordered)
  return ordered


def check(launcher: str, workers: int | None) -> None:
  """Raises a LaunchError where there is no such launcher, or it cannot have
  so many workers."""
  if launcher not in LAUNCHERS:
    raise process_lib.LaunchError(f"no launcher {launcher!r}; there are: "
                                  f"{', '.join(map(repr, LAUNCHERS))}")
  if workers is not None and workers < 0:
    raise process_lib.LaunchError(
        f"workers must be at least 0 (in this process), not {workers}")
  if workers == 0 and launcher != "local":
    raise process_lib.LaunchError(
        f"workers=0 runs the sweep in this process, and launcher {launcher!r} "
        "runs nothing here; give at least 1, or leave it unset")


def _num_runs(specs: Sequence[RunSpec], workdir: pathlib.Path) -> int:
  """Of the whole sweep that the specs are of, which may be a part of it: the
  largest that is planned and has them all."""
  wanted = {spec.run_id for spec in specs}
  sweeps = ledger.read_plan(workdir)["sweeps"].values()
  return max((len(run_ids) for run_ids in sweeps if wanted <= set(run_ids)),
             default=len(specs))


def _planned(specs: Sequence[RunSpec], workdir: pathlib.Path,
             sweep: str | None, planned: bool) -> str:
  """The sweep's name, once the plan is on file."""
  try:
    if planned:
      return sweep or ledger.read_plan(workdir)["sweep"]
    sweep = sweep or workdir.name
    workdir.mkdir(parents=True, exist_ok=True)
    ledger.write_plan(workdir, sweep, specs)
    return sweep
  except OSError as error:
    raise process_lib.LaunchError(
        f"the sweep's directory cannot be used: {error}") from error


def _load(name: str) -> type:
  module, _, attribute = name.partition(":")
  return getattr(importlib.import_module(module), attribute)
