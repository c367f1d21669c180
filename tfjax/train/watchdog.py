# SPDX-License-Identifier: Apache-2.0
"""Notices when training stands still, and says where every process is.

The loop says where it is several times a step; a thread beside it looks on.
Processes tell each other through files in the run directory, as one that hangs
answers nothing else: process-I.json is where it stands, process-I.txt what its
threads were doing, for people. Nothing is ended or restarted here.
"""

import contextlib
import faulthandler
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any

import jax

_LOG = logging.getLogger("tfjax")

# A large model is restored and compiled for longer than any step takes.
_LONG_PHASES, _LONGER = ("start", "compile"), 4
_LONGEST_GRACE = 15.0  # seconds that process 0 gives the others to write
_MOST_LINES = 20


class Watchdog:
  """Watches one process within `with`; without `stall_seconds` it does not.

  The phases "start", which it begins with, and "compile" may take four times
  as long.
  """

  def __init__(self, run_dir: pathlib.Path, stall_seconds: float | None):
    self._directory = pathlib.Path(run_dir) / "stalls"
    self._seconds = stall_seconds
    self._place = ("start", 0, time.monotonic())
    self._closed = threading.Event()
    self._thread: threading.Thread | None = None

  def at(self, phase: str, step: int) -> None:
    """Training is now here; also called again, it counts as progress."""
    self._place = (phase, step, time.monotonic())

  def __enter__(self) -> "Watchdog":
    if self._seconds is not None:
      self._index, self._count = jax.process_index(), jax.process_count()
      self._forget_state()  # of the process before; its stacks stay
      self.at("start", 0)
      self._thread = threading.Thread(
          target=self._watch, name="watchdog", daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
    if self._thread is not None:
      self._thread.join()

  def _watch(self) -> None:
    wait = self._limit(self._place)
    while not self._closed.wait(wait):
      place = self._place
      wait = place[2] + self._limit(place) - time.monotonic()
      if wait <= 0:
        self._stalled(place)
        wait = self._limit(self._place)

  def _limit(self, place: tuple[str, int, float]) -> float:
    return self._seconds * (_LONGER if place[0] in _LONG_PHASES else 1)

  def _stalled(self, place: tuple[str, int, float]) -> None:
    """Reports until it moves again or the run ends."""
    phase, step, since = place
    limit = self._limit(place)
    grace = min(limit / 2, _LONGEST_GRACE)
    while self._place[2] == since and not self._closed.is_set():
      self._write_own(place)
      _LOG.warning(
          "process %d: no progress for %.0f s, at step %d in %r; stacks in %s",
          self._index, time.monotonic() - since, step, phase,
          self._stacks_path())
      if self._index == 0 and self._count > 1:
        self._until_moving(since, grace)
        if self._place[2] == since and not self._closed.is_set():
          _LOG.warning("%s", self._everyone())
      self._until_moving(since, limit)
    if self._place[2] != since:
      _LOG.warning("process %d: moves again, after %.0f s at step %d in %r",
                   self._index, self._place[2] - since, step, phase)
    self._forget_state()

  def _until_moving(self, since: float, seconds: float) -> None:
    """Waits so long, or until there is progress or the end."""
    end = time.monotonic() + seconds
    while (self._place[2] == since and time.monotonic() < end and
           not self._closed.wait(min(1.0, seconds / 10))):
      pass

  def _state_path(self, index: int) -> pathlib.Path:
    return self._directory / f"process-{index}.json"

  def _stacks_path(self) -> pathlib.Path:
    return self._directory / f"process-{self._index}.txt"

  def _forget_state(self) -> None:
    with contextlib.suppress(OSError):
      self._state_path(self._index).unlink()

  def _write_own(self, place: tuple[str, int, float]) -> None:
    phase, step, since = place
    seconds = time.monotonic() - since
    state = dict(process=self._index, host=socket.gethostname(),
                 pid=os.getpid(), step=step, phase=phase,
                 since=time.time() - seconds)
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      with open(self._stacks_path(), "a", encoding="utf-8") as file:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"{now}: process {self._index} of {self._count} on "
                   f"{state['host']} (pid {state['pid']}): no progress for "
                   f"{seconds:.0f} s, at step {step} in {phase!r}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write("\n")
      path = self._state_path(self._index)
      temporary = path.with_suffix(".new")
      temporary.write_text(json.dumps(state), encoding="utf-8")
      os.replace(temporary, path)
    except OSError as error:
      _LOG.warning("process %d: cannot write to %s: %s", self._index,
                   self._directory, error)

  def _everyone(self) -> str:
    """Where each process is, those that hold up the others first."""
    states, silent = [], []
    for index in range(self._count):
      try:
        path = self._state_path(index)
        states.append(json.loads(path.read_text(encoding="utf-8")))
      except (OSError, ValueError):
        silent.append(index)
    lines = [f"where the {self._count} processes are, the last first:"]
    if silent:
      lines.append(
          f"  {_processes(silent)}: no word in {self._directory}; dead, or "
          "moving, or not on this file system")
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for state in states:
      groups.setdefault((state["step"], state["phase"]), []).append(state)
    # Who came to a step's phase first and stayed is behind, or waits the
    # longest: at one step the others have gone on to wait for it.
    for (step, phase), members in sorted(groups.items(), key=lambda item: (
        item[0][0], min(state["since"] for state in item[1]))):
      seconds = time.time() - min(state["since"] for state in members)
      hosts = sorted({state["host"] for state in members})
      lines.append(
          f"  step {step} in {phase!r} for {seconds:.0f} s: "
          f"{_processes([state['process'] for state in members])} on "
          + ", ".join(hosts[:4]) + (", ..." if len(hosts) > 4 else ""))
    if len(lines) > _MOST_LINES:
      lines[_MOST_LINES:] = [f"  and {len(lines) - _MOST_LINES} places more"]
    return "\n".join(lines)


def _processes(indices: list[int]) -> str:
  """[0, 2, 3, 4] -> "processes 0, 2-4"."""
  ranges: list[list[int]] = []
  for index in indices:
    if ranges and index == ranges[-1][1] + 1:
      ranges[-1][1] = index
    else:
      ranges.append([index, index])
  text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
  return ("process " if len(indices) == 1 else "processes ") + text
