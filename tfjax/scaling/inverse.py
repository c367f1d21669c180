# SPDX-License-Identifier: Apache-2.0
"""Questions that start from a loss: how much compute, which N and D, how many
tokens, and what it costs, or has cost, to be off the optimum.

Answers are of a fit, with bands over its bootstrap; those that start from a
budget are `result.Fit.compute_optimal` and `frontier`. N is found by search, D
for it in closed form or by bisection, so that any law in which N and D trade
off can be asked.
"""

from typing import Callable

import numpy as np
import pandas as pd

from tfjax.scaling import frontier
from tfjax.scaling import result
from tfjax.scaling import search
from tfjax.scaling.forms import FloatArray

_Quantities = dict[str, FloatArray]

# A loss that takes more than this is not reached by anything one could build.
MOST_PARAMS, MOST_TOKENS = 1e20, 1e30
# The forward pass: two FLOPs a parameter and token.
INFERENCE_FLOPS = 2.0


def compute_for_loss(fit: result.Fit, loss: FloatArray | float,
                     given: frontier.Given | None = None) -> pd.DataFrame:
  """The smallest training compute that reaches a loss, and its N and D.

  On Chinchilla's surface L*(C) - E = K C^-p with p = alpha beta / (alpha +
  beta gamma) (from Hoffmann et al. 2022, equation 4), turned around.

  Args:
    fit: of a law in which N and D trade off.
    loss: nats a token, one row each.
    given: values of further axes of the law.

  Returns:
    loss, then flops, params, tokens, tokens_per_parameter, each with _low and
    _high. Infinite FLOPs where the loss is at or below the irreducible one; a
    _high is infinite where some of the bootstrap says so.

  Raises:
    ValueError: a loss is not positive, or the law has no trade-off.
  """
  made = for_inference(fit, loss, 0.0, given=given).rename(
      columns=lambda name: name.replace("total_flops", "flops"))
  quantities = ("flops", "params", "tokens", "tokens_per_parameter")
  return made[["loss", *(name + end for name in quantities
                         for end in ("", "_low", "_high"))]]


def for_inference(
    fit: result.Fit, loss: FloatArray | float,
    inference_tokens: FloatArray | float,
    flops_per_parameter: float = INFERENCE_FLOPS,
    given: frontier.Given | None = None,
) -> pd.DataFrame:
  """The N and D that reach a loss with least training and inference compute.

  Least kappa N^gamma D + 2 N T subject to L(N, D) = loss: Sardana et al. 2023,
  arXiv:2401.00448, equation 2, for kappa 6 and gamma 1.

  Args:
    fit: of a law in which N and D trade off.
    loss: nats a token, broadcast against inference_tokens, one row a pair.
    inference_tokens: T, over the life of the model; read and written alike.
    flops_per_parameter: of inference, for each parameter and token.
    given: values of further axes of the law.

  Returns:
    loss, inference_tokens, then params, tokens, tokens_per_parameter,
    training_flops, inference_flops, total_flops, and saving (the share of the
    total that is saved against the model that is cheapest to train), each
    with _low and _high. Infinite where the loss cannot be reached.

  Raises:
    ValueError: an argument is out of range, or the law has no trade-off.
  """
  served = np.atleast_1d(np.asarray(inference_tokens, np.float64))
  if not (np.isfinite(served) & (served >= 0)).all():
    raise ValueError("inference_tokens must be finite and at least 0, not "
                     f"{inference_tokens}")
  if not flops_per_parameter > 0:
    raise ValueError(f"flops_per_parameter is {flops_per_parameter}; must be "
                     "positive")
  losses, served = np.broadcast_arrays(frontier.positive("loss", loss), served)
  serving = flops_per_parameter * served
  def quantities(natural: FloatArray) -> _Quantities:
    ask = _Surface(fit, natural, given)
    params, tokens = ask.cheapest(losses, serving)
    trained, with_tokens = ask.cheapest(losses, 0 * serving)
    with np.errstate(invalid="ignore"):  # inf / inf: unknown.
      inference = np.where(serving > 0, serving * params, 0.0)
      training = ask.flops(params, tokens)
      blind = ask.flops(trained, with_tokens) + np.where(
          serving > 0, serving * trained, 0.0)
      return {"params": params, "tokens": tokens,
              "tokens_per_parameter": tokens / params,
              "training_flops": training, "inference_flops": inference,
              "total_flops": training + inference,
              "saving": 1 - (training + inference) / blind}
  return _answer(fit, {"loss": losses, "inference_tokens": served},
                 quantities, given)


def tokens_for_loss(fit: result.Fit, loss: FloatArray | float,
                    params: FloatArray | float,
                    given: frontier.Given | None = None) -> pd.DataFrame:
  """The training tokens with which a model of given size reaches a loss.

  Args:
    fit: of a law in which N and D trade off.
    loss: nats a token, broadcast against params, one row a pair.
    params: N.
    given: values of further axes of the law.

  Returns:
    loss, params, then tokens, tokens_per_parameter and flops, each with _low
    and _high; infinite where a model of that size never reaches the loss.

  Raises:
    ValueError: an argument is not positive, or the law has no trade-off.
  """
  losses, sizes = np.broadcast_arrays(frontier.positive("loss", loss),
                                      frontier.positive("params", params))
  def quantities(natural: FloatArray) -> _Quantities:
    ask = _Surface(fit, natural, given)
    tokens = ask.tokens(sizes, losses)
    return {"tokens": tokens, "tokens_per_parameter": tokens / sizes,
            "flops": ask.flops(sizes, tokens)}
  return _answer(fit, {"loss": losses, "params": sizes}, quantities, given)


def off_optimum(
    fit: result.Fit, flops: float,
    factors: FloatArray = (0.25, 0.5, 1.0, 2.0, 4.0),
    given: frontier.Given | None = None,
) -> pd.DataFrame:
  """What it costs to train k times N* parameters instead of N*.

  Args:
    fit: of a law in which N and D trade off.
    flops: the budget; the more parameters, the fewer tokens it buys.
    factors: k, one row each.
    given: values of further axes of the law.

  Returns:
    factor, then, each with _low and _high: params and tokens; loss, and
    loss_excess over the optimum's; equivalent_flops, with which an optimal
    model has that loss; overhead, how many times the budget this size needs
    to have the optimum's loss (infinite: it never has). Each sample of the
    bootstrap is compared with its own N*.

  Raises:
    ValueError: an argument is not positive, or the law has no trade-off.
  """
  factors = frontier.positive("factors", factors)
  budget = frontier.positive("flops", flops)
  if len(budget) > 1:
    raise ValueError("flops must be one budget; call once for each")
  def quantities(natural: FloatArray) -> _Quantities:
    ask = _Surface(fit, natural, given)
    best, _, least = frontier.optimum(fit.law, natural, fit.cost, budget, given)
    params = factors * best
    tokens = fit.cost.tokens(params, budget)
    loss = ask.loss(params, tokens)
    needed = ask.flops(params, ask.tokens(params, least + 0 * params))
    return {"params": params, "tokens": tokens, "loss": loss,
            "loss_excess": loss - least,
            "equivalent_flops": ask.flops(
                *ask.cheapest(loss, np.zeros_like(loss))),
            "overhead": needed / budget}
  return _answer(fit, {"factor": factors}, quantities, given)


def on_frontier(fit: result.Fit, params: FloatArray | float,
                tokens: FloatArray | float,
                given: frontier.Given | None = None) -> pd.DataFrame:
  """What models of given N and D cost, against the cheapest of their loss.

  The loss is the law's at N and D. Both costs follow from N and D by
  `fit.cost`, so that no model is cheaper than the cheapest.

  Args:
    fit: of a law in which N and D trade off.
    params, tokens: N and D, one row a pair.
    given: values of further axes of the law.

  Returns:
    params, tokens, then, each with _low and _high: loss; flops;
    optimal_flops, the least that reaches this loss, and optimal_params, the N
    that does; overhead, flops / optimal_flops. Each sample of the bootstrap
    is asked for its own loss at N and D.

  Raises:
    ValueError: an argument is not positive, or the law has no trade-off.
  """
  sizes, read = np.broadcast_arrays(frontier.positive("params", params),
                                    frontier.positive("tokens", tokens))
  def quantities(natural: FloatArray) -> _Quantities:
    ask = _Surface(fit, natural, given)
    loss = ask.loss(sizes, read)
    best, with_tokens = ask.cheapest(loss, np.zeros_like(loss))
    spent, least = ask.flops(sizes, read), ask.flops(best, with_tokens)
    return {"loss": loss, "flops": spent + 0 * loss, "optimal_flops": least,
            "optimal_params": best, "overhead": spent / least}
  return _answer(fit, {"params": sizes, "tokens": read}, quantities, given)


# --- Details -----------------------------------------------------------------


class _Surface:
  """A law at some of its parameters [..., parameters]: [1] or [samples, 1]."""

  def __init__(self, fit: result.Fit, natural: FloatArray,
               given: frontier.Given | None):
    self._law, self._cost, self._given = fit.law, fit.cost, given
    self._natural = natural
    terms = frontier.power_terms(fit.law, given or {})
    self._data_term = terms and terms[1]
    self.flops = fit.cost.flops

  def loss(self, params: FloatArray, tokens: FloatArray) -> FloatArray:
    return frontier.loss_at(self._law, self._natural, self._cost, params,
                            tokens, self._given)

  def tokens(self, params: FloatArray, loss: FloatArray) -> FloatArray:
    """D with which N has the loss; inf where it never has."""
    loss = self._spread(loss)
    if self._data_term is None:
      return np.exp(search.first_below(
          lambda log_tokens: self.loss(params, np.exp(log_tokens)), loss, 0.0,
          np.log(MOST_TOKENS)))
    b, beta = (self._natural[..., self._law.parameters.index(name)]
               for name in self._data_term)
    with np.errstate(invalid="ignore", divide="ignore"):
      left = loss - self.loss(params, np.inf)  # For B / D^beta.
      tokens = (b / left) ** (1 / beta)
    return np.where((left > 0) & (tokens <= MOST_TOKENS), tokens, np.inf)

  def cheapest(self, loss: FloatArray, serving: FloatArray
               ) -> tuple[FloatArray, FloatArray]:
    """N and D of the least kappa N^gamma D + serving N that has the loss; inf
    where none has."""
    loss = self._spread(loss)
    def total(log_params: FloatArray) -> FloatArray:
      params = np.exp(log_params)
      return self.flops(params, self.tokens(params, loss)) + serving * params
    params = np.exp(search.minimise(
        total, np.zeros_like(loss), np.log(MOST_PARAMS)))
    # Not found: too large a model is needed, or even the smallest will do.
    large = self.loss(np.ones_like(loss), MOST_TOKENS) > loss
    found = np.isfinite(params)
    other = np.where(large, np.inf, np.nan)
    tokens = self.tokens(np.where(found, params, 1.0), loss)
    return np.where(found, params, other), np.where(found, tokens, other)

  def _spread(self, values: FloatArray) -> FloatArray:
    """To one value a sample and row."""
    shape = np.broadcast_shapes(values.shape, self._natural.shape[:-1])
    return np.broadcast_to(values, shape)


def _answer(fit: result.Fit, asked: _Quantities,
            quantities: Callable[[FloatArray], _Quantities],
            given: frontier.Given | None) -> pd.DataFrame:
  """The fit's own answer with bands; NaN where the table cannot determine the
  parameters."""
  frontier.method(fit.law, given)
  if fit.cost is None:
    raise ValueError("the fit's table has no params and tokens, so what N and "
                     "D cost is unknown")
  natural = np.array([fit.coefficients[name] for name in fit.law.parameters])
  columns = frontier.with_bands(quantities(natural),
                                quantities(fit.samples[:, None, :]), fit.level)
  if len(fit.samples) and not fit.has_intervals:
    columns = {name: np.full_like(value, np.nan)
               for name, value in columns.items()}
  return pd.DataFrame(dict(asked) | columns)
