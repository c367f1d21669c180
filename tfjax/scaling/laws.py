# SPDX-License-Identifier: Apache-2.0
"""Scaling laws as data: one entry of `LAWS` a law.

A law here is a sum of power-law terms, so that its logarithm is a
log-sum-exp of forms linear in the fitted parameters; that is what
`tfjax.scaling.solver` minimises. How a law is fitted is in `fit`.
"""

import dataclasses
from typing import Mapping

import numpy as np

FloatArray = np.ndarray  # always float64 in this layer


@dataclasses.dataclass(frozen=True)
class Term:
  """coefficient * product over axes of axis^-exponent.

  `exponents` maps an axis ("params", "tokens") to the exponent's name; a term
  without any is a constant, the irreducible loss.
  """

  coefficient: str
  exponents: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Law:
  """A sum of terms: what is fitted, within which bounds, and whose it is."""

  name: str
  terms: tuple[Term, ...]
  form: str
  source: str
  exponent_bounds: tuple[float, float] = (1e-3, 3.0)
  # A term's value at the centre of the data, over the smallest loss there.
  share_bounds: tuple[float, float] = (1e-3, 10.0)

  @property
  def axes(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(
        axis for term in self.terms for axis in term.exponents))

  @property
  def exponents(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(
        name for term in self.terms for name in term.exponents.values()))

  @property
  def coefficients(self) -> tuple[str, ...]:
    return tuple(term.coefficient for term in self.terms)

  @property
  def parameters(self) -> tuple[str, ...]:
    """Names in the order of every parameter vector: coefficients first."""
    return self.coefficients + self.exponents

  def axis_of(self, exponent: str) -> tuple[str, ...]:
    """The axes whose values an exponent governs."""
    return tuple(dict.fromkeys(
        axis for term in self.terms for axis, name in term.exponents.items()
        if name == exponent))

  def features(self, logs: Mapping[str, FloatArray]) -> FloatArray:
    """[terms, rows, parameters] X: log of term j at row i is X[j, i] @ theta.

    theta holds the logs of the coefficients, then the exponents; `logs` the
    log of each axis, usually less its mean (`uncentre` undoes that).
    """
    rows = len(next(iter(logs.values())))
    features = np.zeros((len(self.terms), rows, len(self.parameters)))
    for j, term in enumerate(self.terms):
      features[j, :, j] = 1.0
      for axis, name in term.exponents.items():
        features[j, :, self.parameters.index(name)] -= logs[axis]
    return features

  def uncentre(self, theta: FloatArray,
               centre: Mapping[str, float]) -> FloatArray:
    """Natural parameters of [..., parameters] fitted on centred logs."""
    natural = np.array(theta, dtype=np.float64)
    for j, term in enumerate(self.terms):
      for axis, name in term.exponents.items():
        natural[..., j] += (
            theta[..., self.parameters.index(name)] * centre[axis])
    count = len(self.terms)
    natural[..., :count] = np.exp(natural[..., :count])
    return natural

  def predict(self, natural: FloatArray,
              axes: Mapping[str, FloatArray]) -> FloatArray:
    """Loss for natural parameters [..., parameters] at broadcast axes."""
    total = 0.0
    for j, term in enumerate(self.terms):
      value = natural[..., j]
      for axis, name in term.exponents.items():
        value = value * axes[axis] ** -natural[
            ..., self.parameters.index(name)]
      total = total + value
    return total


LAWS = {law.name: law for law in (
    Law(
        name="chinchilla",
        terms=(Term("E", {}), Term("A", {"params": "alpha"}),
               Term("B", {"tokens": "beta"})),
        form="L(N, D) = E + A / N^alpha + B / D^beta",
        source="Hoffmann et al. 2022, arXiv:2203.15556, section 3.3",
    ),
)}


def get(name: str) -> Law:
  """The law of that name, or a ValueError that lists the known ones."""
  if name not in LAWS:
    raise ValueError(f"no scaling law {name!r}; known: {', '.join(LAWS)}")
  return LAWS[name]
