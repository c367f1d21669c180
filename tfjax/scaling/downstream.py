# SPDX-License-Identifier: Apache-2.0
"""Two-step prediction: size and data -> loss -> error or accuracy of a task.

Chains a fit of loss with a fit of a task's score against loss (Gadre et al.
2024, arXiv:2403.08540, section 3; Bhagia et al. 2024, arXiv:2412.04403). Both
fits are made by `tfjax.scaling.fit`.
"""

import dataclasses
from typing import Any

import numpy as np

from tfjax.scaling import result
from tfjax.scaling.forms import FloatArray


@dataclasses.dataclass(frozen=True)
class TwoStep:
  """A task's score from what the loss is predicted from.

  `loss` maps its law's axes to nats a token, `task` that loss to a score from
  0 to 1.
  """

  loss: result.Fit
  task: result.Fit

  def __post_init__(self) -> None:
    if self.loss.law.target != "loss":
      raise ValueError(f"the first fit must predict loss; law "
                       f"{self.loss.law.name!r} predicts "
                       f"{self.loss.law.target}")
    if self.task.law.axes != ("loss",):
      raise ValueError(
          f"the second fit must take loss alone; law {self.task.law.name!r} "
          f"takes {', '.join(self.task.law.axes)}")

  @property
  def has_intervals(self) -> bool:
    """False where one of the fits leaves a parameter open, or was not
    resampled."""
    return self.loss.has_intervals and self.task.has_intervals

  def predict(self, *axes: Any, **named: Any) -> FloatArray:
    """The task's score; arguments are those of `loss.predict`."""
    return self.task.predict(self.loss.predict(*axes, **named))

  def predict_interval(
      self, *axes: Any, noise: bool = False, **named: Any
  ) -> tuple[FloatArray, FloatArray]:
    """Percentile interval of the score, at the level of the task's fit.

    Every draw takes one resample of either fit, paired at random: the two are
    treated as independent, as they are where other runs or other measurements
    were resampled. With `noise` the score is one more measured one, with the
    residuals of the task's fit, widened for its parameters; the residuals of
    the loss are not added, since the loss is passed through and not measured.
    NaN where a fit has no intervals.
    """
    centre = self.predict(*axes, **named)  # refuses axes that are not there
    if not self.has_intervals:
      return np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    points = {**dict(zip(self.loss.law.axes, axes)), **named}
    count = max(len(self.loss.samples), len(self.task.samples))
    rng = np.random.default_rng(self.task.settings["seed"])
    first, second = (_cycled(fit.samples, count, rng)
                     for fit in (self.loss, self.task))
    losses = self.loss.law.predict(
        first, {name: np.asarray(value, np.float64)[..., None]
                for name, value in points.items()})
    scores = self.task.law.predict(second, {"loss": losses})
    if noise:
      spare = max(len(self.task.residuals) - len(self.task.estimate.free), 1)
      widened = self.task.residuals * np.sqrt(
          len(self.task.residuals) / spare)
      drawn = rng.choice(widened, size=scores.shape)
      scores = (scores + drawn if self.task.settings["space"] == "linear"
                else scores * np.exp(drawn))
    tail = 100 * (1 - self.task.level) / 2
    low, high = np.percentile(scores, [tail, 100 - tail], axis=-1)
    return np.asarray(low), np.asarray(high)

  def extrapolates(self, *axes: Any, **named: Any) -> np.ndarray:
    """Whether the predicted loss is outside of those that the task's fit saw:
    there its law is taken on trust."""
    loss = self.loss.predict(*axes, **named)
    seen = self.task.runs["loss"]
    return np.asarray((loss < seen.min()) | (loss > seen.max()))

  def to_dict(self) -> dict[str, Any]:
    """Both fits' records."""
    return {"loss": self.loss.to_dict(), "task": self.task.to_dict()}


def _cycled(samples: FloatArray, count: int, rng: np.random.Generator
            ) -> FloatArray:
  """`count` resamples in random order, each as often as the others."""
  return samples[rng.permutation(np.arange(count) % len(samples))]
