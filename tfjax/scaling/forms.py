# SPDX-License-Identifier: Apache-2.0
"""What a scaling law is: parameters, their ranges, a form, a source.

`Law` is a frozen record. A law is either a sum of power-law terms (`Term`),
fitted on axes divided by their geometric means, so that its coefficients are
the terms' sizes there, or any plain function. The entries are in `laws`,
fitting in `fit`.
"""

import dataclasses
import functools
import inspect
from typing import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

FloatArray = np.ndarray  # always float64 in this layer
Values = Mapping[str, FloatArray]


@dataclasses.dataclass(frozen=True)
class Term:
  """coefficient * product over axes of axis^(-factor * exponent).

  `exponents` maps an axis ("params", "tokens") to the exponent's name;
  `factors` an axis to what multiplies it there, 1 where it is not named. A
  term without any is a constant, the irreducible loss.
  """

  coefficient: str
  exponents: Mapping[str, str] = dataclasses.field(default_factory=dict)
  factors: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def powers(self) -> tuple[tuple[str, str, float], ...]:
    """(axis, exponent's name, sign and size of its power), one an axis."""
    return tuple((axis, name, -self.factors.get(axis, 1.0))
                 for axis, name in self.exponents.items())


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A parameter of a law that is a plain function.

  `starts` are natural values that a grid of starts is made of. With `log` the
  solver moves the logarithm, for scales of unknown size. A `shape` parameter
  says how fast a loss falls or where it bends: one that the data leave open
  by more than a factor of two is reported as undetermined.
  """

  name: str
  low: float
  high: float
  starts: tuple[float, ...]
  log: bool = False
  shape: bool = True

  def __post_init__(self) -> None:
    if not self.low < self.high:
      raise ValueError(f"parameter {self.name}: low {self.low:g} must be below "
                       f"high {self.high:g}")
    if not self.starts or not all(
        self.low <= s <= self.high for s in self.starts):
      raise ValueError(f"parameter {self.name}: starts {self.starts} must lie "
                       f"from {self.low:g} to {self.high:g}")
    if self.log and self.low <= 0:
      raise ValueError(f"parameter {self.name}: low must be positive for log")


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by what it is
class Law:
  """What is fitted, of which columns, within which bounds, and whose it is.

  Either `terms`, or `function` and `free`. `function(p, x)` gets mappings of
  names to arrays, uses operators and `jax.numpy` on them, and returns the
  target; it must be positive where `space` is "log".
  """

  name: str
  form: str
  source: str
  terms: tuple[Term, ...] = ()
  function: Callable[[Values, Values], FloatArray] | None = None
  free: tuple[Parameter, ...] = ()
  function_axes: tuple[str, ...] = ()
  target: str = "loss"
  space: str = "log"  # of residuals, unless a fit says otherwise
  exponent_bounds: tuple[float, float] = (1e-3, 3.0)
  exponent_starts: tuple[float, ...] = (0.1, 0.3, 0.6, 1.0)
  # A term's value at the centre of the data, over the smallest target there.
  share_bounds: tuple[float, float] = (1e-3, 10.0)
  # What follows from the parameters, by name: shown beside them.
  derived: Mapping[str, Callable[[Values], FloatArray]] = dataclasses.field(
      default_factory=dict)

  def __post_init__(self) -> None:
    if bool(self.terms) == (self.function is not None):
      raise ValueError(f"law {self.name!r} needs either terms or a function")
    if self.function is not None and not (self.free and self.function_axes):
      raise ValueError(f"law {self.name!r}: a function needs parameters (free) "
                       "and axes (function_axes)")
    if len(set(self.parameters)) != len(self.parameters):
      raise ValueError(f"law {self.name!r} names a parameter twice: "
                       f"{', '.join(self.parameters)}")
    if self.space not in ("log", "linear"):
      raise ValueError(f"law {self.name!r}: space must be log or linear, not "
                       f"{self.space!r}")

  @property
  def axes(self) -> tuple[str, ...]:
    """Names of the inputs, in the order in which `Fit.predict` takes them."""
    return self.function_axes or tuple(dict.fromkeys(
        axis for term in self.terms for axis in term.exponents))

  @property
  def exponents(self) -> tuple[str, ...]:
    """Names of exponents; of a function, of its shape parameters."""
    return tuple(dict.fromkeys(
        name for term in self.terms for name in term.exponents.values())) or (
            tuple(p.name for p in self.free if p.shape))

  @property
  def coefficients(self) -> tuple[str, ...]:
    return tuple(term.coefficient for term in self.terms) or tuple(
        p.name for p in self.free if not p.shape)

  @property
  def constants(self) -> tuple[str, ...]:
    """Terms that no axis moves: irreducible losses."""
    return tuple(t.coefficient for t in self.terms if not t.exponents)

  @property
  def parameters(self) -> tuple[str, ...]:
    """Names in the order of every parameter vector."""
    if self.free:
      return tuple(p.name for p in self.free)
    return self.coefficients + self.exponents

  def touched_by(self, axis: str) -> set[str]:
    """Parameters that only variation of this axis can determine."""
    if not self.terms:
      return set(self.parameters)
    return {name for term in self.terms if axis in term.exponents
            for name in (term.coefficient, term.exponents[axis])}

  def predict(self, natural: FloatArray, axes: Values) -> FloatArray:
    """The target for natural parameters [..., parameters] at broadcast axes."""
    natural = np.asarray(natural, np.float64)
    values = {name: natural[..., k] for k, name in enumerate(self.parameters)}
    axes = {axis: np.asarray(axes[axis], np.float64) for axis in self.axes}
    if self.terms:
      return _sum_of_terms(self.terms, values, axes)
    shape = np.broadcast_shapes(
        *(v.shape for v in (*values.values(), *axes.values())))
    with on_cpu_in_float64():
      return np.broadcast_to(
          np.asarray(self.function(values, axes), np.float64), shape)

  def gradient(self, natural: FloatArray, axes: Values) -> FloatArray:
    """[parameters, ...axes]: how the prediction moves with each parameter."""
    def at(vector: jax.Array) -> jax.Array:
      values = {name: vector[k] for k, name in enumerate(self.parameters)}
      inputs = {axis: jnp.asarray(axes[axis]) for axis in self.axes}
      shape = jnp.broadcast_shapes(*(v.shape for v in inputs.values()))
      made = (_sum_of_terms(self.terms, values, inputs) if self.terms
              else self.function(values, inputs))
      return jnp.broadcast_to(made, shape)
    with on_cpu_in_float64():
      return np.moveaxis(np.asarray(jax.jacfwd(at)(
          jnp.asarray(natural, jnp.float64))), -1, 0)


def from_function(
    function: Callable[[Values, Values], FloatArray],
    parameters: tuple[Parameter, ...],
    axes: tuple[str, ...],
    *,
    name: str | None = None,
    form: str | None = None,
    source: str = "user",
    **options: object,
) -> Law:
  """A law of one's own, to be given to `fit` in place of a name.

      def form(p, x):
        return p["E"] + p["A"] / x["params"] ** p["alpha"]
      law = from_function(form, (Parameter("E", 0.1, 5, (1.0,)), ...),
                          axes=("params",))

  Raises:
    ValueError: the function asks for a name that is not there, or does not
      give a number.
  """
  law = Law(name=name or function.__name__,
            form=form or (inspect.getdoc(function) or function.__name__),
            source=source, function=function, free=parameters,
            function_axes=axes, **options)
  middle = np.array([p.starts[0] for p in parameters])
  try:
    law.predict(middle, {axis: np.ones(2) for axis in axes})
  except KeyError as error:
    raise ValueError(
        f"law {law.name!r} asks for {error}; its parameters are "
        f"{', '.join(law.parameters)}, its axes {', '.join(axes)}") from error
  except ValueError as error:
    raise ValueError(f"law {law.name!r} must give one number a row: {error}"
                     ) from error
  return law


@functools.cache
def _cpu() -> jax.Device:
  return jax.local_devices(backend="cpu")[0]


def on_cpu_in_float64() -> "_Float64":
  """Fits are float64, on the host: JAX alone would make them float32."""
  return _Float64()


class _Float64:
  """Both settings are of the thread that enters, so threads enter their own."""

  def __enter__(self) -> None:
    self._open = (jax.enable_x64(True), jax.default_device(_cpu()))
    for context in self._open:
      context.__enter__()

  def __exit__(self, *error: object) -> None:
    for context in reversed(self._open):
      context.__exit__(*error)


def _sum_of_terms(terms: tuple[Term, ...], values: Values,
                  axes: Values) -> FloatArray:
  total = 0.0
  for term in terms:
    value = values[term.coefficient]
    for axis, name, factor in term.powers():
      value = value * axes[axis] ** (factor * values[name])
    total = total + value
  return total
