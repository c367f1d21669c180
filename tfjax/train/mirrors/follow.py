# SPDX-License-Identifier: Apache-2.0
"""The process that keeps the mirrors of runs while they train.

    python -m tfjax.train.mirrors.follow

One for each process that trains, however many runs that has. It is told on
its standard input which run begins and which one ends (JSON lines), reads the
rows from the run's metrics.jsonl, and answers when a mirror is done. Nothing
that hangs, raises or is slow here is in the way of training: the run's files
are the queue between them. When the other process ends, however it does, this
one brings its mirrors up to date and ends as well, in bounded time.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any, Iterator
import weakref

from tfjax.train.mirrors import columns
from tfjax.train.mirrors import reader
from tfjax.train.mirrors import tensorboard_files
from tfjax.train.mirrors import wandb_run

LOG = "mirror.log"  # in a run's directory: what went wrong here
_LOCK = ".mirror"  # in a run's directory: held by who writes its mirrors
_POLL_SECONDS = 1.0
# How long a run that has been closed may take to write its result.
_RESULT_SECONDS = 10.0
# How long this process may take when the one that trains has ended.
_CLOSE_SECONDS = 60.0
_MESSAGES = 1000

_reachable = True  # the wandb server, when it was last asked for
_following: "weakref.WeakSet[Follower]" = weakref.WeakSet()  # mirrors open


class Follower:
  """The mirrors of one run.

  Args:
    mode: of wandb; None: the run's own, or offline where that is online and
      the server is not reachable.

  Attributes:
    is_done: they have been finished, or given up.
    problems: what went wrong.
    where: of each mirror, where it is to be found.
    num_rows: that the run has.
  """

  def __init__(self, run_dir: pathlib.Path, mode: str | None = None):
    self.run_dir = run_dir
    self.is_done = False
    self.problems: list[str] = []
    self.where: list[str] = []
    self._mode = mode
    self._reader = reader.Reader(run_dir / "metrics.jsonl")
    self._mirrors: list[Any] | None = None  # until the lock is ours
    self._held = contextlib.ExitStack()
    self._close_by: float | None = None

  @property
  def num_rows(self) -> int:
    return len(self._reader.rows)

  def close(self, seconds: float = _RESULT_SECONDS) -> None:
    """The run writes no more rows; its result comes soon, or never."""
    close_by = time.monotonic() + seconds
    self._close_by = min(close_by, self._close_by or close_by)

  def advance(self) -> None:
    """Brings the mirrors up to date; finishes them when the run has ended."""
    result, is_late = None, False
    if self._close_by is not None:
      result = columns.read_result(self.run_dir)
      is_late = time.monotonic() >= self._close_by
    if self._mirrors is None:
      with contextlib.ExitStack() as lock:
        if not lock.enter_context(locked(self.run_dir)):
          return
        self._held = lock.pop_all()
      self._mirrors = self._open()
      _following.add(self)
    replaced = self._reader.poll()
    for mirror in list(self._mirrors):
      with self._guarded(mirror):
        mirror.update(self._reader.rows, replaced)
    if result is None and not is_late:
      return
    for mirror in list(self._mirrors):
      with self._guarded(mirror):
        self.where.append(mirror.where())
        mirror.finish(self._reader.rows, result)
        self.problems += mirror.notes
    self._held.close()
    _following.discard(self)
    self.is_done = True

  def _open(self) -> list[Any]:
    about = columns.about(self.run_dir)
    mirrors: list[Any] = []
    if about.tracking.get("tensorboard"):
      with self._guarded():
        mirrors.append(tensorboard_files.TensorBoardFiles(self.run_dir))
    mode = self._mode or wandb_run.mode_of(about.tracking["wandb"])
    if mode != "disabled":
      with self._guarded():
        mirrors.append(self._open_wandb(about, mode))
    return mirrors

  def _open_wandb(self, about: columns.About, mode: str
                  ) -> wandb_run.WandbRun:
    """Offline where the server is not reachable, and then for all runs that
    follow: each would wait for it."""
    global _reachable  # pylint: disable=global-statement
    if mode == "online" and (_reachable or self._mode):
      try:
        return wandb_run.WandbRun(about, self.run_dir, mode)
      except Exception as error:  # pylint: disable=broad-exception-caught
        if self._mode:
          raise
        if _following:
          raise  # the failed one keeps its name until all are torn down
        _reachable = False
        self.problems.append(
            f"wandb is not reachable ({error}); tracking offline")
        wandb_run.teardown()
    return wandb_run.WandbRun(about, self.run_dir, "offline")

  @contextlib.contextmanager
  def _guarded(self, mirror: Any = None) -> Iterator[None]:
    """A mirror that raises is given up; the others go on."""
    try:
      yield
    except Exception as error:  # pylint: disable=broad-exception-caught
      self.problems.append(f"{type(error).__name__}: {error}")
      with open(self.run_dir / LOG, "a", encoding="utf-8") as log:
        traceback.print_exc(file=log)
      if mirror is not None:
        self._mirrors.remove(mirror)


@contextlib.contextmanager
def locked(run_dir: pathlib.Path) -> Iterator[bool]:
  """Whether the run's mirrors are this process's to write, until the end of
  the block; another one may be about to finish them."""
  with open(run_dir / _LOCK, "w", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
    else:
      yield True


def main() -> None:
  # Ctrl-C and a scheduler's warning are for who trains.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
  os.nice(10)
  inbox: queue.Queue = queue.Queue(_MESSAGES)
  threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
  followers: dict[str, Follower] = {}
  ending = False
  while followers or not ending:
    for message in _messages(inbox, wait=not followers):
      if message is None:
        ending = True
        for follower in followers.values():
          follower.close()
      elif message["event"] == "begin":
        if old := followers.pop(message["run"], None):  # it is taken up again
          old.close(seconds=0)
          _advance(old)
        followers[message["run"]] = Follower(pathlib.Path(message["run"]))
      elif message["run"] in followers:
        followers[message["run"]].close()
    done = [follower for follower in followers.values()
            if _advance(follower)]
    for follower in done:
      del followers[str(follower.run_dir)]
    if done and not followers:
      wandb_run.teardown()
    for follower in done:
      _say(dict(run=str(follower.run_dir), problems=follower.problems))


def _advance(follower: Follower) -> bool:
  """Whether it is done, by what it could do or could not."""
  try:
    follower.advance()
  except Exception as error:  # pylint: disable=broad-exception-caught
    follower.problems.append(f"{type(error).__name__}: {error}")
    return True
  return follower.is_done


def _messages(inbox: queue.Queue, wait: bool) -> list[dict[str, Any] | None]:
  """What has come in; waits for it, for ever where there is no run."""
  found: list[dict[str, Any] | None] = []
  with contextlib.suppress(queue.Empty):
    found.append(inbox.get(timeout=None if wait else _POLL_SECONDS))
    while True:
      found.append(inbox.get_nowait())
  return found


def _listen(inbox: queue.Queue) -> None:
  for line in sys.stdin:
    inbox.put(json.loads(line))
  inbox.put(None)
  # Whatever hangs, in wandb or in its hooks at exit, ends here.
  time.sleep(_CLOSE_SECONDS)
  os._exit(1)


def _say(message: dict[str, Any]) -> None:
  with contextlib.suppress(OSError):  # nobody may be left to hear it
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
  main()
  sys.stderr.flush()
  os._exit(0)
