# SPDX-License-Identifier: Apache-2.0
"""The parent's side of a local worker process: start it, talk to it, end it.

What is to be run is `tfjax.sweep.agenda`'s, what became of it
`tfjax.sweep.local`'s, what of this machine a worker gets `tfjax.sweep.shares`'.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, IO, Iterator, Sequence

import tfjax
from tfjax import config as config_lib
from tfjax.sweep import agenda as agenda_lib
from tfjax.sweep import shares
from tfjax.train import out_of_memory
from tfjax.train import tuning

_TAIL_BYTES = 4000
# What an idle worker may take to end, and one whose output is closed.
_END_SECONDS = 10.0
_EXIT_SECONDS = 5.0


class LaunchError(RuntimeError):
  """The sweep cannot run at all; the message says why."""


class Worker:
  """One worker process and the unit that it is at."""

  def __init__(self, runner: str, share: shares.Share,
               runtime: config_lib.RuntimeConfig,
               mesh: config_lib.MeshConfig):
    self.share = share
    self.unit: agenda_lib.Unit | None = None
    self.kernel_kills: int | None = None  # when it was given the unit
    self.is_ready = False
    self.is_leaving = False
    self._end_by: float | None = None
    self.stderr: IO[bytes] = tempfile.TemporaryFile()
    # -P: modules in the current directory shadow nothing.
    command = [sys.executable, "-P", "-m", "tfjax.sweep.worker", runner]
    with _pinned(share.cores):  # inherited by the child
      self.process = subprocess.Popen(
          command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
          stderr=self.stderr,
          env={**_environment(), **tuning.process_environment(
              runtime, cores=len(share.cores), mesh=mesh),
               **share.environment},
          # Its own group: out of reach of the terminal's Ctrl-C, and its
          # children can be ended with it.
          process_group=0)
    self._partial = b""

  # For selectors, which wait for its answers.
  def fileno(self) -> int:
    return self.process.stdout.fileno()

  def give(self, unit: agenda_lib.Unit, workdir: pathlib.Path,
           sweep: str) -> None:
    self.unit, self.kernel_kills = unit, out_of_memory.kernel_kills()
    # A worker that has just died is found dead by its closed output.
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.write(
          json.dumps(task(unit, workdir, sweep)).encode() + b"\n")
      self.process.stdin.flush()

  def read(self) -> tuple[list[dict[str, Any]], bool]:
    """The whole messages that have come, and whether the output is closed."""
    data = os.read(self.fileno(), 1 << 16)
    *lines, self._partial = (self._partial + data).split(b"\n")
    return [json.loads(line) for line in lines], not data

  def hang_up(self) -> None:
    """Tells an idle worker that there is nothing more to do."""
    self.is_leaving = True
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()
    self.expect_end(_END_SECONDS)

  def expect_end(self, seconds: float) -> None:
    """From then on `kill_if_late` kills it."""
    end_by = time.monotonic() + seconds
    self._end_by = min(end_by, self._end_by or end_by)

  def kill_if_late(self) -> None:
    if self._end_by is not None and time.monotonic() > self._end_by:
      self.signal_group(signal.SIGKILL)

  def signal_group(self, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self.process.pid, signum)

  def bury(self) -> int:
    """Its exit status, once its output is closed; leaves none of its group."""
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(_EXIT_SECONDS)
    self.signal_group(signal.SIGKILL)
    self.process.stdout.close()
    return self.process.wait()

  def complaint(self) -> str:
    return tail(self.stderr)


def task(unit: agenda_lib.Unit, workdir: pathlib.Path,
         sweep: str) -> dict[str, Any]:
  """A unit as a worker is told of it, in JSON."""
  return dict(
      runner=unit.runner, workdir=str(workdir), sweep=sweep,
      runs=[dict(run_id=spec.run_id, config=config_lib.to_dict(spec.config))
            for spec in unit.specs], options=dict(unit.options))


def tail(file: IO[bytes]) -> str:
  """The end of a text file."""
  size = file.seek(0, os.SEEK_END)
  file.seek(max(0, size - _TAIL_BYTES))
  return file.read().decode(errors="replace").strip()


def cause_of_death(status: int) -> str:
  """A worker's exit status in words."""
  if status >= 0:
    return f"the worker process exited with status {status}"
  try:
    name = signal.Signals(-status).name
  except ValueError:
    name = f"signal {-status}"
  return f"the worker process was killed by {name}"


def _environment() -> dict[str, str]:
  """This environment, in which the same tfjax is found."""
  root = str(pathlib.Path(tfjax.__file__).absolute().parents[1])
  known = os.environ.get("PYTHONPATH")
  return {**os.environ,
          "PYTHONPATH": os.pathsep.join([root, known] if known else [root])}


@contextlib.contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
  """Narrows this thread, and what it starts meanwhile, to some cores."""
  if not hasattr(os, "sched_setaffinity"):
    yield
    return
  kept = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, kept)
