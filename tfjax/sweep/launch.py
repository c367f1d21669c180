# SPDX-License-Identifier: Apache-2.0
"""Runs the specs of a sweep: skips what is done, survives what fails.

The local launcher is a pool of long-lived worker processes, each on its own
cores, that get one run at a time, the longest first, so that the pool ends
level. Where a run stands is asked of the ledger; a worker's answer says only
that it is free again.
"""

import contextlib
import dataclasses
import os
import pathlib
import selectors
import signal
from typing import Any, Iterator, Sequence

from tfjax import config as config_lib
from tfjax.cost import cores as cores_lib
from tfjax.sweep import ledger
from tfjax.sweep import process as process_lib
from tfjax.sweep.plan import RunSpec
from tfjax.train import records
from tfjax.train import tuning

_RUNNER = "tfjax.train:run"
_TICK_SECONDS = 0.25
# What a worker may take to write a checkpoint when it is told to stop.
_STOP_SECONDS = 60.0
_MAX_FAILED_STARTS = 3


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
    """A worker was given the run."""

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
    runner: str = _RUNNER,
) -> list[Outcome]:
  """Runs every spec that is not complete or diverged yet; blocks until done.

  Args:
    specs: from `tfjax.sweep.plan`.
    workdir: the sweep's directory; each run has its own below it.
    launcher: where to run: "local", on this machine.
    workers: processes; unset: one a core, or one when there is an accelerator.
    sweep: name in the records; unset: the workdir's.
    observer: is told of progress.
    runner: "module:function" with the signature of `tfjax.train.run`.

  Returns:
    One outcome a spec, in their order.

  Raises:
    Interrupted: on SIGINT or SIGTERM, after the workers have stopped.
    LaunchError: workers cannot start.
  """
  if launcher not in LAUNCHERS:
    raise process_lib.LaunchError(f"no launcher {launcher!r}; there are: "
                      f"{', '.join(map(repr, LAUNCHERS))}")
  if workers is not None and workers < 1:
    raise process_lib.LaunchError(f"workers must be at least 1, not {workers}")
  workdir = pathlib.Path(workdir).absolute()
  sweep = sweep or workdir.name
  observer = observer or Observer()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    ledger.write_plan(workdir, sweep, specs)
  except OSError as error:
    raise process_lib.LaunchError(
        f"the sweep's directory cannot be written: {error}") from error
  outcomes, waiting = {}, []
  for spec in specs:
    digest = config_lib.config_hash(spec.config)
    if ledger.is_finished(workdir / spec.run_id, digest):
      state = ledger.run_state(workdir, spec.run_id)
      outcomes[spec.run_id] = Outcome(spec, state, skipped=True)
    else:
      waiting.append(spec)
  pool = LAUNCHERS[launcher](workdir, sweep, observer, runner)
  try:
    for outcome in outcomes.values():
      observer.ended(outcome)
    if waiting:
      pool.run(waiting, workers, num_runs=len(specs))
  finally:
    observer.closed()
  for run_id, outcome in pool.outcomes.items():
    if outcome.state.status == "running":  # another process may be done by now
      outcome = dataclasses.replace(
          outcome, state=ledger.run_state(workdir, run_id))
    outcomes[run_id] = outcome
  ordered = [outcomes[spec.run_id] for spec in specs]
  if pool.stopping:
    raise Interrupted(ordered)
  return ordered


class LocalPool:
  """The local launcher: worker processes on this machine."""

  def __init__(self, workdir: pathlib.Path, sweep: str, observer: Observer,
               runner: str):
    self.outcomes: dict[str, Outcome] = {}
    self.stopping = False
    self._workdir, self._sweep = workdir, sweep
    self._observer, self._runner = observer, runner
    self._selector = selectors.DefaultSelector()
    self._workers: list[process_lib.Worker] = []
    self._waiting: list[RunSpec] = []
    self._runtime: config_lib.RuntimeConfig | None = None
    self._mesh = config_lib.MeshConfig()
    self._failed_starts = 0
    self._told = False

  def run(self, specs: Sequence[RunSpec], workers: int | None,
          num_runs: int) -> None:
    """Runs the specs, and leaves no process behind in whatever case.

    Every worker gets as many cores, a number that follows from `num_runs` of
    the whole sweep and not from what is left of it: on more or fewer cores a
    run that is resumed would end with other bits.
    """
    self._waiting = sorted(
        specs, key=lambda spec: (-spec.budget.flops_total, spec.run_id))
    self._runtime = _runtime(specs)
    # A CPU worker has devices for the largest mesh of its runs.
    self._mesh = max((spec.config.mesh for spec in specs),
                     key=lambda mesh: mesh.num_devices)
    cores = cores_lib.usable()
    if workers is None:
      workers = 1 if tuning.has_accelerator() else len(cores)
    workers = min(workers, num_runs)
    size = max(1, len(cores) // workers)
    shares = [[cores[(index * size + place) % len(cores)]
               for place in range(size)]
              for index in range(min(workers, len(specs)))]
    try:
      with self._signals():
        self._observer.launched(specs, len(shares))
        for share in shares:
          self._start_worker(share)
        while self._workers:
          self._turn()
    finally:
      for worker in self._workers:
        worker.signal_group(signal.SIGKILL)
        worker.bury()
      self._selector.close()
    for spec in self._waiting:  # not reached before the launch was stopped
      state = ledger.run_state(self._workdir, spec.run_id)
      self.outcomes[spec.run_id] = Outcome(spec, state, skipped=True)

  def _turn(self) -> None:
    """Waits a moment for the workers, and handles what they say."""
    for key, _ in self._selector.select(_TICK_SECONDS):
      worker = key.fileobj
      messages, closed = worker.read()
      for message in messages:
        self._handle(worker, message)
      if closed:
        self._bury(worker)
    if self.stopping and not self._told:
      self._told = True  # not by the signal handler, which may cut in anywhere
      self._observer.stopping()
    for worker in self._workers:
      worker.kill_if_late()
    self._observer.tick()

  def _start_worker(self, cores: Sequence[int]) -> None:
    worker = process_lib.Worker(self._runner, cores, self._runtime,
                                self._mesh)
    self._workers.append(worker)
    self._selector.register(worker, selectors.EVENT_READ)

  def _handle(self, worker: process_lib.Worker,
              message: dict[str, Any]) -> None:
    if message["event"] == "ready":
      worker.is_ready = True
      self._failed_starts = 0
    else:
      spec, worker.spec = worker.spec, None
      self._settle(spec, skipped=message["event"] == "busy",
                   failure=message.get("reason"))
    if message["event"] in ("failed", "interrupted"):
      worker.hang_up()  # it ends by itself
    elif self._waiting and not self.stopping:
      worker.spec = self._waiting.pop(0)
      self._observer.started(worker.spec)
      worker.give(worker.spec, self._workdir, self._sweep)
    else:
      worker.hang_up()

  def _bury(self, worker: process_lib.Worker) -> None:
    """A worker has ended: records what it was at, and replaces it."""
    self._selector.unregister(worker)
    self._workers.remove(worker)
    status = worker.bury()
    if worker.spec is not None:
      self._settle(worker.spec, skipped=False,
                   failure=None if self.stopping else
                   process_lib.cause_of_death(status))
    elif not worker.is_ready and not self.stopping:
      self._failed_starts += 1
      if self._failed_starts >= _MAX_FAILED_STARTS:
        raise process_lib.LaunchError(
            f"workers do not start: {process_lib.cause_of_death(status)}\n"
            f"{worker.complaint()}")
    if self._waiting and not self.stopping:
      self._start_worker(worker.cores)

  def _record_failure(self, spec: RunSpec, reason: str) -> None:
    """Writes the failure, unless the run has recorded an end of its own."""
    run_dir = self._workdir / spec.run_id
    if (run_dir / "result.json").exists():
      return
    row = ledger.last_row(run_dir / "metrics.jsonl", "train") or {}
    record = records.RunRecord(
        run_id=spec.run_id, sweep=self._sweep, status="failed",
        status_reason=reason, config_hash=config_lib.config_hash(spec.config),
        params_total=spec.budget.params_total, steps=row.get("step"),
        tokens_seen=row.get("tokens"), finished_at=records.now())
    records.write_result(run_dir, {**dataclasses.asdict(record),
                                   "log_tail": _log_tail(run_dir)})

  def _settle(self, spec: RunSpec, skipped: bool, failure: str | None) -> None:
    """The run's worker is done with it; `failure`: why it failed, if it did."""
    try:
      if failure is not None:
        self._record_failure(spec, failure)
      state = ledger.run_state(self._workdir, spec.run_id)
    except (OSError, records.RecordError) as error:  # a full disk, say
      state = dataclasses.replace(
          ledger.progress(self._workdir, spec.run_id), status="failed",
          reason="; ".join(filter(None, (failure, str(error)))))
    outcome = Outcome(spec, state, skipped)
    self.outcomes[spec.run_id] = outcome
    self._observer.ended(outcome)

  @contextlib.contextmanager
  def _signals(self) -> Iterator[None]:
    """SIGINT and SIGTERM stop the workers gently; the second one, at once."""
    def stop(signum: int, frame: Any) -> None:
      del signum, frame
      seconds = 0 if self.stopping else _STOP_SECONDS
      self.stopping = True
      for worker in self._workers:
        worker.process.terminate()  # its children are its own to end
        worker.expect_end(seconds)
    kept = {}
    try:
      for signum in (signal.SIGINT, signal.SIGTERM):
        kept[signum] = signal.signal(signum, stop)
    except ValueError:  # not the main thread, which keeps its own handlers
      pass
    try:
      yield
    finally:
      for signum, handler in kept.items():
        signal.signal(signum, handler)


LAUNCHERS = {"local": LocalPool}


def _log_tail(run_dir: pathlib.Path) -> str | None:
  try:
    with open(run_dir / ledger.LOG, "rb") as file:
      return process_lib.tail(file)
  except FileNotFoundError:
    return None


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
