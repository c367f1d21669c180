# SPDX-License-Identifier: Apache-2.0
"""Huber regression of log-sum-exp models, many problems at once.

One problem is a start and a vector of row weights (a bootstrap resample is
one). All run together in numpy; what a model means is in `laws`, what a
result means in `fit`.
"""

import dataclasses

import numpy as np

FloatArray = np.ndarray

_DAMPING_START, _DAMPING_FLOOR, _DAMPING_STUCK = 1e-3, 1e-15, 1e6
_DAMPING_FACTOR = 8.0
# Objectives are sums of squared log residuals: below this they are zero.
_ZERO = 1e-28


@dataclasses.dataclass(frozen=True)
class Solution:
  """Of S problems: where each ended, how low, and whether it had settled."""

  theta: FloatArray  # [S, parameters]
  objective: FloatArray  # [S]
  converged: np.ndarray  # [S] bool


def minimise(
    features: FloatArray,
    target: FloatArray,
    weights: FloatArray,
    start: FloatArray,
    bounds: tuple[FloatArray, FloatArray],
    delta: float,
    max_iterations: int = 300,
) -> Solution:
  """Minimises sum_i w_i Huber(logsumexp_j(X_ji theta) - target_i).

  A damped Newton method: Huber's curvature is replaced by the reweighting
  that majorises it, the model's is exact, and the Hessian's eigenvalues are
  taken by their absolute value, so that every step goes downhill. The *sum*
  over rows is minimised: a mean scales gradients below usual tolerances.

  Args:
    features: [terms, rows, parameters] X.
    target: [rows] log of the measured loss.
    weights: [S, rows] row weights of each problem.
    start: [S, parameters].
    bounds: lower and upper ends of each parameter.
    delta: residual beyond which Huber's loss grows linearly.
    max_iterations: steps after which a problem counts as not converged.
  """
  problem = _Problem(features, target, bounds, delta)
  theta = np.clip(start, *bounds)
  objective, residual, share = problem.value(theta, weights)
  damping = np.full(len(theta), _DAMPING_START)
  settled = np.zeros(len(theta), int)
  converged = np.zeros(len(theta), bool)
  active = np.arange(len(theta))
  for _ in range(max_iterations):
    if not len(active):
      break
    old = objective[active]
    moved = problem.step(theta[active], weights[active], residual[active],
                         share[active], damping[active])
    new, new_residual, new_share = problem.value(moved, weights[active])
    better = new < old
    drop = np.where(better, old - new, 0.0)
    shift = np.abs(moved - theta[active]).max(axis=1)
    improved = active[better]
    theta[improved], objective[improved] = moved[better], new[better]
    residual[improved], share[improved] = new_residual[better], new_share[
        better]
    damping[active] = np.where(
        better, np.maximum(damping[active] / _DAMPING_FACTOR, _DAMPING_FLOOR),
        damping[active] * _DAMPING_FACTOR)
    stuck = ~better & (damping[active] >= _DAMPING_STUCK)
    small = better & (drop <= 1e-12 * old) & (shift < 1e-7)
    settled[active] = np.where(
        small | (objective[active] < _ZERO), settled[active] + 1, 0)
    finished = stuck | (settled[active] >= 2)
    converged[active[finished]] = True
    active = active[~finished]
  return Solution(theta, objective, converged)


class _Problem:
  """The objective and its damped Newton step, over a batch of problems."""

  def __init__(self, features: FloatArray, target: FloatArray,
               bounds: tuple[FloatArray, FloatArray], delta: float):
    self._terms, self._rows, self._size = features.shape
    self._features = features
    self._flat = features.reshape(-1, self._size)
    # Outer products of the features: the log-sum-exp's own curvature is a
    # weighted sum of these, one matrix product for the whole batch.
    self._outer = np.einsum("kp,kq->kpq", self._flat, self._flat).reshape(
        -1, self._size**2)
    self._target = target
    self._low, self._high = bounds
    self._delta = delta

  def value(
      self, theta: FloatArray, weights: FloatArray
  ) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Objective [S], residual [S, rows], each term's share [S, terms, rows]."""
    logs = (theta @ self._flat.T).reshape(-1, self._terms, self._rows)
    top = logs.max(axis=1)
    values = np.exp(logs - top[:, None])
    total = values.sum(axis=1)
    residual = top + np.log(total) - self._target
    size = np.abs(residual)
    huber = np.where(size <= self._delta, 0.5 * size**2,
                     self._delta * (size - 0.5 * self._delta))
    return (weights * huber).sum(axis=1), residual, values / total[:, None]

  def step(self, theta: FloatArray, weights: FloatArray, residual: FloatArray,
           share: FloatArray, damping: FloatArray) -> FloatArray:
    """The parameters after one step, within the bounds."""
    pull = weights * np.clip(residual, -self._delta, self._delta)
    weighted = (pull[:, None] * share).reshape(len(theta), -1)
    gradient = weighted @ self._flat
    fixed = ((theta <= self._low) & (gradient > 0)) | (
        (theta >= self._high) & (gradient < 0))
    gradient = np.where(fixed, 0.0, gradient)
    jacobian = np.einsum("sjn,jnp->snp", share, self._features)
    size = np.maximum(np.abs(residual), 1e-300)
    curvature = weights * np.minimum(1.0, self._delta / size) - pull
    hessian = (weighted @ self._outer).reshape(-1, self._size, self._size)
    hessian += np.matmul(
        jacobian.transpose(0, 2, 1) * curvature[:, None], jacobian)
    hessian *= ~fixed[:, :, None] & ~fixed[:, None, :]
    eigenvalues, vectors = np.linalg.eigh(hessian)
    eigenvalues = np.abs(eigenvalues)
    scale = eigenvalues.max(axis=1, keepdims=True) + 1e-300
    along = np.einsum("spk,sp->sk", vectors, gradient)
    along /= eigenvalues + (damping[:, None] + 1e-14) * scale
    step = -np.einsum("spk,sk->sp", vectors, along)
    # Two units of log or of exponent at most, lest exp overflow.
    longest = np.abs(step).max(axis=1, keepdims=True)
    step *= np.minimum(1.0, 2.0 / np.maximum(longest, 1e-300))
    return np.clip(theta + step, self._low, self._high)
