# SPDX-License-Identifier: Apache-2.0
"""Where the cells of a sweep come from: an experiment's get_sweep, or a file.

What runs they make is in `tfjax.sweep.plan`.
"""

import ast
import copy
import inspect
import json
import pathlib
import types
from typing import Any, Callable, Sequence

import ml_collections

from tfjax.sweep.plan import Overrides
from tfjax.sweep.plan import PlanError


def of_experiment(module: types.ModuleType, config: ml_collections.ConfigDict,
                  arguments: Sequence[str] = ()) -> list[Overrides]:
  """What the get_sweep of an experiment's module gives.

  Args:
    arguments: name=value for it, the value a Python literal.

  Raises:
    PlanError: there is no get_sweep, or it takes no such argument.
  """
  if not hasattr(module, "get_sweep"):
    raise PlanError(
        [f"{module.__name__} does not define get_sweep(config), the list of "
         "overrides to run; define it, or give --overrides=FILE.json"], 0)
  return module.get_sweep(copy.deepcopy(config),
                          **_arguments(module.get_sweep, arguments))


def of_file(path: pathlib.Path) -> list[Overrides]:
  """A JSON list with an object of dotted config keys a run.

  Raises:
    PlanError: it cannot be read, or holds anything else.
  """
  try:
    cells = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise PlanError(
        [f"--overrides={path} cannot be read: {error}"], 0) from None
  if not isinstance(cells, list) or not all(
      isinstance(cell, dict) for cell in cells):
    raise PlanError(
        [f"--overrides={path} must hold a list with an object of dotted config "
         'keys a run, such as [{"model.size": "55k"}]'], 0)
  return cells


def _arguments(get_sweep: Callable[..., Any],
               arguments: Sequence[str]) -> dict[str, Any]:
  """name=value texts; a name that get_sweep does not take raises."""
  _, *known = inspect.signature(get_sweep).parameters
  given = {}
  for argument in arguments:
    name, _, text = argument.partition("=")
    try:
      given[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      raise PlanError(
          [f"--sweep_arg={argument}: not of the form name=value with a Python "
           "literal (quote strings)"], 0) from None
    if name not in known:
      raise PlanError(
          [f"--sweep_arg={argument}: get_sweep takes no {name!r}; it takes "
           f"{', '.join(known) or 'nothing'}"], 0)
  return given
