# SPDX-License-Identifier: Apache-2.0
"""Flags that say which cells are meant, for scripts that plan sweeps."""

import pathlib
from typing import Any, Mapping, Sequence

from absl import flags
import ml_collections

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import cells as cells_lib

SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "which of several sweeps, by name; unset: all of them")
_SWEEP_ARG = flags.DEFINE_multi_string(
    "sweep_arg", [], "name=value, passed to get_sweep(config, name=value); "
    "value is a Python literal")
_OVERRIDES = flags.DEFINE_string(
    "overrides", None, "JSON file with the list of overrides to run, in place "
    "of get_sweep's")
NAMES = ("sweep", "sweep_arg", "overrides")


def cells(config: ml_collections.ConfigDict,
          given: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
  """The cells of each sweep by its name, with what the command line gives.

  Raises:
    PlanError: there are none, or the flags do not suit each other.
  """
  if _OVERRIDES.value is None:
    found = cells_lib.of_experiment(
        config_lib.module(flags.FLAGS["config"].config_filename), config,
        _SWEEP_ARG.value, SWEEP.value)
  else:
    for name in ("sweep", "sweep_arg"):
      if value := flags.FLAGS[name].value:
        raise sweep.PlanError(
            [f"--{name}={value[0]} is for get_sweep, which --overrides "
             "replaces; give one of them"], 0)
    found = {cells_lib.ONLY: cells_lib.of_file(
        pathlib.Path(_OVERRIDES.value))}
  return {name: [{**cell, **given} for cell in cells]
          for name, cells in found.items()}


def together(
    planned: Mapping[str, Sequence[sweep.RunSpec]]) -> list[sweep.RunSpec]:
  """The runs of several sweeps, each once."""
  return list({spec.run_id: spec for specs in planned.values()
               for spec in specs}.values())


def are_given() -> bool:
  """Whether any of the flags is."""
  return any(flags.FLAGS[name].present for name in NAMES)
