# SPDX-License-Identifier: Apache-2.0
"""Qiu et al. 2025, arXiv:2507.02119: loss curves of all widths are one.

MLPs on a regression task (mlp), transformers on chess games (chess) and on
pixels of CIFAR-5M (c5m), eight widths of about five seeds each. Fits the loss
at the end against compute, and compares how far normalised curves of
different widths differ with how far seeds do. The numbers beside ours are of
an independent run of the study's recipe on its logs, not of the paper's text.
"""

import pathlib

import numpy as np
import pandas as pd

from tfjax import scaling
from tfjax.scaling import curves
from tfjax.scaling import published
from tfjax.scaling import result

_STUDY = "supercollapse"
# Fit to seed-mean end points: exponent, irreducible loss, R^2.
_FITS = {"mlp": (0.1601, 0.0013, 0.9998), "chess": (0.1157, 0.5428, 0.99996),
         "c5m": (0.1969, 3.1334, 0.9994)}
_AT = (0.25, 0.5, 0.75, 0.95)
# Relative standard deviation across widths at the first of the 60 points of
# `curves.GRID` from there on, and of single seeds: least and largest over x.
_SPREAD = {"chess": (0.0015, 0.0013, 0.0009, 0.0001),
           "c5m": (0.0027, 0.0010, 0.0012, 0.0003)}
_NOISE = {"chess": (0.0026, 0.0028), "c5m": (0.0078, 0.0093)}
# MLPs of different widths agree better than seeds do only from here on.
_FROM = {"mlp": 0.5, "chess": 0.25, "c5m": 0.25}
_DIGIT = 1e-4  # a unit of the last digit printed


def reproduce(directory: pathlib.Path) -> list[published.Row]:
  rows = []
  for name in _FITS:
    rows += _task(directory, name)
  return rows


def load(directory: pathlib.Path, name: str) -> pd.DataFrame:
  """Curves of one task: run, params (the width's), seed, flops (in the
  study's unit) and loss."""
  runs = pd.read_csv(directory / f"{name}_runs.csv").rename(
      columns={"P": "params"})[["run", "params", "seed", "opt_C", "opt_L"]]
  points = pd.read_csv(directory / f"{name}_curves.csv")
  table = points.sort_values(["run", "step"]).merge(
      runs, on="run", validate="m:1")
  # Some steps of c5m repeat the compute and the loss that were measured last.
  table = table.drop_duplicates(["run", "compute"])
  # Ends are known in eight digits, the curves in six; c5m needs them.
  end = ~table.duplicated("run", keep="last")
  table["flops"] = table["compute"].where(~end, table["opt_C"])
  table["loss"] = table["test_loss"].where(~end, table["opt_L"])
  return table[["run", "params", "seed", "flops", "loss"]]


def fit_ends(table: pd.DataFrame) -> result.Fit:
  """L(C) of seed-mean end points. Every row counts, as in the study, which
  has some of its MLPs twice."""
  return scaling.fit(curves.end_points(table), "compute", flops="flops",
                     bootstrap=0)


def r_squared(fit: result.Fit) -> float:
  """Share of the variance of the losses that the fit explains."""
  loss = fit.runs["loss"].to_numpy()
  error = loss - fit.predict(fit.runs["flops"].to_numpy())
  return float(1 - np.sum(error**2) / np.sum((loss - loss.mean())**2))


def _task(directory: pathlib.Path, name: str) -> list[published.Row]:
  table = load(directory, name)
  fit = fit_ends(table)
  exponent, irreducible, explained = _FITS[name]
  made = curves.collapse(table, irreducible=fit.coefficients["E"])
  twice = len(made.excluded)
  note = (f"{twice} of the runs {'is' if twice == 1 else 'are'} there twice"
          if twice else "")

  def row(what: str, theirs: float, ours: float, tolerance: float,
          **more: object) -> published.Row:
    return published.Row(_STUDY, f"{name}: {what}", theirs, ours, tolerance,
                         False, **more)

  rows = [
      row("exponent of L(C)", exponent, fit.coefficients["alpha"], 5e-5,
          note=note),
      row("irreducible loss", irreducible, fit.coefficients["E"], 5e-5),
      row("R^2", explained, r_squared(fit), 5e-5)]
  at = pd.DataFrame([made.at(x) for x in _AT])
  for x, theirs, ours in zip(_AT, _SPREAD.get(name, ()), at["spread"]):
    rows.append(row(f"spread across widths at {x:g} C*", theirs, ours, _DIGIT))
  for which, theirs in zip(("least", "largest"), _NOISE.get(name, ())):
    ours = getattr(at["noise"], {"least": "min", "largest": "max"}[which])()
    rows.append(row(f"{which} noise of seeds", theirs, ours, _DIGIT))
  late = at[at["x"] >= _FROM[name]]
  rows.append(row(
      f"spread over noise, largest from {_FROM[name]:g} C* on", 1.0,
      float((late["spread"] / late["noise"]).max()), 0.0, at_most=True,
      note="below 1: widths differ less than seeds"))
  return rows
