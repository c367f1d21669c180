# SPDX-License-Identifier: Apache-2.0
"""The local launcher: a pool of worker processes, or this process.

Workers live long and get one unit of the agenda at a time. A worker's answer
says only that it is free again; how a run stands is asked of the ledger.

A worker that dies takes its unit with it: the run is begun again from its
newest checkpoint, after all that can be begun before, until it has died
`_KILLS` times in a row without a newer checkpoint; then it has failed. Two
times are enough where the kernel has killed a process for want of memory
meanwhile, or where the process has crashed by itself. One that was told to stop
by itself, and saved, has died too. One that exits is not tried again, nor one
that raises.
"""

import contextlib
import dataclasses
import pathlib
import selectors
import signal
import time
from typing import Any, Mapping, Sequence

from tfjax import config as config_lib
from tfjax.sweep import agenda as agenda_lib
from tfjax.sweep import failures
from tfjax.sweep import ledger
from tfjax.sweep import process as process_lib
from tfjax.sweep import shares
from tfjax.sweep import worker as worker_lib
from tfjax.sweep.launch import Observer
from tfjax.sweep.launch import Outcome
from tfjax.sweep.specs import RunSpec
from tfjax.train import interrupts
from tfjax.train import out_of_memory
from tfjax.train import records

_TICK_SECONDS = 0.25
# Between looks for what others have done, while a worker is idle.
_LOOK_SECONDS = 1.0
# What a worker may take to write a checkpoint when it is told to stop.
_STOP_SECONDS = 60.0
_FAILED_STARTS, _KILLED_STARTS = 3, 30  # in a row
_KILLS, _CRASHES = 5, 2
# By others; the rest is the process's own fault.
_KILLED_BY = (-signal.SIGKILL, -signal.SIGTERM)


class LocalLauncher:
  """Runs specs on this machine."""

  def __init__(self, workdir: pathlib.Path, sweep: str, observer: Observer,
               runner: str, options: Mapping[str, Any]):
    if options:
      raise process_lib.LaunchError(
          "the local launcher has no options, but was given "
          f"{', '.join(options)}")
    self.outcomes: dict[str, Outcome] = {}
    self.stopping = False
    self._workdir, self._sweep = workdir, sweep
    self._observer, self._runner = observer, runner

  def run(self, specs: Sequence[RunSpec], workers: int | None,
          num_runs: int) -> None:
    """Runs the specs, and leaves no process behind in whatever case.

    Args:
      workers: 0: none, the runs are this process's.
      num_runs: of the whole sweep.
    """
    given = (self._workdir, self._sweep, self._observer, self._runner)
    desk = (_Pool if workers != 0 else _Here)(*given)
    desk.outcomes = self.outcomes
    try:
      desk.run(specs, workers, num_runs)
    finally:
      self.stopping = desk.stopping


class _Desk:
  """Keeps the agenda, and says how runs have ended."""

  def __init__(self, workdir: pathlib.Path, sweep: str, observer: Observer,
               runner: str):
    self.outcomes: dict[str, Outcome] = {}
    self.stopping = False
    self.workdir, self.sweep = workdir, sweep
    self.observer, self.runner = observer, runner
    self.agenda: agenda_lib.Agenda | None = None
    self._begun: set[str] = set()

  def take(self) -> agenda_lib.Unit | None:
    """The next unit; tells of runs that others have ended meanwhile."""
    unit = None if self.stopping else self.agenda.take()
    self.tell()
    for spec in unit.specs if unit else ():
      self._begun.add(spec.run_id)
      self.observer.started(spec)
    return unit

  def handle(self, unit: agenda_lib.Unit, event: str,
             reason: str | None) -> None:
    """A worker has done with a unit, as its answer says."""
    alone = len(unit.specs) == 1
    if event == "finished":
      self.add_logs(unit)
    elif event == "failed" and alone:
      self.fail(unit.specs[0], reason)
    elif event == "failed":
      self.put_back(unit, f"goes on alone, as all together failed: {reason}")
      self.agenda.break_up(unit)
    elif event == "paused":
      self.put_back(unit, "waits for others")
    elif event == "busy":
      self.put_back(unit, "another process is at it")
      self._begun.difference_update(unit.run_ids)
    self.agenda.back(unit)
    if event == "interrupted" or alone and event in ("finished", "failed"):
      for spec in unit.specs:
        self.agenda.leave(spec)  # what is not on file comes no more
    elif event == "finished":
      self.agenda.break_up(unit)  # what is left was another process's
    self.tell()

  def put_back(self, unit: agenda_lib.Unit, reason: str) -> None:
    for spec in unit.specs:
      self.observer.put_back(spec, reason)

  def add_logs(self, unit: agenda_lib.Unit) -> None:
    """To the records of those that have diverged, or failed in an ensemble."""
    for spec in unit.specs:
      # A full disk, say: there is a record, if without a log.
      with contextlib.suppress(OSError, records.RecordError):
        failures.add_log(self.workdir / spec.run_id,
                         self.workdir / unit.run_ids[0])

  def fail(self, spec: RunSpec, reason: str) -> None:
    """Records a failure; where that is impossible, at least tells of it."""
    try:
      failures.record(self.workdir, spec, self.sweep, reason)
    except (OSError, records.RecordError) as error:  # a full disk, say
      state = dataclasses.replace(
          ledger.progress(self.workdir, spec.run_id), status="failed",
          reason=f"{reason}; and this cannot be recorded: {error}")
      self.outcomes[spec.run_id] = Outcome(spec, state, skipped=False)

  def tell(self) -> None:
    """Tells of the runs that were settled since."""
    for spec in self.agenda.settled():
      if spec.run_id not in self.outcomes:
        self.outcomes[spec.run_id] = Outcome(
            spec, ledger.run_state(self.workdir, spec.run_id),
            skipped=spec.run_id not in self._begun)
      self.observer.ended(self.outcomes[spec.run_id])


class _Here(_Desk):
  """Does the units in this process, one after the other."""

  def run(self, specs: Sequence[RunSpec], workers: int, num_runs: int) -> None:
    """As `LocalLauncher.run`; what the runs print is not put into a log."""
    del workers, num_runs
    self.agenda = agenda_lib.Agenda(
        specs, self.workdir, sweep=self.sweep, workers=1, runner=self.runner)
    self.observer.launched(specs, 1)
    try:
      while not self.agenda.done and not self.stopping:
        self._next()
        self.observer.tick()
    except KeyboardInterrupt:  # where there was nothing to save yet
      self.stopping = True
    if self.stopping:
      self.observer.stopping()

  def _next(self) -> None:
    unit = self.take()
    if unit is None:
      if not self.agenda.done:
        time.sleep(_LOOK_SECONDS)
      return
    answer = worker_lib.perform(
        worker_lib.load_runner(unit.runner),
        process_lib.task(unit, self.workdir, self.sweep))
    self.handle(unit, answer["event"], answer.get("reason"))
    self.stopping = answer["event"] == "interrupted"


class _Pool(_Desk):
  """Hands the units to worker processes."""

  def __init__(self, *args: Any):
    super().__init__(*args)
    self._selector = selectors.DefaultSelector()
    self._workers: list[process_lib.Worker] = []
    self._runtime: config_lib.RuntimeConfig | None = None
    self._mesh = config_lib.MeshConfig()
    self._bad_starts = {"failed": 0, "killed": 0}
    # By unit: the step of its newest checkpoint when its worker last died, and
    # how often in a row it has been that one.
    self._deaths: dict[tuple[str, ...], tuple[int, int]] = {}
    self._told = False
    self._look_at = 0.0

  def run(self, specs: Sequence[RunSpec], workers: int | None,
          num_runs: int) -> None:
    """As `LocalLauncher.run`."""
    self._runtime = _runtime(specs)
    # A CPU worker has devices for the largest mesh of its runs.
    self._mesh = max((spec.config.mesh for spec in specs),
                     key=lambda mesh: mesh.num_devices)
    found = shares.of([spec.config for spec in specs], workers, num_runs)
    self.agenda = agenda_lib.Agenda(
        specs, self.workdir, sweep=self.sweep, workers=len(found),
        runner=self.runner)
    try:
      with interrupts.handled_by(self._stop):
        self.observer.launched(specs, len(found))
        for share in found:
          self._start_worker(share)
        while self._workers:
          self._turn()
    finally:
      for worker in self._workers:
        worker.signal_group(signal.SIGKILL)
        worker.bury()
      self._selector.close()

  def _turn(self) -> None:
    """Waits a moment for the workers, and handles what they say."""
    for key, _ in self._selector.select(_TICK_SECONDS):
      worker = key.fileobj
      messages, closed = worker.read()
      for message in messages:
        self._answered(worker, message)
      if closed:
        self._bury(worker)
    if self.stopping and not self._told:
      self._told = True  # not by the signal handler, which may cut in anywhere
      self.observer.stopping()
    self._feed()
    for worker in self._workers:
      worker.kill_if_late()
    self.observer.tick()

  def _start_worker(self, share: shares.Share) -> None:
    worker = process_lib.Worker(self.runner, share, self._runtime, self._mesh)
    self._workers.append(worker)
    self._selector.register(worker, selectors.EVENT_READ)

  def _feed(self) -> None:
    """Gives idle workers what there is, or sends them home."""
    idle = [worker for worker in self._workers
            if worker.is_ready and not worker.unit and not worker.is_leaving]
    if idle and time.monotonic() >= self._look_at:
      for worker in idle:
        unit = self.take()
        if unit is None:
          # Nothing changes by itself so soon; an answer is looked at at once.
          self._look_at = time.monotonic() + _LOOK_SECONDS
          break
        worker.give(unit, self.workdir, self.sweep)
    if self.stopping or self.agenda.done:
      for worker in self._workers:
        if worker.unit is None and not worker.is_leaving:
          worker.hang_up()
          if not worker.is_ready:  # it would first come to its begin
            worker.expect_end(0)

  def _answered(self, worker: process_lib.Worker,
                message: Mapping[str, Any]) -> None:
    self._look_at = 0.0
    event = message["event"]
    if event == "ready":
      worker.is_ready = True
      self._bad_starts = dict.fromkeys(self._bad_starts, 0)
      return
    unit, worker.unit = worker.unit, None
    if event in ("failed", "interrupted"):
      worker.hang_up()  # it ends by itself
    if event == "interrupted" and not self.stopping:
      self._died(worker, unit, -signal.SIGTERM)  # it alone was told to stop
    else:
      self.handle(unit, event, message.get("reason"))

  def _bury(self, worker: process_lib.Worker) -> None:
    """A worker has ended: sees to what it was at, and replaces it."""
    self._look_at = 0.0
    self._selector.unregister(worker)
    self._workers.remove(worker)
    status = worker.bury()
    if status == 128 + signal.SIGTERM:  # as it ends outside of training
      status = -signal.SIGTERM
    if worker.unit is not None:
      self._died(worker, worker.unit, status)
    elif not (worker.is_ready or worker.is_leaving or self.stopping):
      self._count_bad_start(worker, status)
    if not self.agenda.done and not self.stopping:
      self._start_worker(worker.share)

  def _count_bad_start(self, worker: process_lib.Worker, status: int) -> None:
    kind = "killed" if status in _KILLED_BY else "failed"
    self._bad_starts[kind] += 1
    if self._bad_starts[kind] >= dict(
        failed=_FAILED_STARTS, killed=_KILLED_STARTS)[kind]:
      raise process_lib.LaunchError(
          f"workers do not start: {process_lib.cause_of_death(status)}\n"
          f"{worker.complaint()}")

  def _died(self, worker: process_lib.Worker, unit: agenda_lib.Unit,
            status: int) -> None:
    """Puts back what a dead worker was at, or records why it failed."""
    cause = process_lib.cause_of_death(status)
    if self.stopping:
      for spec in unit.specs:
        self.agenda.leave(spec)
      self.tell()
    elif self._is_tried_again(worker, unit, status):
      self.put_back(unit, f"{cause}; goes on from its newest checkpoint")
      self.agenda.put_off(unit)
      self.agenda.back(unit)
      self.tell()
    else:
      self.handle(unit, "failed", self._verdict(worker, unit, cause))

  def _is_tried_again(self, worker: process_lib.Worker,
                      unit: agenda_lib.Unit, status: int) -> bool:
    saved = sum(failures.newest_checkpoint(self.workdir / run_id)
                for run_id in unit.run_ids)
    before, count = self._deaths.get(unit.run_ids, (-1, 0))
    count = 1 if saved > before else count + 1
    self._deaths[unit.run_ids] = max(before, saved), count
    crashed = status not in _KILLED_BY or _memory_ran_out(worker)
    return status < 0 and count < (_CRASHES if crashed else _KILLS)

  def _verdict(self, worker: process_lib.Worker, unit: agenda_lib.Unit,
               cause: str) -> str:
    """Why a run has failed whose worker has died, and died again."""
    saved, count = self._deaths[unit.run_ids]
    if count > 1:
      cause += f", {count} times in a row at checkpoint {saved}"
    if _memory_ran_out(worker):
      cause += ", for want of memory: "
    elif "SIGKILL" in cause:
      cause += ", which the system sends when memory runs out: "
    else:
      return cause
    return cause + out_of_memory.on_host(
        unit.specs[0].config, workers=len(self._workers) + 1)

  def _stop(self, signum: int) -> None:
    """A signal stops the workers gently; the second one, at once."""
    del signum
    seconds = 0 if self.stopping else _STOP_SECONDS
    self.stopping = True
    for worker in self._workers:
      worker.process.terminate()  # its children are its own to end
      worker.expect_end(seconds)


def _memory_ran_out(worker: process_lib.Worker) -> bool:
  """Whether the kernel has killed for want of memory since it was at work."""
  now = out_of_memory.kernel_kills()
  return now is not None and worker.kernel_kills not in (None, now)


def _runtime(specs: Sequence[RunSpec]) -> config_lib.RuntimeConfig:
  """What worker processes are started for, which must be one for all."""
  settings = {(spec.config.runtime.cpu_tuning, spec.config.runtime.num_devices)
              for spec in specs}
  if len(settings) > 1:
    raise config_lib.ConfigError(
        "runtime", "cpu_tuning and num_devices are set before a worker "
        "process starts and must be the same for the whole sweep, which has "
        f"{', '.join(map(str, settings))}")
  return specs[0].config.runtime
