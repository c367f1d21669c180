# SPDX-License-Identifier: Apache-2.0
"""Lists of overrides: how they are made and put together.

A cell is a dictionary of dotted config keys, a sweep a list of cells, and
every function here gives a new one. Keys are known and values of the config's
types from the start; whether they make a run is found out by
`tfjax.sweep.plan`. Sweeps that are computed from budgets and sizes are in
`tfjax.sweep.grids`.
"""

import builtins
import functools
import hashlib
import math
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from tfjax import config as config_lib

Overrides = dict[str, Any]
# A quantile function: what of a uniform number in [0, 1) becomes a value.
Distribution = Callable[[float], Any]

_METHODS = ("random", "sobol")
_DIGITS = 6  # of sampled and computed floats


def axis(key: str, values: Sequence[Any]) -> list[Overrides]:
  """One cell a value: axis("seed", [0, 1]).

  Raises:
    ConfigError: there is no such key, or a value is not of its type.
  """
  if isinstance(values, str):
    raise ValueError(f"axis({key!r}, {values!r}): give a list of values, such "
                     f"as [{values!r}]")
  return [checked({key: value}) for value in values]


def product(*sweeps: Sequence[Mapping[str, Any]]) -> list[Overrides]:
  """Every combination, the last sweep varying fastest.

  Raises:
    ValueError: two sweeps set the same key.
  """
  result: list[Overrides] = [{}]
  for sweep in sweeps:
    result = [merged(left, right) for left in result for right in sweep]
  return result


def zip(  # pylint: disable=redefined-builtin
    *sweeps: Sequence[Mapping[str, Any]]) -> list[Overrides]:
  """The first of each together, the second of each, and so on.

  Raises:
    ValueError: they differ in length, or two set the same key.
  """
  lengths = [len(sweep) for sweep in sweeps]
  if len(set(lengths)) > 1:
    raise ValueError(f"zip needs sweeps of one length, not {lengths}")
  return [functools.reduce(merged, cells, {})
          for cells in builtins.zip(*sweeps)]


def chain(*sweeps: Sequence[Mapping[str, Any]]) -> list[Overrides]:
  """One sweep after the other."""
  return [dict(cell) for sweep in sweeps for cell in sweep]


def where(sweep: Sequence[Mapping[str, Any]],
          condition: Callable[[Overrides], bool]) -> list[Overrides]:
  """The cells that a condition holds for.

      where(cells, lambda cell: cell["model.size"] != "55k")

  Raises:
    ValueError: the condition asks for a key that a cell does not set, or says
      neither True nor False.
  """
  kept = []
  for number, cell in enumerate(sweep, 1):
    try:
      holds = condition(dict(cell))
    except KeyError as error:
      raise ValueError(
          f"where: the condition asks for {error}, which cell {number} does "
          f"not set; it sets {', '.join(cell) or 'nothing'}") from None
    if not isinstance(holds, (bool, np.bool_)):
      raise ValueError(f"where: the condition must say True or False, not "
                       f"{holds!r}, as it does of cell {number}")
    if holds:
      kept.append(dict(cell))
  return kept


def sample(
    source: Mapping[str, Distribution] | Sequence[Mapping[str, Any]],
    count: int,
    *,
    seed: int = 0,
    method: str = "random",
) -> list[Overrides]:
  """Cells drawn at random, the same on every machine.

  A larger `count` has the cells of a smaller one among its own, so that a
  search can be extended; of distributions it begins with them, and each key
  has its values whatever other keys there are ("random").

  Args:
    source: a distribution a key (`uniform`, `log_uniform`, `integers`,
      `choice`, or any function of a uniform number in [0, 1)), or a sweep, of
      which so many cells are kept, in their order.
    count: cells; of distributions some may come out the same, and are one run.
    seed: of the draws.
    method: for distributions: "random", independent; "sobol", spread evenly:
      Sobol' points (Joe and Kuo 2008, doi:10.1137/070709359), shifted at
      random modulo 1 (Cranley and Patterson 1976, doi:10.1137/0713071).

  Raises:
    ConfigError: a key is unknown, or a value not of its type.
    ValueError: count is not possible, or the method is not known.
  """
  if not isinstance(count, int) or count < 1:
    raise ValueError(f"sample: count must be at least 1, not {count!r}")
  if method not in _METHODS:
    raise ValueError(f"sample: there is no method {method!r}; there are "
                     f"{', '.join(map(repr, _METHODS))}")
  if not isinstance(source, Mapping):
    return _subset(source, count, seed)
  for key, distribution in source.items():
    if not callable(distribution):
      raise ValueError(
          f"sample: {key} needs a distribution, such as "
          f"choice([{distribution!r}]), not {distribution!r}")
  keys = sorted(source)
  points = (_sobol if method == "sobol" else _random)(keys, count, seed)
  return [checked({key: source[key](point[keys.index(key)]) for key in source})
          for point in points]


def uniform(low: float, high: float) -> Distribution:
  """Floats between two numbers, to six digits."""
  _check_range("uniform", low, high)
  return lambda u: _between(low + u * (high - low), low, high)


def log_uniform(low: float, high: float) -> Distribution:
  """Floats between two positive numbers, their logarithm uniform; to six
  digits."""
  _check_range("log_uniform", low, high)
  if low <= 0:
    raise ValueError(f"log_uniform({low}, {high}): both must be more than 0")
  return lambda u: _between(low * math.exp(u * math.log(high / low)), low, high)


def integers(low: int, high: int) -> Distribution:
  """Whole numbers from `low` to `high`, both among them."""
  _check_range("integers", low, high)
  if not all(isinstance(end, (int, np.integer)) for end in (low, high)):
    raise ValueError(f"integers({low!r}, {high!r}): both must be whole numbers")
  return lambda u: int(low) + math.floor(u * (int(high) - int(low) + 1))


def choice(values: Sequence[Any]) -> Distribution:
  """Any of some values, each as likely."""
  values = list(values)
  if not values:
    raise ValueError("choice: there are no values to choose from")
  return lambda u: values[math.floor(u * len(values))]


def checked(cell: Mapping[str, Any]) -> Overrides:
  """The cell with values of the config's types; numpy's become Python's.

  Raises:
    ConfigError: there is no such key (it names the nearest), or a value is
      not of its type.
  """
  scratch = _scratch()
  result = {}
  for key, value in cell.items():
    if not isinstance(key, str):
      raise config_lib.ConfigError("", f"a key must be text, not {key!r}")
    config_lib.override(scratch, {key: _plain(value)})
    node: Any = scratch
    for name in key.split("."):
      node = node[name]
    result[key] = node
  return result


def merged(left: Mapping[str, Any], right: Mapping[str, Any]) -> Overrides:
  """Both cells as one, which must not set one key twice."""
  clash = sorted(set(left) & set(right))
  if clash:
    raise ValueError(f"two sweeps that are combined both set {clash[0]}")
  return {**left, **right}


def rounded(value: float) -> float:
  """To six digits: what libraries of two machines agree on, and readable."""
  return float(f"{value:.{_DIGITS}g}")


# --- Details -----------------------------------------------------------------


@functools.cache
def _scratch() -> Any:
  """A config to try values on; what it holds matters to nobody."""
  return config_lib.default()


def _plain(value: Any) -> Any:
  if isinstance(value, (np.generic, np.ndarray)):
    return value.tolist()
  if isinstance(value, (list, tuple)):
    return tuple(_plain(item) for item in value)
  return value


def _subset(sweep: Sequence[Mapping[str, Any]], count: int,
            seed: int) -> list[Overrides]:
  """The cells that come first in an order drawn by lot, in their own order."""
  if count > len(sweep):
    raise ValueError(f"sample: {count} of {len(sweep)} cells are too many")
  order = sorted(range(len(sweep)), key=lambda i: _draw(seed, "cells", i))
  return [dict(sweep[i]) for i in sorted(order[:count])]


def _random(keys: Sequence[str], count: int,
            seed: int) -> list[list[float]]:
  return [[_draw(seed, key, i) for key in keys] for i in range(count)]


def _sobol(keys: Sequence[str], count: int, seed: int) -> list[list[float]]:
  from scipy.stats import qmc  # pylint: disable=import-outside-toplevel
  points = qmc.Sobol(len(keys), scramble=False).random_base2(
      (count - 1).bit_length())[:count]
  shift = [_draw(seed, key, "shift") for key in keys]
  return [[(float(x) + by) % 1.0 for x, by in builtins.zip(point, shift)]
          for point in points]


def _draw(*what: Any) -> float:
  """In [0, 1), by hash: random generators differ between versions."""
  digest = hashlib.sha256(":".join(map(str, what)).encode()).digest()
  return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _check_range(name: str, low: float, high: float) -> None:
  if not -math.inf < low < high < math.inf:
    raise ValueError(f"{name}({low}, {high}): the first must be less than the "
                     "second, and both finite")


def _between(value: float, low: float, high: float) -> float:
  return min(max(rounded(value), float(low)), float(high))
