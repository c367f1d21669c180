# SPDX-License-Identifier: Apache-2.0
"""Where the cells of a sweep come from: an experiment's get_sweep, or a file.

What runs they make is in `tfjax.sweep.plan`.
"""

import ast
from collections.abc import Collection
import copy
import difflib
import inspect
import json
import pathlib
import re
import traceback
import types
from typing import Any, Callable, Mapping, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax.sweep.algebra import Overrides
from tfjax.sweep.plan import PlanError

ONLY = ""  # the name of a sweep that has none


def of_experiment(
    module: types.ModuleType, config: ml_collections.ConfigDict,
    arguments: Sequence[str] = (), names: Sequence[str] = (),
) -> dict[str, list[Overrides]]:
  """What the get_sweep of an experiment's module gives: sweeps by name.

  It gives one sweep, a list of cells, which has the name `ONLY` here; or
  several, a dictionary of such lists.

  Args:
    arguments: name=value for it, the value a Python literal.
    names: of the sweeps that are wanted; empty: all.

  Raises:
    PlanError: there is no get_sweep, it takes no such argument, raises, gives
      no such sweep, or something else than cells.
    ConfigError: a value in a cell is not of its key's type.
  """
  if not hasattr(module, "get_sweep"):
    raise PlanError(
        [f"{module.__name__} does not define get_sweep(config), the list of "
         "overrides to run; define it, or give --overrides=FILE.json"], 0)
  given = _arguments(module.get_sweep, arguments)
  try:
    made = module.get_sweep(copy.deepcopy(config), **given)
  except (PlanError, config_lib.ConfigError):
    raise
  except Exception as error:  # whatever somebody has written there
    lines = [frame.lineno for frame in traceback.extract_tb(
        error.__traceback__) if frame.filename == module.__file__]
    where = f", line {lines[-1]}" if lines else ""
    raise PlanError(
        [f"get_sweep of {module.__file__}{where}: {type(error).__name__}: "
         f"{error}"], 0) from error
  if not isinstance(made, Mapping):
    if names:
      raise PlanError(
          [f"--sweep={names[0]}: get_sweep of {module.__name__} gives one "
           "sweep, without a name; leave it out, or return a dictionary of "
           "sweeps by name"], 0)
    return {ONLY: _checked("get_sweep", made)}
  for name in made:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
      raise PlanError([f"get_sweep: {name!r} is not a name for a sweep; take "
                       "letters, digits and . _ + -"], 0)
  sweeps = {name: _checked(f"get_sweep: sweep {name!r}", cells)
            for name, cells in made.items()}
  for name in names:
    if name not in sweeps:
      raise PlanError([no_such_sweep(name, sweeps)], 0)
  return {name: cells for name, cells in sweeps.items()
          if not names or name in names}


def no_such_sweep(name: str, known: Collection[str]) -> str:
  """What to say of a name that no sweep has."""
  close = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {close[0]!r}? " if close else ""
  return (f"--sweep={name}: there is no such sweep; {hint}there are: "
          f"{', '.join(known)}")


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


def _checked(what: str, cells: Any) -> list[Overrides]:
  """A list of cells, whatever somebody has returned."""
  if isinstance(cells, str) or not isinstance(cells, Sequence) or not all(
      isinstance(cell, Mapping) for cell in cells):
    raise PlanError([f"{what} must be a list of overrides, such as "
                     f"sweep.axis makes, not {cells!r:.60}"], 0)
  return [dict(cell) for cell in cells]


def _arguments(get_sweep: Callable[..., Any],
               arguments: Sequence[str]) -> dict[str, Any]:
  """name=value texts; a name that get_sweep does not take raises."""
  names = list(inspect.signature(get_sweep).parameters)
  if not names:
    raise PlanError(["get_sweep() must take the config as its first argument: "
                     "def get_sweep(config)"], 0)
  known, given = names[1:], {}
  for argument in arguments:
    name, _, text = argument.partition("=")
    try:
      given[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      raise PlanError(
          [f"--sweep_arg={argument}: not of the form name=value with a Python "
           "literal; a string is quoted twice, as in "
           "--sweep_arg=\"name='text'\""], 0) from None
    if name not in known:
      raise PlanError(
          [f"--sweep_arg={argument}: get_sweep takes no {name!r}; it takes "
           f"{', '.join(known) or 'nothing'}"], 0)
  return given
