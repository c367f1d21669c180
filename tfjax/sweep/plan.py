# SPDX-License-Identifier: Apache-2.0
"""Which runs a sweep has: the specs that its cells make.

A cell is a dictionary of dotted config keys (`tfjax.sweep.algebra`). `plan`
resolves every cell and works out its budget before anything runs. What has
been done of a plan is the ledger's to know.
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
from tfjax.sweep import algebra
from tfjax.sweep import branch
from tfjax.sweep.specs import flat
from tfjax.sweep.specs import RunSpec
from tfjax.train import records

# Fields that name what other fields determine: two cells that differ only
# here are the same run, said in two ways.
_NAMES = ("name", "model.size")
# Fields that are set from others where they are left unset.
_DERIVED = [f"model.{entry.name}"
            for entry in dataclasses.fields(config_lib.ModelConfig)
            if entry.default is None and entry.name != "size"]
_DERIVED.append("objective.name")


class PlanError(ValueError):
  """Cells that cannot be run; `problems` has one line for each."""

  def __init__(self, problems: Sequence[str], num_cells: int):
    bad = (f"{len(problems)} of {num_cells} cells cannot be run; nothing was "
           "started:" if num_cells else "there is nothing to run:")
    super().__init__("\n  ".join([bad, *problems]))
    self.problems = tuple(problems)


def plan(
    base_config: ml_collections.ConfigDict | config_lib.ExperimentConfig,
    overrides: Sequence[Mapping[str, Any]],
    *,
    read_data: bool = True,
) -> list[RunSpec]:
  """Resolves and checks every cell, and builds the token stores they need.

  Cells that come to the same run are one spec; the order is that of the cells.
  Of a frozen `base_config`, values that follow from others (the shape from
  model.size, d_ff at its default from d_model) follow the overrides too. Runs
  that share a trunk have one warmup, that of the shortest of them.

  Args:
    read_data: False: no store is built or opened but for cells whose size
      cannot be known without; of the others epochs are unknown.

  Raises:
    PlanError: some cells cannot be run; it names each and says why.
    ConfigError: runs that are to share a trunk cannot.
  """
  return plan_all(base_config, {"": overrides}, read_data=read_data)[""]


def plan_all(
    base_config: ml_collections.ConfigDict | config_lib.ExperimentConfig,
    sweeps: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    read_data: bool = True,
) -> dict[str, list[RunSpec]]:
  """Plans several sweeps by name, of whose cells all can be run or none is.

  A run that is in two of them is one run, with the overrides of the first.

  Args:
    read_data: as for `plan`.

  Raises:
    PlanError: as `plan` does; also where cells of two sweeps would be one run
      that differs in what does not affect its result.
    ConfigError: as `plan` does.
  """
  base = base_config
  if isinstance(base, config_lib.ExperimentConfig):
    base = _unresolved(base)
  num_cells = sum(map(len, sweeps.values()))
  problems = [f"the sweep {name or 'of the experiment'} is empty"
              for name, cells in sweeps.items() if not cells]
  if problems or not sweeps:
    raise PlanError(problems or ["there is no sweep"], 0)
  resolved = {
      name: [_resolved(base, cell, _label(name, number, cell), problems)
             for number, cell in enumerate(cells, 1)]
      for name, cells in sweeps.items()}
  if problems:  # before a store is built, which can take long
    raise PlanError(problems, num_cells)
  known: dict[str, tuple[str, RunSpec]] = {}
  planned = {name: _distinct(found, known, read_data, problems)
             for name, found in resolved.items()}
  if problems:
    raise PlanError(problems, num_cells)
  # Of one that was aligned to another's warmup.
  return {name: list({spec.run_id: spec for spec in branch.align(specs)}
                     .values()) for name, specs in planned.items()}


@dataclasses.dataclass(frozen=True)
class _Cell:
  """A cell that can be resolved; `label` is what people know it by."""

  label: str
  overrides: algebra.Overrides
  config: config_lib.ExperimentConfig


def _distinct(cells: Sequence[_Cell], known: dict[str, tuple[str, RunSpec]],
              read_data: bool, problems: list[str]) -> list[RunSpec]:
  """The specs of a sweep's cells, each once; adds to `known` and `problems`."""
  specs: dict[str, RunSpec] = {}
  for cell in cells:
    digest = config_lib.config_hash(cell.config)
    if digest not in known:
      try:
        budget = _budget(cell.config, read_data)
      except config_lib.ConfigError as error:
        problems.append(f"{cell.label}: {error}")
        continue
      known[digest] = (cell.label, RunSpec(
          records.run_id(cell.config), cell.config, cell.overrides, budget))
    first, spec = known[digest]
    if spec.config is not cell.config and (
        difference := _difference(spec.config, cell.config)):
      problems.append(
          f"{cell.label}: differs from {first} only in "
          f"{', '.join(difference)}, which does not affect the result, so "
          "that both would be the same run; sweep it as two workdirs")
    specs[digest] = spec
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


def _label(sweep: str, number: int, cell: Mapping[str, Any]) -> str:
  values = ", ".join(f"{key}={value}" for key, value in cell.items())
  return (f"{f'{sweep}: ' if sweep else ''}cell {number} "
          f"({values or 'no overrides'})")


def _resolved(base: ml_collections.ConfigDict, cell: Mapping[str, Any],
              label: str, problems: list[str]) -> _Cell | None:
  """The cell and its config; None where `problems` has got one more."""
  config = base.copy_and_resolve_references()
  try:
    overrides = algebra.checked(cell)
    config_lib.override(config, overrides)
    resolved = config_lib.resolve(config)
    footprint.check(resolved.cost)
    hardware.check(resolved.cost)
  except config_lib.ConfigError as error:
    problems.append(f"{label}: {error}")
    return None
  return _Cell(label, overrides, resolved)


def _unresolved(
    config: config_lib.ExperimentConfig) -> ml_collections.ConfigDict:
  """A ConfigDict that resolves to `config`, with derived values unset."""
  chosen = flat(config_lib.to_dict(config))

  def made(values: algebra.Overrides) -> ml_collections.ConfigDict:
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


def _difference(one: config_lib.ExperimentConfig,
                other: config_lib.ExperimentConfig) -> list[str]:
  """The keys in which two configs of one run differ, mere names left out."""
  left, right = (flat(config_lib.to_dict(config)) for config in (one, other))
  return [key for key, value in left.items()
          if value != right[key] and key not in _NAMES]


@functools.lru_cache(maxsize=64)
def _open_store(data: config_lib.DataConfig) -> store_lib.TokenStore:
  return store_lib.build(data)
