# SPDX-License-Identifier: Apache-2.0
"""What to change where a step does not fit, and how large a batch does.

Every candidate is compiled; nothing here is a formula's word, except that a
candidate whose parameters and optimizer state alone are too much is passed
over. What the estimate of memory says, where there is no compiler for the
machine, is in `tfjax.train.ways_out`.
"""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

from tfjax import config as config_lib
from tfjax.train import ahead

# A config -> what the compiler made of it; a mesh that does not do raises.
Compile = Callable[[config_lib.ExperimentConfig], ahead.Outcome]

# Of the memory that a vendor states, what a program may use.
_USABLE = 0.98

# A batch that is larger by less is not worth a compilation.
_WORTH = 0.02


@dataclasses.dataclass(frozen=True)
class Try:
  """A candidate, and what came of it.

  Attributes:
    changes: values of config keys, over what was asked for.
    outcome: None where it was not compiled.
    reason: why it was not.
  """

  changes: dict[str, Any]
  outcome: ahead.Outcome | None
  reason: str | None = None

  @property
  def fits(self) -> bool:
    return self.outcome is not None and bool(self.outcome.fits)


def changed(config: config_lib.ExperimentConfig,
            changes: dict[str, Any]) -> config_lib.ExperimentConfig:
  """A complete config with values of `group.field` keys replaced."""
  for key, value in changes.items():
    group, name = key.split(".")
    config = dataclasses.replace(config, **{group: dataclasses.replace(
        getattr(config, group), **{name: value})})
  return config


# --- What to change ----------------------------------------------------------


def candidates(config: config_lib.ExperimentConfig, devices: int,
               excess: Callable[[], float]) -> Iterator[dict[str, Any]]:
  """Changes that save memory, each on top of those before it, in the order of
  what they cost: the batch and the model stay as they are.

  Args:
    excess: how many times too much the candidate before took.
  """
  mesh, train, model = config.mesh, config.train, config.model
  data = mesh.data or devices // (mesh.fsdp * mesh.sequence * mesh.tensor)
  fsdp, changes = mesh.fsdp * data, {}
  if data > 1:
    changes |= {"mesh.data": 1, "mesh.fsdp": fsdp}
    yield dict(changes)
  for remat in REMAT[REMAT.index(model.remat) + 1:]:
    changes |= {"model.remat": remat}
    yield dict(changes)
  if not model.scan_layers and model.num_layers > 1:
    changes |= {"model.scan_layers": True}
    yield dict(changes)
  # Parts of at least a sequence a device.
  most = train.batch_size // fsdp
  for parts in (parts for parts in range(train.accumulation_steps + 1, most + 1)
                if most % parts == 0):
    if parts >= train.accumulation_steps * excess() or parts == most:
      changes |= {"train.accumulation_steps": parts}
      yield dict(changes)
  for axis in ("tensor", "sequence"):
    for _ in range(3):
      if fsdp % 2:
        return
      fsdp //= 2
      size = changes.get(f"mesh.{axis}", getattr(mesh, axis)) * 2
      changes |= {"mesh.fsdp": fsdp, "mesh.data": 1, f"mesh.{axis}": size}
      yield dict(changes)


REMAT = ("none", "dots", "full")  # less memory and more work each


def search(
    config: config_lib.ExperimentConfig, devices: int, first: ahead.Outcome,
    compile_: Compile, state_of: Callable[[config_lib.ExperimentConfig], int],
    report: Callable[[Try], None]) -> Try | None:
  """The first candidate that fits, or None.

  Args:
    first: what came of the config itself.
    compile_: raises ConfigError where a mesh does not do.
    state_of: bytes of a device for parameters and optimizer state; raises
      likewise.
    report: called with each candidate as soon as it has been tried.
  """
  last, available = first, first.available_bytes

  def excess() -> float:
    return (last.needed_bytes or 0) / available if available else 1.0

  for changes in candidates(config, devices, excess):
    one = _hopeless(config, changes, state_of, available)
    if one:
      report(one)
    else:
      one = attempt(config, changes, compile_, report)
    if one.fits:
      return one
    last = one.outcome or last
  return None


def _hopeless(config, changes, state_of, available) -> Try | None:
  """A candidate that need not be compiled, with the reason."""
  try:
    state = state_of(changed(config, changes))
  except config_lib.ConfigError as error:
    return Try(changes, None, str(error))
  if available is None or state <= available:
    return None
  return Try(changes, None, "parameters and optimizer state alone take "
             f"{state / 2**30:.3g} GiB a device")


def attempt(config: config_lib.ExperimentConfig, changes: dict[str, Any],
            compile_: Compile, report: Callable[[Try], None]) -> Try:
  """Compiles one candidate."""
  try:
    one = Try(changes, compile_(changed(config, changes)))
  except config_lib.ConfigError as error:
    one = Try(changes, None, str(error))
  report(one)
  return one


def lighter(config: config_lib.ExperimentConfig) -> dict[str, Any] | None:
  """Less recomputation than the config asks for, which may fit too."""
  place = REMAT.index(config.model.remat)
  return {"model.remat": REMAT[place - 1]} if place else None


# --- How large a batch -------------------------------------------------------


def largest_batch(
    config: config_lib.ExperimentConfig, unit: int, first: ahead.Outcome,
    compile_: Compile, report: Callable[[Try], None], *,
    most_compiles: int = 3) -> dict[str, int | None]:
  """The largest batch that was compiled and fits, and the smallest that does
  not: {"fits": 512, "does_not": 640}; None: none was.

  Memory is taken to grow linearly; each candidate is compiled, and its real
  size corrects the line.

  Args:
    unit: batches are multiples of it.
    first: what came of the config's own batch.
  """
  points = {config.train.batch_size: first}
  while first.needed_bytes and len(points) <= most_compiles:
    size = _next_batch(points, unit)
    if size is None:
      break
    one = attempt(config, {"train.batch_size": size}, compile_, report)
    if one.outcome is None or one.outcome.needed_bytes is None:
      break
    points[size] = one.outcome
  low, high = _border(points)
  return {"fits": low, "does_not": high}


def _border(points: dict[int, ahead.Outcome]) -> tuple[
    int | None, int | None]:
  """The largest batch that fits, and the smallest that does not."""
  return (max((b for b, one in points.items() if one.fits), default=None),
          min((b for b, one in points.items() if not one.fits), default=None))


def _next_batch(points: dict[int, ahead.Outcome], unit: int) -> int | None:
  """Where the line through what is known meets what there is; None: that is
  where the largest that fits already is."""
  available = min(one.available_bytes for one in points.values())
  fixed, slope = _line(points, available)
  low, high = _border(points)
  size = int((_USABLE * available - fixed) / slope) // unit * unit
  size = max(size, (low or 0) + unit)
  if high is not None:
    size = min(size, high - unit)
  return size if size > (low or 0) * (1 + _WORTH) else None


def _line(points: dict[int, ahead.Outcome], available: int) -> tuple[
    float, float]:
  """Bytes that do not depend on the batch, and bytes a sequence."""
  near, *others = sorted(points, key=lambda batch: abs(
      points[batch].needed_bytes - available))
  needed = points[near].needed_bytes
  if others:
    slope = (points[others[0]].needed_bytes - needed) / (others[0] - near)
    if slope > 0:
      return needed - slope * near, slope
  # One point: all temporary memory is taken to be the batch's.
  memory = points[near].memory
  variable = max(1, memory.temporary if memory else needed)
  return needed - variable, variable / near
