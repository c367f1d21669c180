# SPDX-License-Identifier: Apache-2.0
"""Published scaling studies, fitted again from their data, number by number.

One module a study: it loads that study's tables by the study's own recipe,
fits with the conventions that the study used, and returns a `Row` for each
published number. The tables themselves are not here: `run` takes the folder
that holds them. Laws and fits are in `tfjax.scaling`; nothing here is used by
them.
"""

import dataclasses
import importlib
import math
import pathlib
from typing import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
from scipy import special

from tfjax.scaling import forms


@dataclasses.dataclass(frozen=True)
class Row:
  """One published number beside ours.

  `tolerance` is relative to `published` where `relative`, else absolute.
  `published` None: a number of ours that has nothing to be compared with.
  `at_most`: ours may be lower by any amount (an objective).
  """

  study: str
  quantity: str
  published: float | None
  ours: float
  tolerance: float
  relative: bool
  note: str = ""
  at_most: bool = False

  @property
  def ok(self) -> bool | None:
    """Within the tolerance; None where there is nothing to compare."""
    if self.published is None:
      return None
    allowed = self.tolerance * (abs(self.published) if self.relative else 1)
    off = self.ours - self.published
    # False for NaN; a plain bool, also of numpy's numbers.
    return bool((off if self.at_most else abs(off)) <= allowed)


def compare(study: str, what: str, published: Mapping[str, float],
            ours: Mapping[str, float], tolerance: float, *,
            relative: bool = True, note: str = "") -> list[Row]:
  """A row for each name in `published`, called `what` and that name."""
  return [Row(study, f"{what}, {name}", value, float(ours[name]), tolerance,
              relative, note) for name, value in published.items()]


def huber_of(law: forms.Law, natural: np.ndarray, frame: pd.DataFrame,
             delta: float) -> float:
  """Sum over rows of Huber(delta) of log loss minus log prediction, the
  objective of Hoffmann et al. 2022, equation 3, at the given parameters.

  Args:
    law: its axes and target are columns of `frame`.
    natural: [parameters], in the law's order.
    frame: one row a run.
    delta: residual beyond which Huber's loss grows linearly.
  """
  axes = {axis: frame[axis].to_numpy(np.float64) for axis in law.axes}
  residual = np.log(frame[law.target]) - np.log(law.predict(natural, axes))
  return float(special.huber(delta, residual).sum())


Study = Callable[[pathlib.Path], list[Row]]


def _study(module: str) -> Study:
  """`reproduce(directory) -> list[Row]` of a module, imported when called."""
  def reproduce(directory: pathlib.Path) -> list[Row]:
    return importlib.import_module(f"{__name__}.{module}").reproduce(directory)
  return reproduce


# Folder of a study's tables -> what reproduces it from there.
STUDIES: dict[str, Study] = {
    "epoch_chinchilla": _study("epoch"),
    "gemstones": _study("gemstones"),
    "datablations": _study("datablations"),
    "gadre_overtraining": _study("gadre"),
    "supercollapse": _study("supercollapse"),
    "steplaw": _study("step_law"),
    "published_constants": _study("hoffmann"),
}


def run(refdata: pathlib.Path,
        names: Iterable[str] | None = None) -> list[Row]:
  """Every published number of the named studies, or of all, beside ours.

  A study whose tables are not there gives one row that says so.

  Args:
    refdata: holds one folder a study, named as in `STUDIES`.
    names: which studies; unset: all.

  Raises:
    ValueError: a name is not a study.
  """
  names = list(STUDIES) if names is None else list(names)
  unknown = [name for name in names if name not in STUDIES]
  if unknown:
    raise ValueError(f"no study {', '.join(map(repr, unknown))}; known: "
                     f"{', '.join(STUDIES)}")
  rows = []
  for name in names:
    directory = pathlib.Path(refdata) / name
    if directory.is_dir():
      rows += STUDIES[name](directory)
    else:
      rows.append(Row(name, "not run", None, math.nan, 0.0, False,
                      f"its data are absent: no folder {directory}"))
  return rows
