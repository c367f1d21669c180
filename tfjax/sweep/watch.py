# SPDX-License-Identifier: Apache-2.0
"""Where a sweep stands while it goes on: cheap to ask again and again.

A `Watch` looks at every run of a sweep's directory, whoever trains it, and
reads again only what has changed. From it come the progress, the time left and
what was spent so far, for the terminal (`display`) and for the live page
(`live_state`). Only reads.
"""

import collections
import dataclasses
import math
import os
import pathlib
import time
from typing import Any, Collection, Mapping

from tfjax.sweep import branch
from tfjax.sweep import ledger
from tfjax.train import lease
from tfjax.train import records

# Nothing is left to do of a run that ended for good.
SETTLED = records.FINISHED
# Ended, and not gone on with unless somebody asks.
BROKEN = ("failed", "damaged")
METRICS, RESULT = "metrics.jsonl", "result.json"
_WINDOW_SECONDS = 300.0  # over which the speed of the sweep is measured
_LEAST_SECONDS = 3.0


@dataclasses.dataclass
class Run:
  """A planned run and how far it is; what is not known is None.

  FLOPs and device-seconds are its own: what a branch shares with its trunk
  counts for the trunk.

  Attributes:
    row: of the plan.
    state: as the ledger has it, or with the status "damaged"; one that failed
      and is to be tried again is "pending".
    shared_flops: that its trunk spends for it, as planned or as recorded.
    flops_done: as its rows or its record tell.
    device_seconds: occupied so far.
    is_seen: it was looked at; `was_pending`: it had not begun then, so that
      all that it takes is watched.
    signature: of the files and the claim that this was read from.
  """

  row: Mapping[str, Any]
  state: ledger.RunState
  shared_flops: float
  flops_done: float = 0.0
  device_seconds: float | None = None
  is_seen: bool = False
  was_pending: bool = False
  signature: tuple[Any, ...] | None = None

  @property
  def run_id(self) -> str:
    return self.state.run_id

  @property
  def flops_total(self) -> float:
    """Planned."""
    return self.row["flops_total"] - self.shared_flops

  @property
  def flops_left(self) -> float:
    """What those who are at the sweep will yet do of it."""
    if self.state.status in (*SETTLED, *BROKEN):
      return 0.0
    return max(0.0, self.flops_total - self.flops_done)

  @property
  def flops_settled(self) -> float:
    """What of its budget needs nothing more."""
    if self.state.status in SETTLED:
      return self.flops_total
    if self.state.status in BROKEN:
      return 0.0
    return min(self.flops_total, self.flops_done)


class Watch:
  """The runs of a sweep's directory, as `refresh` found them.

  Attributes:
    names: of the sweeps that were launched there, the newest last.
    runs: by run_id, in the plan's order.
    problem: why there are none, or none that are new.
  """

  def __init__(self, workdir: str | os.PathLike[str],
               run_ids: Collection[str] | None = None):
    """Of all runs that are planned there, or of those given."""
    self.names: tuple[str, ...] = ()
    self.runs: dict[str, Run] = {}
    self.problem: str | None = None
    self._workdir = pathlib.Path(workdir)
    self._run_ids = run_ids
    self._plan: tuple[int, int, int] | None = None
    # (time, device-seconds that runs have taken under its eyes)
    self._samples: collections.deque[tuple[float, float]] = collections.deque()
    self._watched = 0.0

  def refresh(self, run_ids: Collection[str] | None = None,
              now: float | None = None) -> None:
    """Looks at all runs, or only at those given.

    Args:
      now: in seconds, of a clock that is never set back.
    """
    self._read_plan()
    for run_id in self.runs if run_ids is None else run_ids:
      if run_id in self.runs:
        self._look(self.runs[run_id])
    self._samples.append((time.monotonic() if now is None else now,
                          self._watched))
    while (len(self._samples) > 2 and self._samples[-1][0] -
           self._samples[1][0] >= _WINDOW_SECONDS):
      self._samples.popleft()

  @property
  def share_done(self) -> float | None:
    """Of the sweep's FLOPs; None: nothing is planned."""
    total = sum(run.flops_total for run in self.runs.values())
    if not total:
      return None
    return sum(run.flops_settled for run in self.runs.values()) / total

  def counts(self) -> dict[str, int]:
    """Runs by status."""
    return dict(collections.Counter(
        run.state.status for run in self.runs.values()))

  def device_seconds_left(self) -> float | None:
    """That the runs will yet take, by what runs of their size took a FLOP.

    Of a size of which no FLOP is done yet, by that nearest to it. Runs that
    failed take nothing. None: no run tells.
    """
    cost = self._seconds_per_flop()
    if not cost:
      return None if any(run.flops_left for run in self.runs.values()) else 0.0
    return sum(run.flops_left * _nearest(cost, run.row["params_total"])
               for run in self.runs.values())

  def devices_at_work(self) -> float | None:
    """On average over the last minutes; None: too little was seen of it."""
    if not self._samples:
      return None
    (then, before), (now, after) = self._samples[0], self._samples[-1]
    if now - then < _LEAST_SECONDS or after <= before:
      return None
    return (after - before) / (now - then)

  def seconds_left(self) -> float | None:
    """Until the last run ends, if those who are at it stay at it; None: that
    is not known, as nobody is at it or too little was seen."""
    left, devices = self.device_seconds_left(), self.devices_at_work()
    if left == 0.0 and self.runs:
      return 0.0
    running = [run for run in self.runs.values()
               if run.state.status == "running"]
    if left is None or devices is None or not running:
      return None
    cost = self._seconds_per_flop()
    # No more devices than one run has will work on the last one.
    longest = max(run.flops_left * _nearest(cost, run.row["params_total"])
                  for run in self.runs.values())
    return max(left / devices, longest / (devices / len(running)))

  def _seconds_per_flop(self) -> dict[int, float]:
    """Device-seconds of a FLOP, by the parameters of the model."""
    flops: dict[int, float] = collections.defaultdict(float)
    seconds: dict[int, float] = collections.defaultdict(float)
    for run in self.runs.values():
      if run.device_seconds and run.flops_done:
        flops[run.row["params_total"]] += run.flops_done
        seconds[run.row["params_total"]] += run.device_seconds
    return {size: seconds[size] / flops[size] for size in flops}

  def _read_plan(self) -> None:
    stamp = _stamp(self._workdir / ledger.PLAN)
    if stamp is not None and stamp == self._plan:
      return
    try:
      plan = ledger.read_plan(self._workdir)
      shared = _shared_flops(self._workdir, plan)
      runs = {row["run_id"]: Run(
          row, ledger.RunState(row["run_id"], "pending"),
          shared.get(row["run_id"], 0.0)) for row in plan["runs"]
              if self._run_ids is None or row["run_id"] in self._run_ids}
    except (OSError, ValueError, KeyError, TypeError) as error:
      # A FileNotFoundError and a RecordError say it all.
      self.problem = str(error)
      return
    self.names = tuple(plan["sweeps"])
    self.problem, self._plan = None, stamp
    for run_id in runs.keys() & self.runs.keys():
      old = self.runs[run_id]
      old.row, old.signature = runs[run_id].row, None
      old.shared_flops = runs[run_id].shared_flops
      runs[run_id] = old
    self.runs = runs

  def _look(self, run: Run) -> None:
    """Reads what has changed of a run's directory."""
    run_dir = self._workdir / run.run_id
    stamps = [_stamp(run_dir / name) for name in (
        RESULT, "config.json", METRICS)]
    # Nobody takes up what is settled: not asked for, as it costs.
    held = run.state.status not in SETTLED and lease.holder(run_dir)
    if run.signature == (*stamps, held):
      return
    first, run.signature = not run.is_seen, (*stamps, held)
    try:
      state = ledger.run_state(self._workdir, run.run_id)
    except (records.RecordError, OSError) as error:
      state = ledger.RunState(run.run_id, "damaged", str(error))
    if state.status == "failed" and stamps[0] and (
        stamps[0][-1] < run.row["asked_at"] * 1e9):
      state = dataclasses.replace(
          state, status="pending",
          reason=f"to be tried again; it failed before: {state.reason}")
    row = ledger.last_row(run_dir / METRICS, "train") or {}
    seconds = _number(state.result or {}, "occupied_device_seconds")
    if seconds is None:
      seconds = _number(row, "device_seconds")
    if first:
      run.is_seen, run.was_pending = True, state.status == "pending"
    elif seconds is not None and (
        run.device_seconds is not None or run.was_pending):
      self._watched += max(0.0, seconds - (run.device_seconds or 0.0))
    run.state, run.device_seconds = state, seconds
    if state.status in (*SETTLED, "interrupted") and state.result:
      # One that could not branch off has done all itself. (The record of a
      # failure knows nothing of it.)
      run.shared_flops = _number(state.result, "shared_flops") or 0.0
    elif row and "shared_device_seconds" not in row:
      run.shared_flops = 0.0  # no row of a branch is without
    flops = _number(state.result or {}, "flops_total")
    if flops is None:
      flops = _number(row, "flops") or 0.0
    run.flops_done = max(0.0, flops - run.shared_flops)


def _shared_flops(workdir: pathlib.Path,
                  plan: Mapping[str, Any]) -> dict[str, float]:
  """What branches leave to their trunks, but those who find no checkpoint there;
  read only where there are some."""
  configs = [plan["base"], *(row["config"] for row in plan["runs"])]
  if not any(config.get("sweep.share_trunk") for config in configs):
    return {}
  specs = ledger.read_specs(workdir)
  return branch.shared_flops(specs, alone={
      run_id for run_id, given in branch.options(specs).items()
      if not (workdir / run_id / METRICS).exists()
      and branch.is_alone(workdir, given)})


def _stamp(path: pathlib.Path) -> tuple[int, int, int] | None:
  """Tells one content of a file from the next; None: it is not there."""
  try:
    found = os.stat(path)
  except OSError:
    return None
  return found.st_ino, found.st_size, found.st_mtime_ns


def _number(values: Mapping[str, Any], name: str) -> float | None:
  """Of a record or row that may be damaged."""
  value = values.get(name)
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return float(value) if math.isfinite(value) else None


def _nearest(values: Mapping[int, float], size: int) -> float:
  return values[min(values, key=lambda one: abs(math.log(one / size)))]
