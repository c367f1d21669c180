# SPDX-License-Identifier: Apache-2.0
"""Laws give the numbers of their papers, and users' own are checked."""

import math

import numpy as np
import pytest

from tfjax.scaling import forms
from tfjax.scaling import laws

# name -> (parameters, axes, the value worked out by hand from the form)
_WORKED = {
    # Kaplan et al. 2020, equations 1.1, 1.5 and 1.6 with round numbers.
    "kaplan_params": ({"A": 8.0, "alpha_N": 0.5}, {"params": 16.0}, 2.0),
    "kaplan_tokens": ({"B": 8.0, "alpha_D": 0.5}, {"tokens": 64.0}, 1.0),
    "kaplan_compute": ({"A": 8.0, "alpha_C": 1.0}, {"flops": 2.0}, 4.0),
    "kaplan": ({"u": 3.0, "v": 2.0, "alpha_N": 1.0, "alpha_D": 0.5},
               {"params": 1e6, "tokens": 2e9}, 2.0),  # (3 + 1)^0.5
    "kaplan_steps": ({"A": 8.0, "B": 9.0, "alpha_N": 0.5, "alpha_S": 0.5},
                     {"params": 16.0, "steps": 9.0}, 5.0),
    "chinchilla": ({"E": 1.0, "A": 8.0, "B": 9.0, "alpha": 0.5, "beta": 1.0},
                   {"params": 16.0, "tokens": 3.0}, 6.0),
    "chinchilla_tied": ({"E": 1.0, "A": 8.0, "B": 9.0, "alpha": 0.5},
                        {"params": 16.0, "tokens": 9.0}, 6.0),
    "compute": ({"E": 1.0, "A": 8.0, "alpha": 0.5}, {"flops": 16.0}, 3.0),
    "width_depth": (
        {"E": 1.0, "A_w": 4.0, "A_d": 6.0, "A": 8.0, "B": 9.0, "a_w": 1.0,
         "a_d": 1.0, "alpha": 0.5, "beta": 0.5},
        {"width": 2.0, "depth": 3.0, "params": 16.0, "tokens": 9.0}, 10.0),
    "width_depth_tokens": (
        {"E": 1.0, "A_w": 4.0, "A_d": 6.0, "B": 9.0, "a_w": 1.0, "a_d": 1.0,
         "beta": 0.5}, {"width": 2.0, "depth": 3.0, "tokens": 9.0}, 8.0),
    "overtraining": ({"E": 1.0, "a": 3.0, "b": 8.0, "eta": 0.5},
                     {"flops": 16.0, "tokens_per_parameter": 4.0}, 3.5),
    "downstream_error": ({"epsilon": 1.0, "k": 2.0, "gamma": math.log(2)},
                         {"loss": 2.0}, 0.5),
    "downstream_accuracy": (
        {"floor": 0.25, "ceiling": 0.75, "slope": math.log(3), "middle": 3.0},
        {"loss": 2.0}, 0.625),  # 0.25 + 0.5 / (1 + 1/3)
    "broken_power": (
        {"E": 1.0, "A": 8.0, "c0": 0.5, "c1": 1.5, "break_at": 4.0,
         "sharpness": 1.0}, {"flops": 4.0}, 5.0),  # 1 + 8 * 2^-1
    "critical_batch": ({"B*": 64.0, "inverse_alpha_B": 3.0}, {"loss": 2.0},
                       8.0),
    "batch_steps": ({"S_min": 100.0, "B_crit": 3.0}, {"batch_tokens": 1.0},
                    400.0),
    "learning_rate": ({"c": 2.0, "a": -0.5, "b": 0.5},
                      {"params": 16.0, "tokens": 64.0}, 4.0),
    "batch_size": ({"c": 2.0, "b": 0.5}, {"tokens": 64.0}, 16.0),
    "transfer": ({"k": 2.0, "alpha": 0.5, "beta": 0.25},
                 {"finetuning_tokens": 9.0, "params": 16.0}, 12.0),
    # One repetition of the data, worth 1 - exp(-1) of the first pass.
    "data_constrained": (
        {"E": 1.0, "A": 1.0, "B": 1.0, "alpha": 1.0, "beta": 1.0, "R_D": 1.0,
         "R_N": 1.0}, {"params": 1.0, "tokens": 2.0, "unique_tokens": 1.0},
        2.0 + 1 / (2 - math.exp(-1))),
}


def vector(law: forms.Law, values: dict[str, float]) -> np.ndarray:
  assert set(values) == set(law.parameters)
  return np.array([values[name] for name in law.parameters])


@pytest.mark.parametrize("name", list(laws.LAWS))
def test_a_law_gives_what_its_form_says(name):
  law = laws.get(name)
  values, axes, expected = _WORKED[name]
  assert set(axes) == set(law.axes)
  assert law.predict(vector(law, values), axes) == pytest.approx(
      expected, rel=1e-12)
  assert law.source and law.form


@pytest.mark.parametrize("name", list(laws.LAWS))
def test_gradients_are_differences(name):
  law = laws.get(name)
  values, axes, _ = _WORKED[name]
  rows = {axis: value * np.array([1.3, 1.7]) for axis, value in axes.items()}
  natural = vector(law, values) * 1.01
  gradient = law.gradient(natural, rows)
  assert gradient.shape == (len(law.parameters), 2)
  for k in range(len(natural)):
    step = np.zeros_like(natural)
    step[k] = 1e-6 * abs(natural[k])
    slope = (law.predict(natural + step, rows)
             - law.predict(natural - step, rows)) / (2 * step[k])
    np.testing.assert_allclose(gradient[k], slope, rtol=1e-5, atol=1e-9)


def test_published_values_of_the_data_constrained_law():
  # Muennighoff et al. 2023, their notebook's two predictions.
  law = laws.get("data_constrained")
  natural = vector(law, {
      "E": math.exp(0.6254804), "A": math.exp(6.255414),
      "B": math.exp(7.3049974), "alpha": 0.3526596, "beta": 0.3526596,
      "R_D": 15.387756, "R_N": 5.309743})
  for params, tokens, loss in ((6.34e9, 242e9, 2.2256440889984477),
                               (8.67e9, 178e9, 2.2269634075087867)):
    assert law.predict(natural, {
        "params": params, "tokens": tokens,
        "unique_tokens": 25e9}) == pytest.approx(loss, rel=1e-12)


def test_predictions_broadcast_and_stay_float64():
  law = laws.get("chinchilla")
  samples = np.array([[1.7, 400.0, 2000.0, 0.34, 0.36],
                      [1.8, 300.0, 1000.0, 0.33, 0.35]])
  axes = {"params": np.geomspace(1e6, 1e9, 3)[:, None], "tokens": 1e10}
  assert law.predict(samples, axes).shape == (3, 2)
  for name in ("data_constrained", "broken_power"):
    law = laws.get(name)
    values, axes, _ = _WORKED[name]
    assert law.predict(vector(law, values), axes).dtype == np.float64


def test_an_unknown_law_is_refused():
  with pytest.raises(ValueError, match="no scaling law 'newton'; known:"):
    laws.get("newton")


def test_laws_of_ones_own():
  parameters = (forms.Parameter("E", 0.1, 5.0, (1.0,), shape=False),
                forms.Parameter("alpha", 0.01, 2.0, (0.1, 0.5)))
  law = forms.from_function(
      lambda p, x: p["E"] + x["params"]**-p["alpha"], parameters,
      axes=("params",), name="mine")
  assert law.exponents == ("alpha",) and law.parameters == ("E", "alpha")
  assert laws.get(law) is law
  with pytest.raises(ValueError, match="asks for 'beta'; its parameters are E"):
    forms.from_function(lambda p, x: p["beta"] * x["params"], parameters,
                        axes=("params",), name="wrong")
  with pytest.raises(ValueError, match="one number a row"):
    forms.from_function(lambda p, x: np.ones(3), parameters, axes=("params",),
                        name="shape")
  with pytest.raises(ValueError, match="low 2 must be below high 1"):
    forms.Parameter("x", 2.0, 1.0, (1.5,))
  with pytest.raises(ValueError, match="must lie from 1 to 2"):
    forms.Parameter("x", 1.0, 2.0, (3.0,))
  with pytest.raises(ValueError, match="either terms or a function"):
    forms.Law("none", "", "")
  with pytest.raises(ValueError, match="names a parameter twice"):
    forms.Law("twice", "", "", (forms.Term("A"), forms.Term("A")))
