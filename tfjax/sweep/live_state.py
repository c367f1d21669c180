# SPDX-License-Identifier: Apache-2.0
"""What the live page shows of a sweep, as JSON.

Numbers come from the run directories by `watch` and `live_rows`; what nobody
knows is null, and the page says so. Served by `live`.
"""

import json
import os
import pathlib
import secrets
import time
from typing import Any, Sequence

from tfjax.sweep import display
from tfjax.sweep import forecast
from tfjax.sweep import ledger
from tfjax.sweep import live_rows
from tfjax.sweep import watch as watch_lib
from tfjax.train import records

# Read of all curves together at a time: the answer waits for it.
_MOST_BYTES = 2 << 20
# More than any row has.
_LEAST_BYTES = 1 << 16
_LOG_BYTES = 4000
# Of a run's record, beside FLOPs and device-seconds.
_PAID = ("price_usd", "energy_kwh", "co2e_kg")


class State:
  """The sweep in a directory; ask for `snapshot` as often as you like."""

  def __init__(self, workdir: str | os.PathLike[str]):
    self.workdir = pathlib.Path(workdir)
    self.watch = watch_lib.Watch(workdir)
    # A page of another server has other versions.
    self.epoch = secrets.token_hex(8)
    self._version = 0
    self._followers: dict[str, live_rows.Follower] = {}
    # By run: the follower's version, the state's, and the curves as JSON.
    self._curves: dict[str, tuple[int, int, str]] = {}
    self._labels: dict[str, str] = {}
    self._labelled: tuple[str, ...] = ()

  @property
  def is_over(self) -> bool:
    """Whether there are runs and all of them have ended."""
    return bool(self.watch.runs) and all(
        run.state.status in (*watch_lib.SETTLED, *watch_lib.BROKEN)
        for run in self.watch.runs.values())

  def refresh(self) -> None:
    """Reads what has changed since the last time."""
    self.watch.refresh()
    runs = self.watch.runs
    if tuple(runs) != self._labelled:
      self._labelled = tuple(runs)
      self._labels = display.row_labels([run.row for run in runs.values()])
      self._followers = {
          run_id: self._followers.get(run_id) or live_rows.Follower(
              self.workdir / run_id / watch_lib.METRICS) for run_id in runs}
      self._curves = {run_id: kept for run_id, kept in self._curves.items()
                      if run_id in runs}
    left = _MOST_BYTES
    for run_id, follower in self._followers.items():
      if left > 0:
        left -= follower.read(max(left, _LEAST_BYTES))
      else:
        follower.behind = True
      known = self._curves.get(run_id)
      if follower.version and (not known or known[0] != follower.version):
        self._version += 1
        self._curves[run_id] = (follower.version, self._version,
                                json.dumps(follower.curves()))

  def snapshot(self, epoch: str = "", after: int = 0,
               **others: Any) -> bytes:
    """All but the curves, and those that have changed since version `after`.

    Args:
      epoch: of the server that the version is of.
      others: for the page, beside what is known here.
    """
    curves = {run_id: text for run_id, (_, version, text)
              in self._curves.items() if epoch != self.epoch or version > after}
    head = json.dumps(records.finite(dict(
        epoch=self.epoch, version=self._version,
        behind=any(one.behind for one in self._followers.values()),
        **self._facts(), **others)), allow_nan=False)
    body = ", ".join(f"{json.dumps(run_id)}: {text}"
                     for run_id, text in curves.items())
    return f'{head[:-1]}, "curves": {{{body}}}}}'.encode()

  def _facts(self) -> dict[str, Any]:
    runs = list(self.watch.runs.values())
    damaged = [f"{run_id}/{watch_lib.METRICS}: {one.damaged} damaged "
               f"line{'s' * (one.damaged > 1)} left out"
               for run_id, one in self._followers.items() if one.damaged]
    return dict(
        sweep=", ".join(self.watch.names) or self.workdir.name,
        workdir=str(self.workdir), time=time.time(),
        problems=[self.watch.problem] * bool(self.watch.problem) + damaged,
        is_over=self.is_over, counts=self.watch.counts(),
        share_done=self.watch.share_done,
        seconds_left=self.watch.seconds_left(),
        devices_at_work=self.watch.devices_at_work(),
        runs=[self._run(run) for run in runs],
        failures=[self._failure(run) for run in runs
                  if run.state.status in (*watch_lib.BROKEN, "diverged")],
        retry=display.retry_command(self.workdir), cost=self._cost(runs))

  def _run(self, run: watch_lib.Run) -> dict[str, Any]:
    state, row = run.state, run.row
    evaluated = state.result is not None and state.status in records.FINISHED
    return dict(
        id=run.run_id, label=self._labels[run.run_id], status=state.status,
        size=row["params_total"], tokens=row["tokens"], steps=row["steps"],
        step=state.step, loss=state.loss, is_held_out=evaluated,
        speed=state.tokens_per_second, flops=run.flops_total,
        settled=run.flops_settled)

  def _failure(self, run: watch_lib.Run) -> dict[str, Any]:
    result = run.state.result or {}
    log = result.get("log_tail")
    if not isinstance(log, str):
      log = _tail(self.workdir / run.run_id / ledger.LOG)
    return dict(id=run.run_id, label=self._labels[run.run_id],
                status=run.state.status, reason=run.state.reason, log=log,
                is_retried=run.state.status == "failed")

  # --- Cost ------------------------------------------------------------------

  def _cost(self, runs: Sequence[watch_lib.Run]) -> dict[str, Any]:
    """What was spent, what the rest will take, and what was forecast."""
    begun = [run for run in runs if run.state.status != "pending"]
    seconds = _sum([run.device_seconds for run in begun])
    left = self.watch.device_seconds_left()
    flops = sum(run.flops_done for run in runs)
    so_far = dict(
        flops=dict(sum=flops, unknown=0), device_seconds=seconds,
        **{name: _sum([_paid(run, name) for run in begun])
           for name in _PAID})
    at_the_end = dict(
        flops=flops + sum(run.flops_left for run in runs),
        device_seconds=(None if left is None or seconds["sum"] is None
                        else seconds["sum"] + left))
    return dict(so_far=so_far, at_the_end=at_the_end, begun=len(begun),
                **self._forecast())

  def _forecast(self) -> dict[str, Any]:
    """The total of the forecast that scripts/plan.py has left, if any."""
    path = self.workdir / forecast.FILE
    try:
      found = json.loads(path.read_bytes())
      total, basis = dict(found["total"]), str(found.get("basis"))
    except FileNotFoundError:
      return dict(forecast=None, basis=None)
    except (OSError, ValueError, KeyError, TypeError) as error:
      return dict(forecast=None, basis=f"{path} cannot be read ({error!r})")
    return dict(forecast={name: total.get(name) for name in (
        "flops", "device_seconds", "hours", *_PAID)}, basis=basis)


def _paid(run: watch_lib.Run, name: str) -> float | None:
  value = (run.state.result or {}).get(name)
  return value if isinstance(value, int | float) else None


def _sum(values: Sequence[float | None]) -> dict[str, Any]:
  """Of those that are known, and how many are not."""
  known = [value for value in values if value is not None]
  return dict(sum=sum(known) if known else None,
              unknown=len(values) - len(known))


def _tail(path: pathlib.Path) -> str | None:
  """The end of a log, if there is one."""
  try:
    with open(path, "rb") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - _LOG_BYTES))
      return file.read().decode(errors="replace").strip() or None
  except OSError:
    return None
