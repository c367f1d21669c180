# SPDX-License-Identifier: Apache-2.0
"""Time: what training has taken, and when a checkpoint is due by it."""

import time
from typing import Any

from tfjax import config as config_lib


class Clock:
  """Seconds and tokens of training; runs inside `with`, stands outside.

  It goes on over interruptions, on whatever devices the next part runs, and
  is not turned back by a rollback: what was undone has been paid for.

  Attributes:
    tokens: of all steps, those that a rollback undid too.
    device_kinds: that any part of the run was on.
  """

  def __init__(self, devices: int, device_kind: str,
               counters: dict[str, Any] | None = None):
    counters = counters or dict(seconds=0.0, device_seconds=0.0,
                                clock_tokens=0, device_kinds=[])
    self.tokens = counters["clock_tokens"]
    self.device_kinds = sorted({device_kind, *counters["device_kinds"]})
    self._devices = devices
    self._seconds = counters["seconds"]
    # Of the parts before this one, which may have had other devices.
    self._before = counters["device_seconds"] - self._seconds * devices
    self._begin: float | None = None
    self._last = (self._seconds, self.tokens)

  def counters(self) -> dict[str, Any]:
    """What a resume goes on from."""
    return dict(seconds=self.seconds(), device_seconds=self.device_seconds(),
                clock_tokens=self.tokens, device_kinds=self.device_kinds)

  def __enter__(self) -> None:
    self._begin = time.perf_counter()

  def __exit__(self, *_) -> None:
    self._seconds, self._begin = self.seconds(), None

  def seconds(self) -> float:
    running = 0.0
    if self._begin is not None:
      running = time.perf_counter() - self._begin
    return self._seconds + running

  def device_seconds(self) -> float:
    return self._before + self.seconds() * self._devices

  def add(self, tokens: int) -> None:
    self.tokens += tokens

  def rate(self) -> float | None:
    """Tokens a second over all of training."""
    seconds = self.seconds()
    return self.tokens / seconds if seconds > 0 else None

  def device_rate(self) -> float | None:
    """Tokens a second and device; None where devices were of several kinds."""
    seconds = self.device_seconds()
    known = seconds > 0 and len(self.device_kinds) == 1
    return self.tokens / seconds if known else None

  def rate_since_last(self) -> float | None:
    """Tokens a second since this was last asked."""
    (seconds, tokens), self._last = self._last, (self.seconds(), self.tokens)
    elapsed = self._last[0] - seconds
    return (self.tokens - tokens) / elapsed if elapsed > 0 else None


class SaveTimer:
  """Tells when a checkpoint is due by the wall clock."""

  def __init__(self, config: config_lib.CheckpointConfig):
    self._every = config.every_seconds
    self._last = time.monotonic()

  def due(self) -> bool:
    """Whether the time is up; says so once."""
    if self._every is None or time.monotonic() - self._last < self._every:
      return False
    self.reset()
    return True

  def reset(self) -> None:
    """Something was saved."""
    self._last = time.monotonic()
