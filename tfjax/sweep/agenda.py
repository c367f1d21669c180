# SPDX-License-Identifier: Apache-2.0
"""What of a sweep is to be done next, and what has to wait for what.

All of it follows from the specs and from what is on file, so that any number
of launchers work off one sweep at once: what one does, the others see. Who
really gets a run is settled by its claim (`tfjax.train.lease`). Processes are
`tfjax.sweep.local`'s.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from typing import Any, Mapping, Sequence

from tfjax import config as config_lib
from tfjax.sweep import branch
from tfjax.sweep import ensemble
from tfjax.sweep import halving
from tfjax.sweep import ledger
from tfjax.sweep.specs import RunSpec
from tfjax.train import claim
from tfjax.train import lease
from tfjax.train import records

RUNNER = "tfjax.train:run"
ENSEMBLE_RUNNER = "tfjax.sweep.ensemble:run"
# For so long nobody anywhere is at what is left, and nothing can begin: for a
# moment that is so whenever somebody goes from one run to the next.
_STUCK_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Unit:
  """What one worker does at one go.

  `runner` is "module:function". Of a single run it is called as
  `tfjax.train.run` is, of an ensemble as `tfjax.sweep.ensemble.run`; `options`
  are further arguments, as JSON has them.
  """

  specs: tuple[RunSpec, ...]
  runner: str
  options: Mapping[str, Any]

  @property
  def run_ids(self) -> tuple[str, ...]:
    return tuple(spec.run_id for spec in self.specs)


class Agenda:
  """The units of a sweep; the longest first.

  A run is settled once nothing more is to be done here: it has ended for good,
  has failed since it was asked for, or was left.
  """

  def __init__(self, specs: Sequence[RunSpec],
               workdir: str | os.PathLike[str], *, sweep: str | None = None,
               workers: int = 1, runner: str = RUNNER):
    """Args:
      specs: planned in the ledger of `workdir`.
      sweep: name in the records of runs that are stopped.
      workers: that units are for, which ensembles are to keep busy.
      runner: of single runs; with one of one's own there are no ensembles.
    """
    self._workdir, self._sweep = pathlib.Path(workdir), sweep
    self._runner = runner
    self._asked_at = {row["run_id"]: row["asked_at"]
                      for row in ledger.read_plan(workdir)["runs"]}
    self._open = {spec.run_id: spec for spec in specs}
    self._hashes = {spec.run_id: config_lib.config_hash(spec.config)
                    for spec in specs}
    self._at_work: set[str] = set()
    self._alone: set[str] = set()  # they wait for nobody any more
    self._stuck_since: float | None = None
    self._settled: list[RunSpec] = []  # and not told yet
    # Who shares what with whom is of all that is planned: of what is left
    # alone, a done trunk's branches would share another, or none.
    # (Somebody may have planned another sweep of that name since.)
    self._planned = list({spec.run_id: spec for spec in (
        *ledger.read_specs(workdir), *specs)}.values())
    self._branches = branch.options(self._planned)
    self._rungs = {spec.run_id: group
                   for group in halving.groups(self._planned)
                   for spec in group}
    self._groups = self._grouped(specs, workers)

  def _grouped(self, specs: Sequence[RunSpec],
               workers: int) -> list[tuple[RunSpec, ...]]:
    singles = [spec for spec in specs if spec.run_id in self._branches
               or spec.run_id in self._rungs]
    others = [spec for spec in specs if spec not in singles
              and not self._is_settled(spec)]
    singles += [spec for spec in specs if spec not in singles
                and spec not in others]
    groups = [(spec,) for spec in singles]
    if self._runner == RUNNER:
      groups += ensemble.groups(others, workers)
    else:
      groups += [(spec,) for spec in others]
    return sorted(groups, key=lambda group: (
        -sum(spec.budget.flops_total for spec in group), group[0].run_id))

  # --- What is next ----------------------------------------------------------

  @property
  def done(self) -> bool:
    """Whether every run is settled."""
    return not self._open

  def take(self) -> Unit | None:
    """What is to be done now, which is then at work; None: nothing is ready,
    as others are at it or it waits for others, or all is done.

    Raises:
      RecordError: a file of a run is damaged.
    """
    elsewhere = False
    for group in self._groups:
      unit, held = self._ready(group)
      elsewhere = elsewhere or held
      if unit is not None:
        self._at_work.update(unit.run_ids)
        self._stuck_since = None
        return unit
    if not self._open or self._at_work or elsewhere:
      self._stuck_since = None
    elif self._stuck_since is None:
      self._stuck_since = time.monotonic()
    elif time.monotonic() - self._stuck_since >= _STUCK_SECONDS:
      # Each waits for one that nobody will do: the longest goes on alone.
      waiting = next(spec for group in self._groups for spec in group
                     if spec.run_id in self._open)
      self._alone.add(waiting.run_id)
      self._at_work.add(waiting.run_id)
      return Unit((waiting,), self._runner,
                  self._branches.get(waiting.run_id, {}))
    return None

  def back(self, unit: Unit) -> None:
    """Nobody here is at the unit any more: its runs are taken again, unless
    what is on file has settled them."""
    self._at_work.difference_update(unit.run_ids)
    for spec in unit.specs:
      if spec.run_id in self._open and self._is_settled(spec):
        self._settle(spec)

  def put_off(self, unit: Unit) -> None:
    """Others come before the unit from now on: it may be its own fault that
    its worker died."""
    index = self._index(unit)
    self._groups.append(self._groups.pop(index))

  def leave(self, spec: RunSpec) -> None:
    """The run is not taken again, whatever is on file."""
    self._at_work.discard(spec.run_id)
    if spec.run_id in self._open:
      self._settle(spec)

  def break_up(self, unit: Unit) -> None:
    """From now on each run of the unit is one of its own, and is tried again
    though it has failed in the unit."""
    left = [run_id for run_id in unit.run_ids if run_id in self._open]
    self._asked_at.update(dict.fromkeys(left, lease.stamp(self._workdir)))
    # On file for those who watch. Without it, as on a full disk, they see a
    # failure until the run is taken up.
    with contextlib.suppress(OSError, ledger.LaunchBusyError):
      ledger.ask(self._workdir, left)
    index = self._index(unit)
    self._groups[index:index + 1] = [(spec,) for spec in self._groups[index]]

  def _index(self, unit: Unit) -> int:
    return next(index for index, group in enumerate(self._groups)
                if unit.specs[0].run_id in [spec.run_id for spec in group])

  def settled(self) -> list[RunSpec]:
    """The runs that were settled since this was last asked, by whomever."""
    found, self._settled = self._settled, []
    return found

  # --- Details ---------------------------------------------------------------

  def _ready(self, group: tuple[RunSpec, ...]) -> tuple[Unit | None, bool]:
    """The group's unit, if it can be done now; and whether somebody
    elsewhere is at one of its runs."""
    left = [spec for spec in group if spec.run_id in self._open]
    if not left or any(spec.run_id in self._at_work for spec in left):
      return None, False
    if any(claim.is_held(self._workdir / spec.run_id) for spec in left):
      return None, True
    for spec in left:
      if self._is_settled(spec):
        self._settle(spec)
    left = [spec for spec in left if spec.run_id in self._open]
    if not left:
      return None, False
    if len(group) > 1:
      return Unit(tuple(left), ENSEMBLE_RUNNER, {}), False
    return self._single(left[0])

  def _single(self, spec: RunSpec) -> tuple[Unit | None, bool]:
    """As `_ready`, of one run that nobody is at."""
    options = dict(self._branches.get(spec.run_id, {}))
    if spec.run_id in self._alone:
      return Unit((spec,), self._runner, options), False
    trunk = options.get("branch", {}).get("run_id")
    if trunk is not None and not (
        branch.is_ready(self._workdir, options)
        and not self._is_tried_again(trunk)):
      return None, False
    if spec.run_id in self._rungs:
      turn = halving.turn(self._workdir, self._rungs[spec.run_id], spec)
      if isinstance(turn, halving.Wait):
        return None, False
      if isinstance(turn, halving.Stop):
        try:
          halving.stop(self._workdir, spec, self._sweep, turn.reason)
        except claim.RunDirectoryBusyError:
          return None, True
        self._settle(spec)
        return None, False
      options["until_step"] = turn.until_step
    return Unit((spec,), self._runner, options), False

  def _is_tried_again(self, run_id: str) -> bool:
    """Whether a run's failure is from before it was asked for once more."""
    result = records.read_result(self._workdir / run_id)
    return (run_id in self._open and result is not None and
            result["status"] == "failed")

  def _settle(self, spec: RunSpec) -> None:
    del self._open[spec.run_id]
    self._settled.append(spec)
    if spec.run_id in self._branches:
      branch.clean(self._workdir, self._planned)

  def _is_settled(self, spec: RunSpec) -> bool:
    """By what is on file of a run that nobody is at."""
    path = self._workdir / spec.run_id / "result.json"
    try:
      written = path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
      return False
    result = records.read_result(path.parent)
    if (result is None or
        result.get("config_hash") != self._hashes[spec.run_id]):
      return False
    if result["status"] == "failed":
      return written > self._asked_at.get(spec.run_id, 0.0)
    return result["status"] in records.FINISHED
