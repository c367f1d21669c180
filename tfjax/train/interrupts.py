# SPDX-License-Identifier: Apache-2.0
"""Signals that ask training to stop: the first saves, the second ends it."""

import contextlib
import logging
import signal
import threading
import time
from typing import Any, Callable, Iterator

_LOG = logging.getLogger("tfjax")

# SIGTERM: pre-emption. SIGUSR1: what SLURM's --signal is usually set to, some
# time before the limit. SIGINT: a person at the keyboard.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Who stops a whole group reaches each process twice, the second time through
# its launcher, which passes on what it got.
_ECHO_SECONDS = 1.0


class Stop:
  """Whether this process was told to stop, and by which signal."""

  def __init__(self) -> None:
    self.signal: str | None = None  # its name

  def is_set(self) -> bool:
    return self.signal is not None


@contextlib.contextmanager
def handled_by(handler: Callable[[int], None]) -> Iterator[None]:
  """SIGINT and SIGTERM call `handler`, with their number; for launchers.

  A SIGTERM within a second of another is its echo. Outside of the main thread
  nothing changes, as it alone may have handlers.
  """
  terminated = -float("inf")

  def handle(number: int, frame: Any) -> None:
    nonlocal terminated
    del frame
    before, now = terminated, time.monotonic()
    if number == signal.SIGTERM:
      terminated = now
      if now - before < _ECHO_SECONDS:
        return
    handler(number)
  kept = {}
  if threading.current_thread() is threading.main_thread():
    kept = {number: signal.signal(number, handle)
            for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for number, before in kept.items():
      signal.signal(number, before)


@contextlib.contextmanager
def stop_requested() -> Iterator[Stop]:
  """A `Stop` that `SIGNALS` set while training runs.

  The second one is what it was before, and ends the process at once; the same
  within a second counts as one. A signal that is ignored stays so: whoever
  started this process handles it.
  """
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop  # only the main thread may have handlers
    return
  before, first = {}, time.monotonic()

  def restore() -> None:
    for number, handler in before.items():
      # None: it was not Python that had set it, and Python cannot set it back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def handle(number, _):
    nonlocal first
    name = signal.Signals(number).name
    if stop.is_set():
      if name != stop.signal or time.monotonic() - first > _ECHO_SECONDS:
        restore()
        signal.raise_signal(number)
      return
    stop.signal, first = name, time.monotonic()
    _LOG.warning("%s: saving after this step, then stopping; a second signal "
                 "stops at once", name)

  for number in SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      before[number] = signal.signal(number, handle)
  try:
    yield stop
  finally:
    restore()
