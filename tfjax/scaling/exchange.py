# SPDX-License-Identifier: Apache-2.0
"""Which of many candidates to take, and how often, within a budget.

Minimises the mean over draws k and targets t of log c_kt^T M_k^-1 c_kt, where
M_k is a starting information plus the sum of g_ki g_ki^T over chosen candidates
i. With shares of runs allowed this is convex (Pukelsheim 2006, chapter 5): its
minimum, by conditional gradients (Frank and Wolfe 1956,
doi:10.1002/nav.3800030109), says how good whole runs can get. Those are its
rounding, filled up, and improved by exchange of one for another (Fedorov 1972).
What the numbers stand for is in `design`.
"""

import dataclasses

import numpy as np
from scipy import optimize

from tfjax.scaling.forms import FloatArray

_ITERATIONS = 100
_GAP = 2e-3  # of the mean log variance: 0.1% of a standard error
_LEAST_GAIN = 1e-6  # of the same, for an exchange
_SINGULAR = 1e-9


@dataclasses.dataclass(frozen=True)
class Problem:
  """K draws of P parameters, T targets, n candidates.

  Attributes:
    start: [K, P, P] information there is; positive definite.
    gradients: [K, n, P] of a candidate's observation, over its noise.
    targets: [K, T, P] gradients of the targets.
    costs: [n] FLOPs of a candidate.
    budget: FLOPs of all that are chosen.
    most_runs: how many may be chosen, counted with repetition.
    most_seeds: how often one candidate may be.
  """

  start: FloatArray
  gradients: FloatArray
  targets: FloatArray
  costs: FloatArray
  budget: float
  most_runs: int
  most_seeds: int

  def information(self, counts: FloatArray) -> FloatArray:
    """[K, P, P] after every candidate has been run so often."""
    weighted = self.gradients.transpose(0, 2, 1) * counts
    return self.start + weighted @ self.gradients

  def variances(self, inverse: FloatArray) -> FloatArray:
    """[K, T] of the targets, from the inverse of the information."""
    return np.einsum("ktp,kpq,ktq->kt", self.targets, inverse, self.targets)

  def score(self, information: FloatArray) -> float:
    """What is minimised."""
    return float(np.log(self.variances(np.linalg.inv(information))).mean())


def solve(problem: Problem) -> tuple[np.ndarray, float]:
  """[n] how often to run each candidate, and a bound: no other choice has a
  score below it."""
  shares, bound = relaxed(problem)
  search = _Search(problem)
  search.take(np.floor(shares + 1e-9).astype(int))
  search.fill()
  search.exchange()
  return search.counts, bound


def relaxed(problem: Problem) -> tuple[FloatArray, float]:
  """Shares of runs [n] whose score is within _GAP of the least, and a bound
  from below, by duality: convex functions lie above their tangents."""
  size = len(problem.costs)
  limits = np.array([problem.costs / problem.budget,
                     np.full(size, 1 / problem.most_runs)])
  shares = np.full(size, min(1 / limits.sum(axis=1).max(), problem.most_seeds))
  information, bound = problem.information(shares), -np.inf
  for _ in range(_ITERATIONS):
    inverse = np.linalg.inv(information)
    variances = problem.variances(inverse)
    along = np.einsum("knp,ktp->ktn", problem.gradients @ inverse,
                      problem.targets)
    slope = -(along**2 / variances[:, :, None]).mean(axis=(0, 1))
    corner = optimize.linprog(
        slope, A_ub=limits, b_ub=[1, 1], bounds=(0, problem.most_seeds)).x
    score = float(np.log(variances).mean())
    bound = max(bound, score + float(slope @ (corner - shares)))
    if score - bound < _GAP:
      break
    there = problem.information(corner)
    step = optimize.minimize_scalar(
        lambda s: problem.score((1 - s) * information + s * there),
        bounds=(0, 1), method="bounded").x
    shares = (1 - step) * shares + step * corner
    information = problem.information(shares)
  return shares, bound


class _Search:
  """Counts of the candidates, and the inverse information that they give."""

  def __init__(self, problem: Problem):
    self._problem = problem
    # Of both things that are scarce, what one run takes.
    self._price = problem.costs / problem.budget + 1 / problem.most_runs
    self.take(np.zeros(len(problem.costs), int))

  def take(self, counts: np.ndarray) -> None:
    self.counts = counts
    # Afresh: rank-one updates would add up their rounding.
    information = self._problem.information(counts)
    self._inverse = np.linalg.inv(information)
    self._score = self._problem.score(information)

  def fill(self) -> None:
    """Adds what gains most for its price for as long as something fits."""
    while (fits := self._fits(self.counts)).any():
      gains = self._score - self._scores_with_one_more(self._inverse)
      self._add(int(np.argmax(np.where(fits, gains / self._price, -np.inf))))

  def exchange(self) -> None:
    """One for another, while that helps."""
    before = np.inf
    while self._score < before - _LEAST_GAIN:
      before = self._score
      for out in np.flatnonzero(self.counts):
        without = self._inverse_without(out)
        if without is None:
          continue
        fewer = self.counts.copy()
        fewer[out] -= 1
        scores = np.where(self._fits(fewer),
                          self._scores_with_one_more(without), np.inf)
        new = int(np.argmin(scores))
        if scores[new] < self._score - _LEAST_GAIN:
          fewer[new] += 1
          self.take(fewer)
          self.fill()

  def _add(self, index: int) -> None:
    more = self.counts.copy()
    more[index] += 1
    self.take(more)

  def _fits(self, counts: np.ndarray) -> np.ndarray:
    """Candidates that can be run once more than so often."""
    problem = self._problem
    # Costs that add up to the budget must not fail to by rounding.
    left = problem.budget * (1 + 1e-9) - counts @ problem.costs
    return (counts < problem.most_seeds) & (problem.costs <= left) & (
        counts.sum() < problem.most_runs)

  def _scores_with_one_more(self, inverse: FloatArray) -> FloatArray:
    """[n] the score with each candidate added (Sherman and Morrison 1950)."""
    problem = self._problem
    moved = problem.gradients @ inverse
    scale = 1 + np.einsum("knp,knp->kn", moved, problem.gradients)
    along = np.einsum("knp,ktp->ktn", moved, problem.targets)
    fallen = problem.variances(inverse)[:, :, None] - (
        along**2 / scale[:, None])
    return np.log(np.maximum(fallen, 1e-300)).mean(axis=(0, 1))

  def _inverse_without(self, index: int) -> FloatArray | None:
    """The inverse with one run fewer; None where only it determines it."""
    gradient = self._problem.gradients[:, index]
    moved = np.einsum("kpq,kq->kp", self._inverse, gradient)
    scale = 1 - np.einsum("kp,kp->k", moved, gradient)
    if (scale < _SINGULAR).any():
      return None
    return self._inverse + moved[:, :, None] * moved[:, None, :] / (
        scale[:, None, None])
