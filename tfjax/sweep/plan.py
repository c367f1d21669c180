# SPDX-License-Identifier: Apache-2.0
"""Which runs a sweep has: lists of overrides, and the specs made of them.

An override is a dictionary of dotted config keys; a sweep is a list of them.
`axis`, `product`, `zip_` and `chain` make such lists. `plan` resolves every
cell and works out its budget before anything runs. What has been done of a
plan is the ledger's to know.
"""

import dataclasses
import functools
from typing import Any, Mapping, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax.cost import budget as budget_lib
from tfjax.cost import footprint
from tfjax.cost import hardware
from tfjax.data import batches as batches_lib
from tfjax.data import store as store_lib
from tfjax.data import vocabulary
from tfjax.train import records

Overrides = dict[str, Any]

# Fields that name what other fields determine: two cells that differ only
# here are the same run, said in two ways.
_NAMES = ("name", "model.size")
# Fields that are set from others where they are left unset.
_DERIVED = [f"model.{entry.name}"
            for entry in dataclasses.fields(config_lib.ModelConfig)
            if entry.default is None and entry.name != "size"]
_DERIVED.append("objective.name")


@dataclasses.dataclass(frozen=True)
class RunSpec:
  """One run of a sweep: who it is, what it trains, what that amounts to."""

  run_id: str
  config: config_lib.ExperimentConfig
  overrides: Mapping[str, Any]
  budget: budget_lib.Budget


class PlanError(ValueError):
  """Cells that cannot be run; `problems` has one line for each."""

  def __init__(self, problems: Sequence[str], num_cells: int):
    bad = (f"{len(problems)} of {num_cells} cells cannot be run; nothing was "
           "started:" if num_cells else "there is nothing to run:")
    super().__init__("\n  ".join([bad, *problems]))
    self.problems = tuple(problems)


def axis(key: str, values: Sequence[Any]) -> list[Overrides]:
  """One override a value: axis("seed", [0, 1])."""
  return [{key: value} for value in values]


def product(*sweeps: Sequence[Overrides]) -> list[Overrides]:
  """Every combination, the last sweep varying fastest."""
  result = [{}]
  for sweep in sweeps:
    result = [_merged(left, right) for left in result for right in sweep]
  return result


def zip_(*sweeps: Sequence[Overrides]) -> list[Overrides]:
  """The first of each together, the second of each, and so on."""
  lengths = [len(sweep) for sweep in sweeps]
  if len(set(lengths)) > 1:
    raise ValueError(f"zip_ needs sweeps of one length, not {lengths}")
  return [functools.reduce(_merged, cells, {}) for cells in zip(*sweeps)]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
  """One sweep after the other."""
  return [dict(cell) for sweep in sweeps for cell in sweep]


def plan(
    base_config: ml_collections.ConfigDict | config_lib.ExperimentConfig,
    overrides: Sequence[Mapping[str, Any]],
    *,
    read_data: bool = True,
) -> list[RunSpec]:
  """Resolves and checks every cell, and builds the token stores they need.

  Cells that come to the same run are one spec; the order is that of the cells.
  Of a frozen `base_config`, values that follow from others (the shape from
  model.size, d_ff at its default from d_model) follow the overrides too.

  Args:
    read_data: False: no store is built or opened but for cells whose size
      cannot be known without; of the others epochs are unknown.

  Raises:
    PlanError: some cells cannot be run; it names each and says why.
  """
  if not overrides:
    raise PlanError(["the sweep is empty"], 0)
  base = base_config
  if isinstance(base, config_lib.ExperimentConfig):
    base = _unresolved(base)
  cells = [_label(number, cell) for number, cell in enumerate(overrides, 1)]
  problems = []
  configs = []
  for label, cell in zip(cells, overrides):
    try:
      configs.append(_resolved(base, cell))
    except config_lib.ConfigError as error:
      problems.append(f"{label}: {error}")
  if problems:  # before a store is built, which can take long
    raise PlanError(problems, len(cells))

  specs: dict[str, RunSpec] = {}
  first: dict[str, str] = {}
  for label, cell, config in zip(cells, overrides, configs):
    digest = config_lib.config_hash(config)
    if digest in specs:
      difference = _difference(specs[digest].config, config)
      if difference:
        problems.append(
            f"{label}: differs from {first[digest]} only in "
            f"{', '.join(difference)}, which does not affect the result, so "
            "that both would be the same run; sweep it as two workdirs")
      continue
    try:
      budget = _budget(config, read_data)
    except config_lib.ConfigError as error:
      problems.append(f"{label}: {error}")
      continue
    specs[digest] = RunSpec(records.run_id(config), config, dict(cell), budget)
    first[digest] = label
  if problems:
    raise PlanError(problems, len(cells))
  return list(specs.values())


def _budget(config: config_lib.ExperimentConfig,
            read_data: bool) -> budget_lib.Budget:
  windows = None
  if read_data or budget_lib.needs_data(config):
    windows = batches_lib.open_windows(
        _open_store(config.data), "train", config.model.context_length,
        config.objective.source_length)
  return budget_lib.plan(
      budget_lib.with_vocabulary(config, vocabulary.size(config)), windows)


def _merged(left: Overrides, right: Overrides) -> Overrides:
  clash = sorted(set(left) & set(right))
  if clash:
    raise ValueError(f"two sweeps that are combined both set {clash[0]}")
  return {**left, **right}


def _label(number: int, cell: Mapping[str, Any]) -> str:
  values = ", ".join(f"{key}={value}" for key, value in cell.items())
  return f"cell {number} ({values or 'no overrides'})"


def _resolved(base: ml_collections.ConfigDict,
              cell: Mapping[str, Any]) -> config_lib.ExperimentConfig:
  config = base.copy_and_resolve_references()
  config_lib.override(config, cell)
  resolved = config_lib.resolve(config)
  footprint.check(resolved.cost)
  hardware.check(resolved.cost)
  return resolved


def _unresolved(
    config: config_lib.ExperimentConfig) -> ml_collections.ConfigDict:
  """A ConfigDict that resolves to `config`, with derived values unset."""
  chosen = flat(config_lib.to_dict(config))

  def made(values: Overrides) -> ml_collections.ConfigDict:
    result = config_lib.default()
    config_lib.override(result, values)
    return result
  for key in _DERIVED:
    fewer = {name: value for name, value in chosen.items() if name != key}
    try:
      if config_lib.resolve(made(fewer)) == config:
        chosen = fewer
    except config_lib.ConfigError:
      pass  # Without this value the others contradict each other.
  return made(chosen)


def flat(values: Mapping[str, Any], prefix: str = "") -> Overrides:
  """Nested values by their dotted keys."""
  result = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      result.update(flat(value, f"{prefix}{name}."))
    else:
      result[f"{prefix}{name}"] = value
  return result


def _difference(one: config_lib.ExperimentConfig,
                other: config_lib.ExperimentConfig) -> list[str]:
  """The keys in which two configs of one run differ, mere names left out."""
  left, right = (flat(config_lib.to_dict(config)) for config in (one, other))
  return [key for key, value in left.items()
          if value != right[key] and key not in _NAMES]


@functools.lru_cache(maxsize=64)
def _open_store(data: config_lib.DataConfig) -> store_lib.TokenStore:
  return store_lib.build(data)
