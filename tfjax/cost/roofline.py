# SPDX-License-Identifier: Apache-2.0
"""The roofline of a step: how fast it could be at best, and what binds it.

Pure arithmetic (Williams et al. 2009, with the links between devices as a
third roof): each resource runs at its peak and none waits for another, so a
real step takes longer.
"""

import dataclasses

from tfjax.cost import hardware


@dataclasses.dataclass(frozen=True)
class Work:
  """What one device does in one step; None: not known.

  Attributes:
    model_flops: what the model needs, in the convention of `tfjax.cost.flops`.
    recompute_flops: what rematerialisation computes again.
    memory_bytes: read from and written to its memory.
    link_bytes: sent to other devices.
  """

  model_flops: float
  recompute_flops: float = 0.0
  memory_bytes: float | None = None
  link_bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a step at the peak of each resource; None: not known.

  Attributes:
    step_seconds: the largest of those that are known, a lower bound.
    bottleneck: compute, memory or links: which one that is.
    tokens_per_second: of all devices, an upper bound.
    mfu: model FLOPs over what the devices could do in that time, without
      recomputation; an upper bound.
  """

  compute_seconds: float | None
  memory_seconds: float | None
  link_seconds: float | None
  step_seconds: float | None
  bottleneck: str | None
  tokens_per_second: float | None
  mfu: float | None


def roofline(work: Work, device: hardware.Device,
             batch_tokens: float) -> Roofline:
  """The bound of a step of `batch_tokens`, the same work on every device."""
  def at_peak(amount, rate):
    return None if amount is None or rate is None else amount / rate
  seconds = {
      "compute": at_peak(work.model_flops + work.recompute_flops,
                         device.flops),
      "memory": at_peak(work.memory_bytes, device.memory_bandwidth),
      "links": at_peak(work.link_bytes, device.link_bandwidth)}
  known = {name: value for name, value in seconds.items() if value is not None}
  bottleneck = max(known, key=known.get, default=None)
  step = known.get(bottleneck)
  return Roofline(
      compute_seconds=seconds["compute"], memory_seconds=seconds["memory"],
      link_seconds=seconds["links"], step_seconds=step, bottleneck=bottleneck,
      tokens_per_second=at_peak(batch_tokens, step),
      mfu=(None if step is None or device.flops is None else
           work.model_flops / (step * device.flops)))
