# SPDX-License-Identifier: Apache-2.0
"""Which models an experiment can make, how large they are, and the runs that
come nearest to wished-for sizes and tokens.

An experiment's own sweep says how each size is trained (its learning rate,
say); here its cells are taken apart and put together anew. What runs to wish
for is in `tfjax.scaling.design`.
"""

import dataclasses
import math
from typing import Any, Mapping, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax.cost import budget as budget_lib
from tfjax.cost import flops as flops_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.data import vocabulary
from tfjax.models import transformer
from tfjax.sweep.algebra import Overrides
from tfjax.sweep.plan import PlanError

COUNTS = ("params_total", "params_non_embedding")
_DURATIONS = tuple(f"duration.{entry.name}" for entry in dataclasses.fields(
    config_lib.DurationConfig))


@dataclasses.dataclass(frozen=True)
class Size:
  """A model that the experiment makes, and how it is trained.

  Attributes:
    overrides: of a cell, without its duration and its seed.
    params: by what is counted, one of `COUNTS`.
    flops_per_token: of training.
    batch_tokens: of a step; None: the data tells (pairs differ in length).
  """

  overrides: Mapping[str, Any]
  params: Mapping[str, int]
  flops_per_token: float
  batch_tokens: int | None


@dataclasses.dataclass(frozen=True)
class Placed:
  """A run that was wished for, as the experiment can make it.

  Attributes:
    overrides: the cell.
    wanted: parameters that were wished for.
    params: that it has.
    tokens: of training, to be rounded up to whole steps.
    flops: that it costs.
  """

  overrides: Overrides
  wanted: float
  params: int
  tokens: int
  flops: float


def sizes(config: ml_collections.ConfigDict,
          cells: Sequence[Mapping[str, Any]]) -> list[Size]:
  """The distinct models of a sweep's cells, the smallest first.

  Raises:
    PlanError: a cell cannot be resolved, or two train one model in ways that
      differ in more than duration and seed.
  """
  found: dict[tuple[int, ...], Size] = {}
  seen = []
  for number, cell in enumerate(cells, 1):
    kept = {key: value for key, value in cell.items()
            if key not in _DURATIONS and key != "seed"}
    if kept in seen:
      continue
    seen.append(kept)
    try:
      size = measure(config, kept)
    except config_lib.ConfigError as error:
      raise PlanError([f"cell {number}: {error}"], len(cells)) from error
    counts = tuple(size.params.values())
    known = found.setdefault(counts, size).overrides
    differ = sorted(key for key in {*known, *kept}
                    if known.get(key) != kept.get(key))
    if differ:
      raise PlanError(
          [f"cell {number}: a model of {counts[0]:,} parameters was trained "
           f"with another {', '.join(differ)} before; give cells that train "
           "every size in one way"], len(cells))
  if not found:
    raise PlanError(["there are no cells to take sizes from"], 0)
  return [found[counts] for counts in sorted(found)]


def place(
    config: ml_collections.ConfigDict,
    runs: Sequence[Mapping[str, float]],
    known: Sequence[Size],
    *,
    count: str = "params_total",
    first_seed: int = 0,
) -> list[Placed]:
  """A cell for each run, of the size nearest to it in ratio.

  Args:
    config: the experiment's, whose duration is replaced by tokens.
    runs: params, tokens and seeds (1 where there is none) of each, as
      `tfjax.scaling.design.Design.runs` has them.
    known: what `sizes` found.
    count: what params counts, one of `COUNTS`.
    first_seed: seeds are counted from here; more than those of runs that
      there are, as a run made again would tell nothing new.

  Raises:
    ValueError: count is not known.
  """
  if count not in COUNTS:
    raise ValueError(f"count is {count!r}; must be one of {', '.join(COUNTS)}")
  used: dict[tuple[int, int], int] = {}  # seeds of a size and its tokens
  placed = []
  for run in runs:
    wanted, tokens = float(run["params"]), math.ceil(run["tokens"])
    size = min(known, key=lambda s: abs(math.log(s.params[count] / wanted)))
    for _ in range(int(run.get("seeds", 1))):
      point = (size.params[count], tokens)
      seed = used[point] = used.get(point, first_seed - 1) + 1
      placed.append(Placed(
          {**size.overrides, **duration(config, "tokens", tokens),
           "seed": seed},
          wanted, size.params[count], tokens, size.flops_per_token * tokens))
  return placed


def measure(config: ml_collections.ConfigDict,
            cell: Mapping[str, Any]) -> Size:
  """The size of a cell, which does not depend on its duration.

  Raises:
    ConfigError: it cannot be resolved.
  """
  resolved = _resolved(config, cell)
  resolved = budget_lib.with_vocabulary(resolved, vocabulary.size(resolved))
  counts = transformer.count_parameters(resolved.model)
  lengths = lengths_lib.of(resolved)
  per_token = flops_lib.training_flops_per_token(resolved.model, lengths)
  return Size(dict(cell), {"params_total": counts.total,
                           "params_non_embedding": counts.non_embedding},
              per_token.total, None if budget_lib.needs_data(resolved) else
              resolved.train.batch_size * lengths.window)


def model_of(config: ml_collections.ConfigDict,
             cell: Mapping[str, Any]) -> config_lib.ModelConfig:
  """The model of a cell, whole.

  Raises:
    ConfigError: it cannot be resolved.
  """
  return _resolved(config, cell).model


def duration(config: ml_collections.ConfigDict, name: str,
             value: float) -> Overrides:
  """A duration in place of whatever the experiment has."""
  unset = {key: None for key in _DURATIONS if key != f"duration.{name}"
           and config.duration[key.partition(".")[2]] is not None}
  return {**unset, f"duration.{name}": value}


def _resolved(config: ml_collections.ConfigDict,
              cell: Mapping[str, Any]) -> config_lib.ExperimentConfig:
  """The config of a cell, for a token where it says no duration."""
  config = config.copy_and_resolve_references()
  config_lib.override(config, {
      **dict.fromkeys(_DURATIONS), "duration.tokens": 1, **{
          key: value for key, value in cell.items() if key not in _DURATIONS}})
  return config_lib.resolve(config)
