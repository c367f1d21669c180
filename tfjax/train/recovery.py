# SPDX-License-Identifier: Apache-2.0
"""What becomes of a run when a step goes wrong, and what has become of it.

That a step is bad is decided on the device (tfjax.train.step); the loop does
what is decided here.
"""

import math
from typing import Any, NamedTuple

from tfjax import config as config_lib


class Bad(NamedTuple):
  """What training cannot go on from: it has diverged, or is rolled back."""

  step: int
  reason: str
  diverged: bool


class Recovery:
  """A run's bad steps so far, which a checkpoint's counters keep.

  Attributes:
    offset: step s reads batch s + offset; a rollback moves it on.
    bad_steps: skipped or rolled back.
    rollbacks: the metrics row of each.
  """

  def __init__(self, config: config_lib.RecoveryConfig,
               counters: dict[str, Any] | None = None):
    counters = counters or dict(batch_offset=0, bad_steps=0, rollbacks=[])
    self._config = config
    self.offset = counters["batch_offset"]
    self.bad_steps = counters["bad_steps"]
    self.rollbacks = list(counters["rollbacks"])

  def counters(self) -> dict[str, Any]:
    """What a resume goes on from."""
    return dict(batch_offset=self.offset, bad_steps=self.bad_steps,
                rollbacks=list(self.rollbacks))

  @property
  def undone_steps(self) -> int:
    """How many good and bad steps rollbacks have undone."""
    return sum(row["step"] - row["to_step"] for row in self.rollbacks)

  def judge_step(self, row: dict[str, Any]) -> Bad | None:
    """Counts a bad step; None where training simply goes on."""
    return self._judge(row["step"], self._reason(row),
                       skipped=self._config.action == "skip")

  def judge_parameters(self, step: int, reason: str) -> Bad | None:
    """Counts parameters that are bad after a step that was not."""
    return self._judge(step, reason, skipped=False)

  def _judge(self, step: int, reason: str, skipped: bool) -> Bad | None:
    self.bad_steps += 1
    most = self._config.max_bad_steps
    if self._config.action != "stop" and self.bad_steps > most:
      return Bad(step, f"{reason}; with it there are more bad steps than "
                 f"recovery.max_bad_steps={most}", diverged=True)
    if skipped:
      return None
    return Bad(step, reason, diverged=self._config.action != "rollback")

  def suspect(self, bad: Bad) -> int | None:
    """A step whose checkpoint is not to be gone back to; None: none is.

    The loss of a step does not tell what its own update has done: where the
    step after it is bad with one batch and with another, the state is.
    """
    last = self.rollbacks[-1] if self.rollbacks else {}
    place = bad.step, bad.step - 1
    again = (last.get("step"), last.get("to_step")) == place
    return bad.step - 1 if again and bad.step > 1 else None

  def roll_back(self, bad: Bad, to_step: int) -> dict[str, Any]:
    """Takes note of a return to `to_step`; the row that says so.

    The batches in between are not read again: the next is the one after the
    bad step's.
    """
    self.offset += bad.step - to_step
    row = dict(kind="rollback", step=bad.step, to_step=to_step,
               batch_offset=self.offset, reason=bad.reason)
    self.rollbacks.append(row)
    return row

  def _reason(self, row: dict[str, Any]) -> str:
    """What is bad about a bad step, in words."""
    step, loss, norm = row["step"], row["loss"], row["grad_norm"]
    if not math.isfinite(loss):
      return f"the loss of step {step} is {loss}"
    if not math.isfinite(norm):
      return f"the gradient norm of step {step} is {norm}"
    return (f"the loss of step {step}, {loss:.4f}, is more than "
            f"{self._config.spike_factor:g} times the median of the "
            f"{self._config.spike_window} good steps before it")
