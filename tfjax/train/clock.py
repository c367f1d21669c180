# SPDX-License-Identifier: Apache-2.0
"""Time: what a run's goes into, over all its parts, and when a checkpoint is
due by it.

A part is what one start of a run does until it ends, is stopped or killed.
What a kill has cost is worked out in `tfjax.train.spent`.
"""

import threading
import time
from typing import Any

import jax

from tfjax import config as config_lib

# startup: the claim, the data, a new state or the checkpoint's. input: the
# next batch, made and put on the devices, while those have nothing to do.
# step: the rest of training. checkpoint: as far as training waits for it.
PHASES = ("startup", "compile", "input", "step", "evaluation", "checkpoint",
          "other")
_TRAINING = ("input", "step")

# What a run has spent before its first part.
NOTHING = dict(
    phase_seconds=dict.fromkeys(PHASES, 0.0), lost_seconds=0.0,
    undone_seconds=0.0, device_seconds=0.0, occupied_device_seconds={},
    clock_tokens=0)


class Clock:
  """Where the time of a run goes; one phase follows the other without a gap.

  It begins with the part, in "startup". What is compiled within another phase
  counts as "compile" all the same, as far as JAX tells: without its tracing.
  It goes on over interruptions, on whatever devices the next part runs, and
  is not turned back by a rollback: what was undone has been paid for.

  Attributes:
    tokens: of all steps, those that a rollback undid too.
  """

  def __init__(self) -> None:
    self._share = 1.0
    self._now = time.perf_counter()
    self._phase, self._compiled = "startup", _compiled_seconds()
    self._part = dict.fromkeys(PHASES, 0.0)
    self._devices, self._kind = 0, ""
    self._before = NOTHING
    self._undone, self._others = 0.0, 0.0
    self.tokens = 0
    self._last = (0.0, 0.0, 0)

  def go_on(self, devices: int, device_kind: str,
            counters: dict[str, Any] | None = None) -> None:
    """The part is on these devices, and all before it spent `counters`."""
    self._before = counters or NOTHING
    self._devices, self._kind = devices, device_kind
    self._undone = self._before["undone_seconds"]
    # Older checkpoints do not tell.
    self._others = self._before.get("others_seconds", 0.0)
    self.tokens = self._before["clock_tokens"]
    self._last = self._now_at()

  def share(self, share: float) -> None:
    """From now on only such a share of the time is this run's: others train
    in the same steps."""
    self.enter(self._phase)
    self._share = share

  def enter(self, phase: str, was: str | None = None) -> None:
    """Ends the phase so far, which turns out to be `was`, if that is given."""
    now, compiled = time.perf_counter(), _compiled_seconds()
    elapsed = (now - self._now) * self._share
    compiling = min((compiled - self._compiled) * self._share, elapsed)
    self._part["compile"] += compiling
    ended = was or self._phase
    self._part[ended] += elapsed - compiling
    if ended in _TRAINING:
      self._others += (elapsed - compiling) * (1 / self._share - 1)
    self._phase, self._now, self._compiled = phase, now, compiled

  def counters(self) -> dict[str, Any]:
    """What the next part goes on from, all of one moment; JSON can hold it."""
    device_seconds, phases = self.device_seconds(), self.phase_seconds()
    return dict(
        phase_seconds=phases, lost_seconds=self._before["lost_seconds"],
        undone_seconds=self._undone, others_seconds=self._others,
        device_seconds=device_seconds,
        occupied_device_seconds=self._occupied(), clock_tokens=self.tokens)

  def undo(self, checkpoint: dict[str, Any] | None) -> None:
    """A rollback has led to a state: its counters, or None for the start.

    What steps have taken since is spent, but not kept.
    """
    saved = checkpoint or NOTHING
    self._undone = self.phase_seconds()["step"] - _kept_seconds(saved)

  # --- What it has taken -----------------------------------------------------

  def phase_seconds(self) -> dict[str, float]:
    """Of every part; what kills have lost is in none of them."""
    self.enter(self._phase)
    before = self._before["phase_seconds"]
    return {phase: before[phase] + self._part[phase] for phase in PHASES}

  def occupied_device_seconds(self) -> dict[str, float]:
    """All time, lost or not, times the devices of the time; by their kind."""
    self.enter(self._phase)
    return self._occupied()

  def _occupied(self) -> dict[str, float]:
    occupied = dict(self._before["occupied_device_seconds"])
    if self._devices:
      part = sum(self._part.values()) * self._devices
      occupied[self._kind] = occupied.get(self._kind, 0.0) + part
    return occupied

  def seconds(self) -> float:
    """Inside training steps, their input included."""
    phases = self.phase_seconds()
    return sum(phases[phase] for phase in _TRAINING)

  def device_seconds(self) -> float:
    """The same times the devices of the time."""
    self.enter(self._phase)
    part = sum(self._part[phase] for phase in _TRAINING)
    return self._before["device_seconds"] + part * self._devices

  # --- How fast that was -----------------------------------------------------

  def add(self, tokens: int) -> None:
    self.tokens += tokens

  def rate(self) -> float | None:
    """Tokens a second over all of training, by the time on the wall."""
    _, seconds, tokens = self._now_at()
    return _rate(tokens, seconds)

  def device_rate(self) -> float | None:
    """Tokens a second and device; None where devices were of several kinds."""
    seconds = self.device_seconds()
    known = seconds > 0 and len(self.occupied_device_seconds()) == 1
    return self.tokens / seconds if known else None

  def rates_since_last(self) -> tuple[float | None, float | None]:
    """Tokens a second of training since this was last asked: by the time on
    the wall, and by this run's share of it."""
    (own, wall, tokens), self._last = self._last, self._now_at()
    tokens = self.tokens - tokens
    return (_rate(tokens, self._last[1] - wall),
            _rate(tokens, self._last[0] - own))

  def _now_at(self) -> tuple[float, float, int]:
    """Seconds inside training steps, of its share and in all; tokens."""
    own = self.seconds()
    return own, own + self._others, self.tokens


def _rate(tokens: int, seconds: float) -> float | None:
  return tokens / seconds if seconds > 0 else None


def wall_seconds(counters: dict[str, Any]) -> float:
  """Of all that a clock's counters tell of."""
  return sum(counters["phase_seconds"].values()) + counters["lost_seconds"]


def goodput(counters: dict[str, Any]) -> float | None:
  """Time in steps that were kept, as a share of all."""
  wall = wall_seconds(counters)
  return _kept_seconds(counters) / wall if wall > 0 else None


def _kept_seconds(counters: dict[str, Any]) -> float:
  """In steps that no rollback has undone."""
  return counters["phase_seconds"]["step"] - counters["undone_seconds"]


_compiled = threading.local()  # what this thread has compiled, in seconds
# Not the tracing before them, whose events contain each other.
_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration",
                   "/jax/core/compile/backend_compile_duration")


def _compiled_seconds() -> float:
  return getattr(_compiled, "seconds", 0.0)


def _note_compiled(event: str, seconds: float, **_: Any) -> None:
  if event in _COMPILE_EVENTS:
    _compiled.seconds = _compiled_seconds() + seconds


jax.monitoring.register_event_duration_secs_listener(_note_compiled)


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
