# SPDX-License-Identifier: Apache-2.0
"""Every law is found again in noise-free data of its own form, from its own
starts, at sizes that studies have."""

import numpy as np
import pandas as pd
import pytest

from tfjax import scaling
from tfjax.scaling import laws


def crossed(**axes):
  """Every combination, so that no axis follows another."""
  grid = np.meshgrid(*axes.values(), indexing="ij")
  return {name: values.ravel() for name, values in zip(axes, grid)}


_N, _D = np.geomspace(1e7, 1e10, 6), np.geomspace(2e8, 2e11, 6)
_BOTH = crossed(params=_N, tokens=_D)
_SHAPED = crossed(width=np.array([256.0, 512, 1024, 2048, 4096]),
                  depth=np.array([4.0, 8, 16, 48]), tokens=_D[::2])
_CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
_WIDE = {"E": 1.2, "A_w": 20.0, "A_d": 2.0, "B": 400.0, "a_w": 0.5, "a_d": 0.7,
         "beta": 0.3}


def repeated():
  """Up to 128 epochs."""
  x = crossed(params=_N[::2], unique_tokens=np.geomspace(1e8, 4e10, 3),
              epochs=2.0 ** np.arange(8))
  return x | {"tokens": x["unique_tokens"] * x.pop("epochs")}


# Parameters as published or of that size, and where they are measured.
TRUTHS = {
    "kaplan_params": ({"A": 8.8e13**0.076, "alpha_N": 0.076}, {"params": _N}),
    "kaplan_tokens": ({"B": 5.4e13**0.095, "alpha_D": 0.095}, {"tokens": _D}),
    "kaplan_compute": ({"A": 2.7e28**0.05, "alpha_C": 0.05},
                       {"flops": np.geomspace(1e16, 1e24, 12)}),
    "kaplan": ({"u": 6.4e7 ** (0.076 / 0.103), "v": 1.8e4, "alpha_N": 0.076,
                "alpha_D": 0.103}, _BOTH),
    "kaplan_steps": (
        {"A": 6.5e13**0.077, "B": 2.1e3**0.76, "alpha_N": 0.077,
         "alpha_S": 0.76},
        crossed(params=_N, steps=np.geomspace(1e3, 1e6, 6))),
    "chinchilla": (_CHINCHILLA, _BOTH),
    "chinchilla_tied": ({"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353},
                        _BOTH),
    "compute": ({"E": 1.7, "A": 2e3, "alpha": 0.18},
                {"flops": np.geomspace(1e16, 1e24, 12)}),
    "width_depth": (_WIDE | {"A": 80.0, "alpha": 0.25}, _SHAPED | {
        "params": 12 * _SHAPED["width"]**2 * _SHAPED["depth"]
                  + 5e4 * _SHAPED["width"]}),
    "width_depth_tokens": (_WIDE, _SHAPED),
    "overtraining": (
        {"E": 1.8, "a": 140.0, "b": 200.0, "eta": 0.13},
        crossed(flops=np.geomspace(1e17, 1e22, 6),
                tokens_per_parameter=5.0 * 2.0 ** np.arange(8))),
    "downstream_error": ({"epsilon": 0.85, "k": 2.08, "gamma": 0.76},
                         {"loss": np.linspace(2, 5, 12)}),
    "downstream_accuracy": (
        {"floor": 0.25, "ceiling": 0.95, "slope": 3.0, "middle": 2.7},
        {"loss": np.linspace(1.7, 4, 14)}),
    "data_constrained": (_CHINCHILLA | {"R_D": 15.4, "R_N": 5.3}, repeated()),
    "broken_power": (
        {"E": 1.0, "A": 2.0, "c0": 0.02, "c1": 0.15, "break_at": 1e19,
         "sharpness": 0.5}, {"flops": np.geomspace(1e15, 1e24, 24)}),
    "critical_batch": ({"B*": 2.1e8, "inverse_alpha_B": 1 / 0.21},
                       {"loss": np.linspace(1.8, 6, 10)}),
    "batch_steps": ({"S_min": 5e3, "B_crit": 1e6},
                    {"batch_tokens": np.geomspace(1e4, 1e8, 10)}),
    "learning_rate": ({"c": 1.79, "a": -0.713, "b": 0.307}, _BOTH),
    "batch_size": ({"c": 0.58, "b": 0.571}, {"tokens": _D}),
    "transfer": ({"k": 1.9e4, "alpha": 0.18, "beta": 0.38},
                 crossed(params=_N, finetuning_tokens=_D / 1e3)),
}


def test_every_law_has_its_truth():
  assert set(TRUTHS) == set(laws.LAWS)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in (
        "data_constrained", "width_depth") else name for name in TRUTHS])
def test_a_law_is_found_in_its_own_data(name):
  truth, axes = TRUTHS[name]
  law = laws.get(name)
  frame = pd.DataFrame(axes)
  frame[law.target] = law.predict([truth[p] for p in law.parameters], axes)
  fit = scaling.fit(frame, name, bootstrap=0)
  assert fit.coefficients == pytest.approx(truth, rel=1e-3)
  assert fit.status == "converged", fit.reason
