# SPDX-License-Identifier: Apache-2.0
"""Robust regression of any smooth form, many problems at once.

One problem is a start, a vector of row weights (a bootstrap resample is one)
and a box of bounds (a profile point is a box without width). All run together
as one vmapped program; what a form means is in `forms`, what a result means
in `fit`.
"""

from concurrent import futures
import dataclasses
import functools
import os
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from tfjax.scaling import forms
from tfjax.scaling.forms import FloatArray

# (theta [P], inputs {name: [rows]}) -> [rows] of the predicted target.
Form = Callable[[jax.Array, dict[str, jax.Array]], jax.Array]

_LANES = 128  # problems a program; fixed, so that it compiles once
_LEAST_ROWS = 16  # rows are padded to powers of two from here, as above,
_FINE_ROWS = 256  # and to quarters of them from there
_STEPS = 8  # between looks at which problems are done
_DAMPING_START, _DAMPING_FLOOR, _DAMPING_STUCK = 1e-3, 1e-12, 1e5
_SHRINK, _GROW = 8.0, 10.0
_LONGEST = 2.0  # of a step, in units of any parameter
# Objectives are sums of squared residuals: below this they are zero.
_ZERO = 1e-28


@dataclasses.dataclass(frozen=True)
class Solution:
  """Of S problems: where each ended, how low, and whether it had settled."""

  theta: FloatArray  # [S, parameters]
  objective: FloatArray  # [S]
  converged: np.ndarray  # [S] bool


def minimise(
    form: Form,
    log: bool,
    inputs: dict[str, FloatArray],
    target: FloatArray,
    weights: FloatArray,
    start: FloatArray,
    bounds: tuple[FloatArray, FloatArray],
    delta: float,
    max_iterations: int = 400,
) -> Solution:
  """Minimises sum_i w_i Huber(r_i), in float64, where the residual r is
  form(theta, inputs) - target, or log form - log target.

  A damped Newton method that tries two steps an iteration: with Huber's own
  second derivative, which is exact and so fast near the end, and with that of
  the parabola that lies above Huber's loss (reweighting), which goes downhill
  from anywhere. The form's own curvature is in both. The *sum* over rows is
  minimised: a mean scales gradients below usual tolerances.

  Args:
    form: what is fitted; the same object again is not compiled again.
    log: whether residuals are of logarithms.
    inputs: [rows] of each input.
    target: [rows], positive where `log`.
    weights: [S, rows] or [rows], of the rows in each problem.
    start: [S, parameters].
    bounds: lower and upper ends, [S, parameters] or [parameters]; where they
      are equal the parameter is held.
    delta: residual beyond which Huber's loss grows linearly; inf for half the
      sum of squares.
    max_iterations: steps after which a problem counts as not converged.
  """
  count, size = start.shape
  rows = _padded(len(target))
  spare = rows - len(target)
  pad = lambda a, v: np.concatenate(
      [a, np.full((*a.shape[:-1], spare), v)], axis=-1)
  data = ({k: pad(np.asarray(v, np.float64), 1.0) for k, v in inputs.items()},
          pad(np.log(target) if log else np.asarray(target, np.float64), 0.0),
          np.float64(delta))
  weights = np.broadcast_to(
      pad(np.asarray(weights, np.float64), 0.0), (count, rows))
  low, high = (np.broadcast_to(b, (count, size)) for b in bounds)
  theta = np.clip(start, low, high)
  state = [theta, np.full(count, np.nan), np.full(count, _DAMPING_START),
           np.zeros(count, np.int64)]
  done = np.zeros(count, bool)

  def advance(lanes: np.ndarray) -> list[FloatArray]:
    filled = np.resize(lanes, _LANES)
    with forms.on_cpu_in_float64():
      moved = _advance(form, log, [part[filled] for part in state],
                       weights[filled], low[filled], high[filled], *data)
      return [np.asarray(part)[:len(lanes)] for part in moved]

  active = np.arange(count)
  with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for _ in range(0, max_iterations, _STEPS):
      parts = [active[k:k + _LANES] for k in range(0, len(active), _LANES)]
      for lanes, moved in zip(parts, threads.map(advance, parts)):
        for whole, part in zip((*state, done), moved):
          whole[lanes] = part
      active = active[~done[active]]
      if not len(active):
        break
  objective = np.where(np.isnan(state[1]), np.inf, state[1])
  return Solution(state[0], objective, done & np.isfinite(objective))


def huber(residual: Any, delta: Any) -> Any:
  """Huber's loss: r^2 / 2 up to delta, delta (|r| - delta / 2) beyond."""
  size = abs(residual)
  inside = jnp.minimum(size, delta)
  return inside * (size - 0.5 * inside)


# --- Details -----------------------------------------------------------------


def _padded(rows: int) -> int:
  """A size that many tables share, so that they share a program."""
  power = max(_LEAST_ROWS, 1 << (rows - 1).bit_length())
  step = power // 8 if power > _FINE_ROWS else power
  return -(-rows // step) * step


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(form: Form, log: bool, state: list[jax.Array], weights: jax.Array,
             low: jax.Array, high: jax.Array, inputs: dict[str, jax.Array],
             target: jax.Array, delta: jax.Array) -> list[jax.Array]:
  """Some steps of every lane: theta, objective, damping, settled, done."""
  def lane(theta, objective, damping, settled, weights, low, high):
    problem = _Problem(form, log, weights, low, high, inputs, target, delta)
    objective = jnp.where(jnp.isnan(objective), problem.value(theta), objective)
    start = (theta, objective, damping, settled, False)
    return jax.lax.fori_loop(0, _STEPS, lambda _, now: problem.step(now), start)
  return list(jax.vmap(lane)(*state, weights, low, high))


@dataclasses.dataclass(frozen=True)
class _Problem:
  """The objective of one lane, and its damped Newton step."""

  form: Form
  log: bool
  weights: jax.Array
  low: jax.Array
  high: jax.Array
  inputs: dict[str, jax.Array]
  target: jax.Array
  delta: jax.Array

  def value(self, theta: jax.Array) -> jax.Array:
    residual = self._seen(self.form(theta, self.inputs)) - self.target
    return jnp.sum(self._counted(huber(residual, self.delta)))

  def step(self, now: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    theta, objective, damping, settled, done = now
    gradient, steep, exact, safe = self._derivatives(theta)
    held = ((theta <= self.low) & (gradient >= 0)) | (
        (theta >= self.high) & (gradient <= 0))
    gradient = jnp.where(held, 0.0, gradient)
    scale = jnp.diagonal(safe) + 1e-30
    def moved(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
      hessian = jnp.where(held[:, None] | held, 0.0, hessian)
      hessian += jnp.diag(jnp.where(held, scale, 0.0) + damping * scale)
      factor = jnp.linalg.cholesky(hessian)
      shift = -jax.scipy.linalg.cho_solve((factor, True), gradient)
      longest = jnp.maximum(jnp.abs(shift).max(), _LONGEST)
      end = jnp.clip(theta + shift * (_LONGEST / longest), self.low, self.high)
      value = self.value(end)
      return end, jnp.where(jnp.isnan(value), jnp.inf, value)
    # Cholesky's factor of an indefinite matrix is NaN, and so never taken.
    ends, values = jax.tree.map(lambda *a: jnp.stack(a), *map(
        moved, (steep + exact, steep + safe, safe)))
    best = jnp.argmin(values)
    end, value = ends[best], values[best]
    better = value < objective
    shift = jnp.abs((end - theta) / (jnp.abs(theta) + 1e-2)).max()
    small = (objective - value <= 1e-11 * objective) & (shift < 1e-5)
    settled = jnp.where((better & small) | (objective < _ZERO), settled + 1, 0)
    done |= (settled >= 2) | (~better & (damping >= _DAMPING_STUCK))
    return (jnp.where(better, end, theta), jnp.where(better, value, objective),
            jnp.where(better, jnp.maximum(damping / _SHRINK, _DAMPING_FLOOR),
                      damping * _GROW), settled, done)

  def _derivatives(self, theta: jax.Array) -> tuple[jax.Array, ...]:
    """Gradient, and the Hessian's parts: the form's own curvature, Huber's
    second derivative, and its majorising parabola's."""
    predicted = self.form(theta, self.inputs)
    jacobian = jax.jacfwd(self.form)(theta, self.inputs)
    residual = self._seen(predicted) - self.target
    pull = self._counted(jnp.clip(residual, -self.delta, self.delta))
    size = jnp.maximum(jnp.abs(residual), 1e-300)
    exact = self._counted((size <= self.delta).astype(residual.dtype))
    safe = self._counted(jnp.minimum(1.0, self.delta / size))
    along = pull
    if self.log:  # d log f = df / f, and d^2 log f = d^2 f / f - (df / f)^2.
      jacobian, along = jacobian / predicted[:, None], pull / predicted
    steep = jax.hessian(lambda t: along @ self.form(t, self.inputs))(theta)
    # One product for all three is twice as fast as three.
    weighted = jnp.stack([exact, safe, pull])[:, None] * jacobian.T
    exact, safe, bent = (weighted.reshape(-1, len(size)) @ jacobian).reshape(
        3, len(theta), len(theta))
    return pull @ jacobian, steep - bent if self.log else steep, exact, safe

  def _seen(self, predicted: jax.Array) -> jax.Array:
    return jnp.log(predicted) if self.log else predicted

  def _counted(self, values: jax.Array) -> jax.Array:
    """Weighted; a row of no weight may hold anything, also NaN."""
    return jnp.where(self.weights > 0, self.weights * values, 0.0)
