# SPDX-License-Identifier: Apache-2.0
"""Questions from a loss: by hand, against scipy, and as published."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from tfjax.scaling import frontier
from tfjax.scaling import inverse
from tfjax.scaling import laws

# E, A, B, alpha, beta: on the frontier of C FLOPs, L = 1 + 20 / (C / 6)^(1/4).
_EVEN = (1.0, 10.0, 10.0, 0.5, 0.5)
_CHINCHILLA = (1.69, 406.4, 410.7, 0.336, 0.283)


@dataclasses.dataclass(frozen=True)
class Known:
  """What the questions ask of a fit, with coefficients that are known."""

  natural: tuple[float, ...]
  name: str = "chinchilla"
  spread: float = 0.0
  count: int = 50
  cost: frontier.Cost = frontier.CONVENTION
  has_intervals: bool = True
  level: float = 0.9

  @property
  def law(self) -> Any:
    return laws.get(self.name)

  @property
  def coefficients(self) -> dict[str, float]:
    return dict(zip(self.law.parameters, self.natural))

  @property
  def samples(self) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(
        (self.count, len(self.natural)))
    return np.array(self.natural) * np.exp(self.spread * noise)


def test_compute_for_a_loss_by_hand():
  made = inverse.compute_for_loss(Known(_EVEN), [1.02, 1.2])
  assert made["flops"].to_numpy() == pytest.approx([6e12, 6e8])
  assert made["params"].to_numpy() == pytest.approx([1e6, 1e4], rel=1e-5)
  assert made["tokens_per_parameter"].to_numpy() == pytest.approx(
      [1, 1], rel=1e-4)
  # No spread in the samples, none in the answer.
  assert made["flops_low"].to_numpy() == pytest.approx([6e12, 6e8])


@pytest.mark.parametrize("name, natural", [
    ("chinchilla", _CHINCHILLA), ("overtraining", (1.8, 150.0, 190.0, 0.12)),
    ("kaplan", (2.2e6, 5.4e4, 0.076, 0.095))])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_there_and_back(name, natural, gamma):
  fit = Known(natural, name, cost=frontier.Cost(9.0, gamma, "", None, None),
              count=2)
  flops = np.array([1e18, 1e22])
  params, _, loss = frontier.optimum(fit.law, np.array(natural), fit.cost,
                                     flops)
  made = inverse.compute_for_loss(fit, loss)
  assert made["flops"].to_numpy() == pytest.approx(flops, rel=1e-8)
  assert made["params"].to_numpy() == pytest.approx(params, rel=1e-4)


def test_a_loss_that_cannot_be_reached_is_infinite():
  made = inverse.compute_for_loss(Known(_EVEN, spread=0.03), [0.9, 1.0, 1.03])
  assert np.isinf(made["flops"][:2]).all() and np.isfinite(made["flops"][2])
  # In some samples E is above 1.03: the upper end is open, the lower is not.
  assert np.isinf(made["flops_high"][2]) and np.isfinite(made["flops_low"][2])


def test_tokens_for_a_loss_by_hand():
  made = inverse.tokens_for_loss(Known(_EVEN), 1.02, [1e6, 4e6, 2.4e5])
  # 10 / sqrt(D) = 0.02 - 10 / sqrt(N)
  assert made["tokens"].to_numpy() == pytest.approx(
      [1e6, (10 / 0.015) ** 2, np.inf])
  assert made["flops"][1] == pytest.approx(6 * 4e6 * (10 / 0.015) ** 2)


def test_tokens_for_a_loss_by_bisection():
  fit = Known((2.2e6, 5.4e4, 0.076, 0.095), "kaplan", count=3)
  made = inverse.tokens_for_loss(fit, 3.0, 1e9)
  again = fit.law.predict(np.array(fit.natural), {
      "params": 1e9, "tokens": made["tokens"].to_numpy()})
  assert again == pytest.approx([3.0], rel=1e-12)


def test_off_the_optimum_by_hand():
  made = inverse.off_optimum(Known(_EVEN), 6e12, [0.2, 1.0, 4.0])
  # k = 4: N 4e6, D 2.5e5, L = 1 + 0.005 + 0.02; an optimal model of N = D =
  # 640,000 has that loss; 0.015 = 10 / sqrt(D) is needed for L = 1.02.
  assert made["loss"][2] == pytest.approx(1.025)
  assert made["loss_excess"].to_numpy() == pytest.approx(
      [10 / 2e5**0.5 + 10 / 5e6**0.5 - 0.02, 0.0, 0.005])
  assert made["equivalent_flops"][2] == pytest.approx(6 * 6.4e5**2)
  assert made["overhead"].to_numpy() == pytest.approx(
      [np.inf, 1.0, 4e6 * (10 / 0.015) ** 2 / 1e12])


def test_runs_against_the_frontier_by_hand():
  made = inverse.on_frontier(Known(_EVEN), [4e6, 1e6], [2.5e5, 1e6])
  # 1 + 10 / sqrt(4e6) + 10 / sqrt(2.5e5); so has N = D = (20 / 0.025)^2.
  assert made["loss"].to_numpy() == pytest.approx([1.025, 1.02])
  assert made["flops"].to_numpy() == pytest.approx([6e12, 6e12])
  assert made["optimal_flops"].to_numpy() == pytest.approx([6 * 6.4e5**2, 6e12])
  assert made["optimal_params"].to_numpy() == pytest.approx([6.4e5, 1e6],
                                                            rel=1e-5)
  assert made["overhead"].to_numpy() == pytest.approx([1 / 0.64**2, 1.0])
  assert made["overhead_low"][0] == pytest.approx(1 / 0.64**2)


def test_each_sample_is_asked_for_its_own_loss():
  made = inverse.on_frontier(Known(_EVEN, spread=0.2), 1e6, 1e6)
  # A fixed loss would cost some samples less than the run, others more.
  assert 1.0 - 1e-9 < made["overhead_low"][0] < made["overhead_high"][0]


@pytest.mark.parametrize("size, served, params, tokens_factor, saving", [
    # A 13B model of which 2e12 tokens are asked: 7B, 17% saved. A 30B model
    # and 1e13: 13.6B on 2.84 times the tokens, 28% saved.
    (13e9, 2e12, 7.0e9, None, 0.17), (30e9, 1e13, 13.6e9, 2.84, 0.28)])
def test_published_savings_of_inference(size, served, params, tokens_factor,
                                        saving):
  # Sardana et al. 2023, introduction and section 3.
  fit = Known(_CHINCHILLA)
  flops = scipy.optimize.brentq(
      lambda log_c: np.log(frontier.optimum(
          fit.law, np.array(fit.natural), fit.cost, np.exp(log_c))[0] / size),
      40, 70)
  _, tokens, loss = frontier.optimum(fit.law, np.array(fit.natural), fit.cost,
                                     np.exp(flops))
  made = inverse.for_inference(fit, float(loss), served).iloc[0]
  assert made["params"] == pytest.approx(params, rel=0.006)
  assert made["saving"] == pytest.approx(saving, abs=0.005)
  if tokens_factor:
    assert made["tokens"] / tokens == pytest.approx(tokens_factor, abs=0.005)
  assert made["total_flops"] == pytest.approx(
      6 * made["params"] * made["tokens"] + 2 * made["params"] * served)


def test_inference_against_scipy():
  fit, loss, served = Known(_EVEN), 1.02, 3e6
  def total(log_params):
    params = np.exp(log_params)
    left = loss - 1 - 10 / params**0.5
    return 6 * params * (10 / left) ** 2 + 2 * params * served
  least = scipy.optimize.minimize_scalar(
      total, bounds=(np.log(2.6e5), np.log(1e7)), method="bounded",
      options={"xatol": 1e-10})
  made = inverse.for_inference(fit, loss, [0.0, served])
  assert made["total_flops"][1] == pytest.approx(least.fun, rel=1e-9)
  assert made["params"][1] == pytest.approx(np.exp(least.x), rel=1e-4)
  assert made["params"][1] < made["params"][0] == pytest.approx(1e6, rel=1e-5)
  assert made["saving"][0] == pytest.approx(0, abs=1e-9)


def test_bands_are_of_the_samples():
  fit = Known(_CHINCHILLA, spread=0.01)
  made = inverse.compute_for_loss(fit, 2.5)
  each = [inverse.compute_for_loss(
      Known(tuple(sample)), 2.5)["flops"][0] for sample in fit.samples]
  assert [made["flops_low"][0], made["flops_high"][0]] == pytest.approx(
      np.percentile(each, [5, 95]))
  none = inverse.compute_for_loss(dataclasses.replace(fit, count=0), 2.5)
  assert none["flops"][0] == made["flops"][0]
  assert np.isnan(none["flops_low"][0])


def test_an_undetermined_fit_has_no_answers():
  fit = Known(_CHINCHILLA, has_intervals=False)
  assert np.isnan(inverse.compute_for_loss(fit, 2.5)["flops"]).all()


def test_bad_questions_are_refused():
  fit = Known(_EVEN)
  with pytest.raises(ValueError, match="loss must be positive"):
    inverse.compute_for_loss(fit, -1.0)
  with pytest.raises(ValueError, match="params must be positive"):
    inverse.tokens_for_loss(fit, 2.0, 0.0)
  with pytest.raises(ValueError, match="inference_tokens must be finite"):
    inverse.for_inference(fit, 2.0, -1.0)
  with pytest.raises(ValueError, match="flops_per_parameter is 0"):
    inverse.for_inference(fit, 2.0, 1.0, 0.0)
  with pytest.raises(ValueError, match="one budget"):
    inverse.off_optimum(fit, [1e12, 1e13])
  with pytest.raises(ValueError, match="factors must be positive"):
    inverse.off_optimum(fit, 1e12, [1.0, 0.0])
  with pytest.raises(ValueError, match="no compute-optimal"):
    inverse.compute_for_loss(Known((2.0, 5.0, 0.1), "compute"), 2.0)
  with pytest.raises(ValueError, match="what N and D cost is unknown"):
    inverse.compute_for_loss(dataclasses.replace(fit, cost=None), 2.0)
