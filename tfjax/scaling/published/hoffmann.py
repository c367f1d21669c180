# SPDX-License-Identifier: Apache-2.0
"""Hoffmann et al. 2022 (Chinchilla), arXiv:2203.15556: tables 3 and A3.

How the compute-optimal N grows with C: slopes of the tables that the paper
prints, and what its parametric fit says (Besiroglu et al. 2024,
arXiv:2404.10102, give its parameters unrounded).
"""

import json
import pathlib

import numpy as np

from tfjax.scaling import frontier
from tfjax.scaling import laws
from tfjax.scaling import published

_STUDY = "published_constants"
_GOPHER_FLOPS = 5.76e23


def reproduce(directory: pathlib.Path) -> list[published.Row]:
  """Slopes of log N on log C, by least squares, and the optimum at Gopher's
  budget."""
  tables = json.loads((directory / "hoffmann2022.json").read_text("utf-8"))
  table_a3 = np.array(tables["tableA3"]["rows"], np.float64)
  table_3 = np.array(tables["table3_approach1"]["rows"], np.float64)
  exponent, optimum = approach_3(tables["approach3_unrounded"])
  return [
      _row("table A3, approach 2: slope of N*(C)", 0.490,
           slope(table_a3[:, 1], table_a3[:, 0]), 5e-4),
      _row("table A3, approach 3: slope of N*(C)", 0.459,
           slope(table_a3[:, 3], table_a3[:, 0]), 5e-4,
           tables["tableA3"]["erratum"]),
      _row("table 3, approach 1: slope of N*(C)", 0.498,
           slope(table_3[:, 1], table_3[:, 0]), 5e-4),
      _row("approach 3, unrounded: exponent of N*(C)", 0.4565, exponent, 5e-5,
           "beta / (alpha + beta); table 2: 0.46"),
      _row("approach 3, unrounded: N*(5.76e23)", 40.4e9, optimum, 0.05e9,
           "the paper says 40B"),
  ]


def slope(flops: np.ndarray, params: np.ndarray) -> float:
  """Exponent of N in C: least squares of log N on log C."""
  return float(np.polyfit(np.log(flops), np.log(params), 1)[0])


def approach_3(constants: dict[str, float]) -> tuple[float, float]:
  """(a, N* at Gopher's budget) of log A, log B, log E, alpha and beta."""
  law = laws.get("chinchilla")
  values = {"A": np.exp(constants["a"]), "B": np.exp(constants["b"]),
            "E": np.exp(constants["e"]), "alpha": constants["alpha"],
            "beta": constants["beta"]}
  natural = np.array([values[name] for name in law.parameters])
  params, _, _ = frontier.optimum(law, natural, frontier.CONVENTION,
                                  np.array([_GOPHER_FLOPS]))
  return (values["beta"] / (values["alpha"] + values["beta"]),
          float(params[0]))


def _row(quantity: str, theirs: float, ours: float, tolerance: float,
         note: str = "") -> published.Row:
  return published.Row(_STUDY, f"Hoffmann {quantity}", theirs, ours, tolerance,
                       False, note)
