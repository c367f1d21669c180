# SPDX-License-Identifier: Apache-2.0
"""Li et al. 2025 (Step Law), arXiv:2503.04715: best learning rate and batch.

Fits both laws again to the runs that the study released. These are fewer than
the published exponents come from, which they do not reach: the rows compare
with a refit by the study's rule, and say how far the published ones are.
"""

import pathlib

import numpy as np
import pandas as pd

from tfjax import scaling
from tfjax.scaling import published
from tfjax.scaling import result

_STUDY = "steplaw"
_SEQUENCE = 2048  # tokens
# A run is among a cell's best within this of the lowest loss in it.
_NEAR_BEST = 0.0025
# Law, exponent: the paper's, a refit of the released runs and its standard
# error, in the digits that they are known to.
_EXPONENTS = {
    ("learning_rate", "a"): (-0.713, -0.766, 0.054),
    ("learning_rate", "b"): (0.307, 0.198, 0.033),
    ("batch_size", "b"): (0.571, 0.613, 0.038)}
_NAMES = {("learning_rate", "a"): "learning rate, exponent of N",
          ("learning_rate", "b"): "learning rate, exponent of D",
          ("batch_size", "b"): "batch size, exponent of D"}
_BOOTSTRAP = 1000


def reproduce(directory: pathlib.Path) -> list[published.Row]:
  runs = near_best(directory)
  rows = [published.Row(_STUDY, "runs within 0.25% of their cell's best", 129,
                        len(runs), 0.0, False)]
  fits = {law: fit(runs, law) for law in ("learning_rate", "batch_size")}
  for key, (paper, refit, error) in _EXPONENTS.items():
    law, exponent = key
    made = fits[law]
    ours = made.coefficients[exponent]
    samples = made.samples[:, made.law.parameters.index(exponent)]
    tail = 50 * (1 - made.level)
    low, high = np.percentile(samples, [tail, 100 - tail])
    rows += [
        published.Row(_STUDY, f"{_NAMES[key]}, refitted", refit, ours, 1e-3,
                      False, _note(made, paper, low, high)),
        published.Row(_STUDY, f"{_NAMES[key]}, standard error", error,
                      float(samples.std()), 0.1, True)]
  return rows


def near_best(directory: pathlib.Path) -> pd.DataFrame:
  """Dense runs whose smoothed loss is near their (N, D) cell's lowest:
  params (without embedding), tokens, learning_rate, batch_tokens."""
  runs = pd.read_csv(directory / "dense_lr_bs_loss.csv")
  best = runs.groupby(["N", "D"])["smooth loss"].transform("min")
  runs = runs[runs["smooth loss"] <= (1 + _NEAR_BEST) * best]
  return pd.DataFrame({
      "run_id": runs["exp_name"], "params": runs["N"], "tokens": runs["D"],
      "learning_rate": runs["lr"], "batch_tokens": runs["bs"] * _SEQUENCE,
  }).reset_index(drop=True)


def fit(runs: pd.DataFrame, law: str) -> result.Fit:
  """Least squares of logarithms, which for these laws is linear."""
  return scaling.fit(runs, law, objective="squares", space="log",
                     bootstrap=_BOOTSTRAP)


def _note(made: result.Fit, paper: float, low: float, high: float) -> str:
  where = "inside" if low <= paper <= high else "outside of"
  doubt = "" if made.status == "converged" else f"; {made.reason}"
  return (f"{made.level:.0%}: {low:.3f} to {high:.3f}; does not reach the "
          f"paper's {paper:g} ({where} it), which comes from more runs than "
          f"were released{doubt}")
