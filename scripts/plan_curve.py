# SPDX-License-Identifier: Apache-2.0
"""The learning-rate curves that scripts/plan.py prints."""

from typing import Any, Sequence

import jax.numpy as jnp
from rich import console as console_lib

import plan_show as show
from tfjax import sweep
from tfjax.train import optimizers

_CURVE_WIDTH, _CURVE_HEIGHT = 64, 4
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def schedules(console: console_lib.Console,
              specs: Sequence[sweep.RunSpec]) -> None:
  """A curve for each schedule that differs in more than peak and length."""
  groups: dict[tuple[Any, ...], list[sweep.RunSpec]] = {}
  for spec in specs:
    optimizer = spec.config.optimizer
    groups.setdefault((
        optimizer.schedule, optimizer.warmup_steps, optimizer.warmup_fraction,
        optimizer.decay_fraction, optimizer.final_fraction), []).append(spec)
  for group in groups.values():
    curve(console, group)


def curve(console: console_lib.Console,
          specs: Sequence[sweep.RunSpec]) -> None:
  """The learning rate of the longest run over its steps, as bars."""
  longest = max(specs, key=lambda spec: spec.budget.steps)
  optimizer, steps = longest.config.optimizer, longest.budget.steps
  schedule = optimizers.make_schedule(optimizer, steps)
  places = sorted({round(i * (steps - 1) / (_CURVE_WIDTH - 1))
                   for i in range(_CURVE_WIDTH)})
  rates = [float(x) for x in optimizers.learning_rate(
      schedule, jnp.array(places))]
  peak, warmup = optimizer.learning_rate, int(schedule.warmup_steps)
  show.line(console, f"learning rate: {optimizer.schedule}, {steps:,} steps"
       + _range_words(specs))
  for level in reversed(range(_CURVE_HEIGHT)):
    bars = "".join(_EIGHTHS[max(0, min(8, round(
        8 * (rate / peak * _CURVE_HEIGHT - level))))] for rate in rates)
    mark = f"{peak:.3g}" if level == _CURVE_HEIGHT - 1 else ""
    show.line(console, f"{mark:>9} |{bars}")
  decay = int(schedule.decay_steps)
  events = [f"warmup to step {warmup:,}" if warmup else "no warmup",
            f"peak {peak:.3g}"]
  if decay:
    last = float(optimizers.learning_rate(schedule, jnp.int32(steps - 1)))
    events.append(f"decay from step {steps - decay + 1:,} to {last:.3g} at "
                  f"step {steps:,}")
  show.line(console, f"{0:>9} +{'-' * len(rates)}")
  show.line(console, f"{'':11}{'; '.join(events)}")


def _range_words(specs: Sequence[sweep.RunSpec]) -> str:
  """How the runs that share a curve differ."""
  steps = sorted({spec.budget.steps for spec in specs})
  peaks = sorted({spec.config.optimizer.learning_rate for spec in specs})
  text = ""
  if len(steps) > 1:
    same = specs[0].config.optimizer.warmup_steps is None
    text += (f"; the same shape over {steps[0]:,} steps and more" if same else
             f"; runs from {steps[0]:,} steps on have the same warmup")
  if len(peaks) > 1:
    text += f"; peaks from {peaks[0]:.3g} to {peaks[-1]:.3g}"
  return text
