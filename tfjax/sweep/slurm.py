# SPDX-License-Identifier: Apache-2.0
"""The launcher for SLURM: an array of jobs, each of which joins the sweep.

What a job is asked for is `tfjax.sweep.slurm_options`'; submitit writes and
submits it. Which run a job takes is settled by claims in the sweep's
directory, as it is among local workers, so that jobs may start late, be
pre-empted, or die: another one goes on.

A job that is told to stop, as at its time limit and before it is pre-empted,
saves its run and puts itself back into the queue. A job that was cancelled
saves and stays cancelled.
"""

import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, Mapping, Sequence

from tfjax.sweep import join
from tfjax.sweep import ledger
from tfjax.sweep import slurm_options
from tfjax.sweep.launch import Interrupted
from tfjax.sweep.launch import Observer
from tfjax.sweep.launch import Outcome
from tfjax.sweep.process import LaunchError
from tfjax.sweep.process import tail
from tfjax.sweep.specs import RunSpec
from tfjax.train import interrupts
from tfjax.train import records

LOGS = ".slurm"  # in the sweep's directory: what submitit writes
_TICK_SECONDS = 0.25
# Between looks at the ledger, and at the queue, which all users share.
_LOOK_SECONDS = 2.0
_QUEUE_SECONDS = 15.0
# After the first Ctrl-C, how long a second one is waited for.
_SECOND_SECONDS = 5.0
_CALL_SECONDS = 60.0


class SlurmLauncher:
  """Submits the jobs and watches what they write until the runs are done."""

  def __init__(self, workdir: pathlib.Path, sweep: str, observer: Observer,
               runner: str, options: Mapping[str, Any]):
    self.outcomes: dict[str, Outcome] = {}
    self.stopping = False
    self._workdir, self._sweep = workdir, sweep
    self._observer, self._runner = observer, runner
    self._request = slurm_options.read(options, sweep)
    self._signals_seen = 0

  def run(self, specs: Sequence[RunSpec], workers: int | None,
          num_runs: int) -> None:
    """Submits one job a worker; then waits, unless the options say not to.

    Raises:
      LaunchError: the runs do not fit into a job, SLURM does not take the
        jobs, or they all end before any has begun a run.
    """
    del num_runs  # a job's cores are SLURM's to say
    slurm_options.check_devices(specs, self._request)
    count = workers or min(len(specs), self._request.parallelism)
    watch = _Watch(self._workdir, specs, self._observer, self.outcomes)
    only = join.only_of(self._workdir, self._sweep, specs)
    with interrupts.handled_by(self._count):
      job = _submit(self._workdir, self._sweep, self._runner, self._request,
                    count, only)
      _say(f"submitted {count} {'job' if count == 1 else 'jobs'} to SLURM as "
           f"{job}; to cancel: scancel {job}; logs: {self._workdir / LOGS}")
      self._observer.launched(specs, count)
      if self._request.wait:
        self._wait(watch, job)
      for spec in specs:
        if spec.run_id not in self.outcomes:
          state = ledger.run_state(self._workdir, spec.run_id)
          self.outcomes[spec.run_id] = Outcome(spec, state, skipped=True)

  def _wait(self, watch: "_Watch", job: str) -> None:
    """Tells the observer what the jobs do, until nothing is left to be done.

    That is when every run has ended, or every job has.
    """
    next_look, next_queue, shown = 0.0, time.monotonic() + _LOOK_SECONDS, None
    while watch.waiting:
      now = time.monotonic()
      if now >= next_look:
        watch.look()
        next_look = now + max(_LOOK_SECONDS, 10 * (time.monotonic() - now))
      if watch.waiting and now >= next_queue:
        queued = _queue(job)
        if queued == []:
          watch.look()  # what the last job wrote after the last look
          self._report_gone(watch, job)
          return
        if queued and (said := _waiting_for(queued)) != shown:
          shown = said
          if said:
            _say(f"no job runs yet; SLURM says: {said}")
        next_queue = now + _QUEUE_SECONDS
      if self._signals_seen:
        self._leave(job)
        return
      self._observer.tick()
      time.sleep(_TICK_SECONDS)
    # There is nothing left for jobs that have not begun.
    _call("scancel", "--state=PENDING", job)

  def _leave(self, job: str) -> None:
    """After Ctrl-C: the jobs go on, unless it is pressed again."""
    self.stopping = True
    self._observer.stopping()
    _say(f"the jobs go on without this command; to cancel them: scancel {job}"
         f", or press Ctrl-C again within {_SECOND_SECONDS:.0f} s; started "
         "again, this command submits more jobs for what is left")
    end = time.monotonic() + _SECOND_SECONDS
    while time.monotonic() < end and self._signals_seen < 2:
      time.sleep(_TICK_SECONDS)
    if self._signals_seen > 1:
      answer = _call("scancel", job)
      _say(f"cancelled the jobs {job}" if answer.returncode == 0 else
           f"scancel {job}: {answer.stderr.strip()}")

  def _report_gone(self, watch: "_Watch", job: str) -> None:
    if not watch.waiting:
      return
    text = (f"all jobs of {job} have ended and {len(watch.waiting)} runs are "
            f"not done; {_last_words(self._workdir / LOGS, job)}")
    if not watch.has_begun:
      raise LaunchError(text)
    _say(text)

  def _count(self, signum: int) -> None:
    # Who asks for SIGTERM does not sit at the keyboard.
    if signum == signal.SIGINT or not self._signals_seen:
      self._signals_seen += 1


class _Watch:
  """What the ledger says of the runs since this was made."""

  def __init__(self, workdir: pathlib.Path, specs: Sequence[RunSpec],
               observer: Observer, outcomes: dict[str, Outcome]):
    self.waiting = {spec.run_id: spec for spec in specs}
    self.has_begun = False
    self._workdir, self._observer = workdir, observer
    self._outcomes = outcomes
    self._started: set[str] = set()
    # A failure from before is not this launch's.
    self._before = {spec.run_id: _ended_at(self._state(spec.run_id))
                    for spec in specs}

  def look(self) -> None:
    for run_id, spec in list(self.waiting.items()):
      state = self._state(run_id)
      ended = (state.status in ("failed", *records.FINISHED)
               and _ended_at(state) != self._before[run_id])
      if ended and state.status == "failed":
        # What has failed in an ensemble is asked for again, alone.
        ended = self._written_at(run_id) > self._asked_at(run_id)
      if ended or state.status == "running":
        self.has_begun = True
        if run_id not in self._started:
          self._started.add(run_id)
          self._observer.started(spec)
      if ended:
        del self.waiting[run_id]
        self._outcomes[run_id] = Outcome(spec, state, skipped=False)
        self._observer.ended(self._outcomes[run_id])

  def _state(self, run_id: str) -> ledger.RunState:
    return ledger.run_state(self._workdir, run_id)

  def _asked_at(self, run_id: str) -> float:
    """When it last was, by the plan; 0: it is planned no longer."""
    rows = ledger.read_plan(self._workdir)["runs"]
    return next((row["asked_at"] for row in rows if row["run_id"] == run_id),
                0.0)

  def _written_at(self, run_id: str) -> float:
    """When its result was, by the file system's clock; 0: it is gone again."""
    try:
      return (self._workdir / run_id / "result.json").stat().st_mtime
    except FileNotFoundError:
      return 0.0


def _ended_at(state: ledger.RunState) -> Any:
  return None if state.result is None else (
      state.status, state.result.get("finished_at"))


# --- In the job --------------------------------------------------------------


def work(workdir: str, sweep: str, runner: str, workers: int,
         linger: float, only: Sequence[str] = ()) -> None:
  """What a job of the array does: joins the sweep; stopped, requeues itself."""
  def stop(signum: int, frame: Any) -> None:
    raise Interrupted([])  # nothing is running yet, or any more

  def pass_on(signum: int, frame: Any) -> None:
    signal.raise_signal(signal.SIGTERM)

  try:
    signal.signal(signal.SIGTERM, stop)
    # What a site or a user may send in its place.
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
      signal.signal(signum, pass_on)
    code = join.main([workdir, f"--sweep={sweep}", f"--runner={runner}",
                      f"--workers={workers}", f"--linger={linger}",
                      *(["--only", *only] if only else [])])
  except Interrupted as error:
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
      signal.signal(signum, signal.SIG_IGN)
    _requeue(_own_number(os.environ))
    raise SystemExit(join.STOPPED) from error
  if code == join.REFUSED:  # runs that fail do not make it the job's failure
    raise SystemExit(code)


def _own_number(environment: Mapping[str, str]) -> str:
  """This job's. One task of an array has the number of the whole array."""
  array = environment.get("SLURM_ARRAY_JOB_ID")
  return environment["SLURM_JOB_ID"] if array is None else (
      f"{array}_{environment['SLURM_ARRAY_TASK_ID']}")


def _requeue(job: str) -> None:
  """Puts this job back into the queue, where SLURM is not ending it itself.

  A cancelled job must stay cancelled, though SLURM would requeue it, and one
  that is pre-empted is requeued by SLURM. Both are no longer "running".
  """
  state = _call("squeue", "--noheader", f"--jobs={job}", "--format=%T")
  if state.stdout.strip() != "RUNNING":
    _say(f"job {job} was stopped by SLURM "
         f"({state.stdout.strip() or state.stderr.strip()}): not requeued")
    return
  answer = _call("scontrol", "requeue", job)
  _say(f"job {job} goes back into the queue" if answer.returncode == 0 else
       f"job {job} cannot be requeued: {answer.stderr.strip()}; launch the "
       "sweep again to go on with what is left")


# --- SLURM -------------------------------------------------------------------


def _submit(workdir: pathlib.Path, sweep: str, runner: str,
            request: slurm_options.Request, count: int,
            only: Sequence[str]) -> str:
  """Submits the array; returns its number."""
  import submitit  # pylint: disable=import-outside-toplevel
  folder = workdir / LOGS
  try:
    executor = submitit.SlurmExecutor(folder)
  except RuntimeError as error:
    raise LaunchError(
        "launcher 'slurm' needs SLURM's commands (sbatch, srun) on this "
        "machine; 'print' gives commands for any other scheduler") from error
  executor.update_parameters(**request.parameters)
  try:
    with contextlib.redirect_stderr(io.StringIO()):  # said again in the error
      jobs = executor.map_array(work, *(
          [argument] * count for argument in (
              str(workdir), sweep, runner, request.workers_per_job,
              60 * request.linger_min, only)))
  except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
    raise LaunchError(f"SLURM does not take the jobs: {error}") from error
  return jobs[0].job_id.partition("_")[0]


def _queue(job: str) -> list[tuple[str, str]] | None:
  """State and reason of the jobs that have not ended; None: no answer."""
  answer = _call("squeue", "--noheader", "--array", f"--jobs={job}",
                 "--format=%T|%r")
  if answer.returncode:
    return [] if "Invalid job id" in answer.stderr else None
  return [tuple(line.split("|", 1)) for line in answer.stdout.splitlines()]


def _waiting_for(queued: Sequence[tuple[str, str]]) -> str:
  """Why no job runs, in SLURM's words; empty when one does."""
  if any(state != "PENDING" for state, _ in queued):
    return ""
  return ", ".join(sorted({reason for _, reason in queued}))


def _last_words(folder: pathlib.Path, job: str) -> str:
  """The end of what the job that spoke last has written."""
  logs = [path for path in folder.glob(f"{job}_*.err")
          if path.stat().st_size]
  if not logs:
    return f"no job has written a word to {folder}"
  last = max(logs, key=lambda path: path.stat().st_mtime)
  with open(last, "rb") as file:
    return f"{last} ends with:\n{tail(file)}"


def _call(*command: str) -> subprocess.CompletedProcess[str]:
  try:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=_CALL_SECONDS, check=False)
  except (OSError, subprocess.TimeoutExpired) as error:
    return subprocess.CompletedProcess(command, 1, "", str(error))


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
