# SPDX-License-Identifier: Apache-2.0
"""A worker process of a local sweep: runs what its parent hands it.

    python -m tfjax.sweep.worker MODULE:FUNCTION

Speaks JSON lines: tasks come on standard input, answers go to what was
standard output when it started. Everything that the run itself prints, from
Python or from C, goes to its log.txt. The process keeps its compiled programs
from unit to unit and ends at the end of its input: when the parent is done, and
also when the parent is dead.
"""

import contextlib
import faulthandler
import functools
import importlib
import json
import logging
import os
import pathlib
import queue
import signal
import sys
import threading
import traceback
from typing import Any, Callable, IO, Iterator, Mapping

from tfjax import config as config_lib
from tfjax.sweep import agenda
from tfjax.sweep import ledger
from tfjax.train import lease
from tfjax.train import loop

# What an orphan may take to write a checkpoint, in seconds.
_ORPHAN_GRACE = 60.0

Runner = Callable[..., Any]


def main(arguments: list[str]) -> int:
  tasks, answers = _take_over_pipes()
  # The terminal's Ctrl-C is the parent's to handle; it sends SIGTERM, which
  # a run answers with a checkpoint and which ends an idle worker at once.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, _exit)
  faulthandler.enable(2)
  log_to_stderr()
  load_runner(arguments[0])  # now: what cannot be imported is told at once
  inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
  busy = threading.Event()
  threading.Thread(
      target=_listen, args=(tasks, inbox, busy), daemon=True).start()
  _say(answers, event="ready", pid=os.getpid())
  while (task := inbox.get()) is not None:
    answer = _run(task)
    busy.clear()
    try:
      _say(answers, **answer)
    except BrokenPipeError:
      return 0
    # After a failure memory may have leaked and state may be broken: a fresh
    # process takes over. After an interruption nothing more is wanted.
    if answer["event"] in ("failed", "interrupted"):
      break
  return 0


def log_to_stderr() -> None:
  """What tfjax tells of a run as it goes, and warnings of others."""
  logging.basicConfig(format="%(asctime)s %(message)s")
  logging.getLogger("tfjax").setLevel(logging.INFO)


def perform(runner: Runner, task: Mapping[str, Any]) -> dict[str, Any]:
  """Does one task in this process; the answer says how it ended, the records
  the rest.

  Its event is finished, interrupted (by a signal), paused (where it was told
  to), busy (it is another process's) or failed, with the `reason`.
  """
  configs = [config_lib.from_dict(run["config"]) for run in task["runs"]]
  run_ids = [run["run_id"] for run in task["runs"]]
  given = dict(sweep=task["sweep"], **task["options"])
  try:
    if task["runner"] == agenda.ENSEMBLE_RUNNER:
      found = runner(configs, task["workdir"], run_ids=run_ids, **given)
    else:
      found = [runner(configs[0], task["workdir"], run_id=run_ids[0], **given)]
  except (loop.RunDirectoryBusyError, lease.LostError) as error:
    print(error, file=sys.stderr)
    return dict(event="busy")
  except Exception as error:  # the sweep goes on without this run
    traceback.print_exc()
    return dict(event="failed", reason=_reason(error))
  stopped = [one for one in found if one.status == "interrupted"]
  if not stopped:
    return dict(event="finished")
  paused = task["options"].get("until_step") is not None and all(
      one.stopped_by is None for one in stopped)
  return dict(event="paused" if paused else "interrupted")


def _run(task: Mapping[str, Any]) -> dict[str, Any]:
  """`perform`, with its output in the log of the first of its runs."""
  logs = [pathlib.Path(task["workdir"]) / run["run_id"] / ledger.LOG
          for run in task["runs"]]
  try:
    for log in logs:
      log.parent.mkdir(parents=True, exist_ok=True)
      log.touch()
    for log in logs[1:]:
      with open(log, "a", encoding="utf-8") as file:
        file.write(f"in one step with {logs[0].parent.name}: see its log\n")
  except OSError as error:  # a full disk, say
    return dict(event="failed", reason=_reason(error))
  with _output_to(logs[0]):
    return perform(load_runner(task["runner"]), task)


def _reason(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0]}" if lines else (
      type(error).__name__)


def _take_over_pipes() -> tuple[IO[str], IO[str]]:
  """Keeps the pipes to itself; whatever prints now, prints to stderr."""
  tasks = os.fdopen(os.dup(0), "r", encoding="utf-8")
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  with open(os.devnull, "rb") as nothing:
    os.dup2(nothing.fileno(), 0)
  os.dup2(2, 1)
  return tasks, answers


@contextlib.contextmanager
def _output_to(path: pathlib.Path) -> Iterator[None]:
  """Sends descriptors 1 and 2, and so everything printed, to a file."""
  kept = os.dup(2)
  with open(path, "ab") as file:
    for descriptor in (1, 2):
      os.dup2(file.fileno(), descriptor)
  try:
    yield
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in (1, 2):
      os.dup2(kept, descriptor)
    os.close(kept)


def _listen(tasks: IO[str], inbox: queue.SimpleQueue,
            busy: threading.Event) -> None:
  for line in tasks:
    busy.set()
    inbox.put(json.loads(line))
  inbox.put(None)
  if busy.is_set():  # the parent died: it never hangs up on a busy worker
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(_ORPHAN_GRACE)
    os._exit(1)


def _exit(signum: int, frame: Any) -> None:
  del frame
  raise SystemExit(128 + signum)


def _say(answers: IO[str], **message: Any) -> None:
  answers.write(json.dumps(message) + "\n")
  answers.flush()


@functools.cache
def load_runner(name: str) -> Runner:
  """The function of a "module:function"."""
  module, _, function = name.partition(":")
  return getattr(importlib.import_module(module), function)


def _leave(status: int) -> None:
  """Ends the process; a library's thread that will not end holds up nobody."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


if __name__ == "__main__":
  try:
    _leave(main(sys.argv[1:]))
  except SystemExit as stop:
    _leave(stop.code if isinstance(stop.code, int) else 1)
  except BaseException:  # all of it, to end by `_leave`
    traceback.print_exc()
    _leave(1)
