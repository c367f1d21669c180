# SPDX-License-Identifier: Apache-2.0
"""Two fits chained: size and data to loss, loss to a task's score."""

import numpy as np
import pandas as pd
import pytest

from tfjax import scaling
from tfjax.scaling import downstream

_TASK = {"epsilon": 0.85, "k": 2.2, "gamma": 0.7}


def made_up(truth, noise=0.0):
  """params, tokens, loss and error under known laws."""
  rng = np.random.default_rng(0)
  params, tokens = map(np.ravel, np.meshgrid(
      np.geomspace(3e4, 1e6, 6), np.geomspace(2e5, 4e6, 5)))
  loss = (truth["E"] + truth["A"] / params**truth["alpha"]
          + truth["B"] / tokens**truth["beta"])
  error = _TASK["epsilon"] - _TASK["k"] * np.exp(-_TASK["gamma"] * loss)
  scale = 1 + noise * rng.standard_normal((2, len(loss)))
  return pd.DataFrame({"params": params, "tokens": tokens,
                       "loss": loss * scale[0], "error": error * scale[1]})


def chained(frame, **options):
  return downstream.TwoStep(
      scaling.fit(frame, **options),
      scaling.fit(frame, "downstream_error", objective="squares", **options))


def test_the_score_is_the_tasks_law_at_the_predicted_loss(truth):
  chain = chained(made_up(truth), bootstrap=0)
  params, tokens = np.array([1e5, 5e6]), 1e7
  loss = (1.5 + 20 / params**0.3 + 120 / tokens**0.4)
  np.testing.assert_allclose(
      chain.predict(params, tokens), 0.85 - 2.2 * np.exp(-0.7 * loss),
      rtol=1e-5)
  np.testing.assert_allclose(chain.predict(tokens=tokens, params=params),
                             chain.predict(params, tokens))
  with pytest.raises(TypeError, match="params, tokens"):
    chain.predict(params)


def test_intervals_hold_what_both_fits_do_not_know(truth):
  chain = chained(made_up(truth, noise=0.003), bootstrap=300)
  assert chain.has_intervals, (chain.loss.reason, chain.task.reason)
  low, high = chain.predict_interval(5e6, 1e7)
  assert low < chain.predict(5e6, 1e7) < high
  # Every pair of resamples, instead of one partner each.
  losses = chain.loss.law.predict(chain.loss.samples, {
      "params": np.array(5e6), "tokens": np.array(1e7)})
  scores = chain.task.law.predict(chain.task.samples[:, None, :],
                                  {"loss": losses[None, :]})
  expected = np.percentile(scores, [2.5, 97.5])
  np.testing.assert_allclose([low, high], expected, rtol=0.01)
  # Wider than what either fit alone leaves open.
  task_low, task_high = chain.task.predict_interval(
      chain.loss.predict(5e6, 1e7))
  through = chain.task.predict(losses)
  only_loss = np.ptp(np.percentile(through, [2.5, 97.5]))
  assert high - low > max(task_high - task_low, only_loss)
  noisy_low, noisy_high = chain.predict_interval(5e6, 1e7, noise=True)
  spread = 2 * 1.96 * chain.task.residuals.std()
  assert noisy_high - noisy_low == pytest.approx(
      np.hypot(spread, high - low), rel=0.1)


@pytest.mark.parametrize("space, measured", [
    ("linear", lambda chain, e: 0.03), ("log", lambda chain, e: 0.03 * e)])
def test_one_more_measurement_has_the_tasks_residuals(truth, space, measured):
  frame = made_up(truth)
  rng = np.random.default_rng(1)
  noise = 0.03 * rng.standard_normal(len(frame))
  frame["error"] = (frame["error"] + noise if space == "linear"
                    else frame["error"] * np.exp(noise))
  chain = downstream.TwoStep(
      scaling.fit(frame, bootstrap=100),
      scaling.fit(frame, "downstream_error", objective="squares", space=space,
                  bootstrap=100, fixed={"gamma": 0.7}))
  low, high = chain.predict_interval(1e6, 4e6, noise=True)
  expected = 2 * 1.96 * measured(chain, chain.predict(1e6, 4e6))
  assert high - low == pytest.approx(expected, rel=0.35)


def test_intervals_of_many_points_are_those_of_each(truth):
  chain = chained(made_up(truth, noise=0.003), bootstrap=100)
  low, high = chain.predict_interval(np.array([1e5, 5e6]), np.array(1e7))
  one = chain.predict_interval(5e6, 1e7)
  assert low.shape == high.shape == (2,)
  np.testing.assert_allclose((low[1], high[1]), one)


def test_fits_of_different_numbers_of_resamples_chain(truth):
  frame = made_up(truth, noise=0.003)
  chain = downstream.TwoStep(
      scaling.fit(frame, bootstrap=100),
      scaling.fit(frame, "downstream_error", objective="squares",
                  bootstrap=300))
  same = chained(frame, bootstrap=300)
  np.testing.assert_allclose(chain.predict_interval(5e6, 1e7),
                             same.predict_interval(5e6, 1e7), rtol=0.02)


def test_accuracy_by_a_sigmoid(truth):
  frame = made_up(truth)
  rise = 1 / (1 + np.exp(3 * (frame["loss"] - 2.5)))
  frame["accuracy"] = 0.25 + 0.6 * rise
  chain = downstream.TwoStep(
      scaling.fit(frame, bootstrap=0),
      scaling.fit(frame, "downstream_accuracy", objective="squares",
                  bootstrap=0))
  loss = 1.5 + 20 / 5e6**0.3 + 120 / 1e7**0.4
  assert chain.predict(5e6, 1e7) == pytest.approx(
      0.25 + 0.6 / (1 + np.exp(3 * (loss - 2.5))), rel=1e-4)


def test_no_interval_where_a_fit_has_none(truth):
  frame = made_up(truth, noise=0.003)
  for loss, task in ((0, 100), (100, 0)):
    chain = downstream.TwoStep(
        scaling.fit(frame, bootstrap=loss),
        scaling.fit(frame, "downstream_error", objective="squares",
                    bootstrap=task))
    assert not chain.has_intervals
    low, high = chain.predict_interval(np.array([1e5, 5e6]), 1e7)
    assert np.isnan([low, high]).all() and low.shape == (2,)


def test_losses_that_the_task_was_not_fitted_at_are_told(truth):
  chain = chained(made_up(truth), bootstrap=0)
  assert list(chain.extrapolates(np.array([1e5, 5e6, 1e4]), np.array(
      [1e6, 1e7, 1e5]))) == [False, True, True]


def test_fits_in_the_wrong_places_are_refused(truth):
  frame = made_up(truth)
  loss = scaling.fit(frame, bootstrap=0)
  task = scaling.fit(frame, "downstream_error", bootstrap=0)
  with pytest.raises(ValueError, match="first fit must predict loss"):
    downstream.TwoStep(task, task)
  with pytest.raises(ValueError, match="second fit must take loss alone"):
    downstream.TwoStep(loss, loss)


def test_its_record_is_both_fits(truth):
  record = chained(made_up(truth), bootstrap=0).to_dict()
  assert record["loss"]["law"] == "chinchilla"
  assert record["task"]["law"] == "downstream_error"
