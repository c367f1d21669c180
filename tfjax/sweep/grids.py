# SPDX-License-Identifier: Apache-2.0
"""Sweeps that are computed: from budgets of FLOPs, from tokens a parameter,
and learning rates from widths.

For an experiment's get_sweep: each function takes its config and gives cells,
to be put together with others by `tfjax.sweep.algebra`. Which models there
are, and how large they are, is asked of `tfjax.sweep.sizes`.
"""

import math
from typing import Any, Mapping, Sequence

import ml_collections

from tfjax import config as config_lib
from tfjax.models import families
from tfjax.sweep import algebra
from tfjax.sweep import sizes as sizes_lib
from tfjax.sweep.plan import PlanError

Model = str | Mapping[str, Any]


def isoflop(
    config: ml_collections.ConfigDict,
    budgets: Sequence[float],
    models: Sequence[Model] | None = None,
    *,
    tokens_per_parameter: tuple[float, float] = (2.0, 200.0),
    most_tokens: float | None = None,
    least_steps: int = 100,
    count: str = "params_total",
) -> list[algebra.Overrides]:
  """Models along lines of equal training FLOPs, budget by budget.

  As of Hoffmann et al. 2022 (arXiv:2203.15556), approach 2: a model of N
  parameters that takes f FLOPs a token is trained on D = C / f tokens. A run
  is as many whole steps as reach its budget, so that it costs at most a step
  more, one part in `least_steps`.

  Args:
    config: the experiment's; what duration it has is replaced.
    budgets: training FLOPs C, in the default convention (`tfjax.cost.flops`).
    models: names of sizes, or cells that say a shape; unset: the ladder.
    tokens_per_parameter: least and most D / N of a cell; other cells are left
      out. The optimum by Chinchilla is near 20, and a curve needs both sides.
    most_tokens: D of a cell at most; unset: whatever the budget gives.
    least_steps: that a run must have, or it is left out.
    count: what N counts, one of `tfjax.sweep.sizes.COUNTS`.

  Raises:
    ConfigError: a model is not known, or its tokens follow from the data.
    PlanError: a budget has no cell within these bounds.
    ValueError: a bound or a budget cannot be.
  """
  low, high = tokens_per_parameter
  _check_positive("tokens_per_parameter", low, high)
  _check_positive("budgets", *budgets)
  if low > high:
    raise ValueError(f"tokens_per_parameter={low, high}: the least comes first")
  known = []
  for cell in _cells(config, models):
    size = sizes_lib.measure(config, cell)
    if size.batch_tokens is None:
      raise config_lib.ConfigError(
          "objective.corruption", "pairs differ in length, so that FLOPs a "
          "token follow from the data; give duration.flops cell by cell")
    known.append(size)
    ratio = max(budgets) / size.flops_per_token / _count(size, count)
    if models is None and ratio < low:
      break  # The ladder only goes up, to models that are slow to look at.
  cells = []
  for budget in budgets:
    line = []
    for size in known:
      tokens = budget / size.flops_per_token
      if (low <= tokens / _count(size, count) <= high
          and tokens >= least_steps * size.batch_tokens
          and (most_tokens is None or tokens <= most_tokens)):
        line.append({**size.overrides, **sizes_lib.duration(
            config, "flops", float(budget))})
    if not line:
      raise PlanError([_no_cell(budget, known, count, least_steps,
                                most_tokens)], 0)
    cells += line
  return cells


def tokens_per_parameter(
    config: ml_collections.ConfigDict,
    ratios: Sequence[float],
    models: Sequence[Model] | None = None,
    *,
    count: str = "params_total",
) -> list[algebra.Overrides]:
  """Every model on so many training tokens for each of its parameters.

  Args:
    config: the experiment's; what duration it has is replaced.
    ratios: D / N.
    models: names of sizes, or cells that say a shape; unset: the ladder.
    count: what N counts, one of `tfjax.sweep.sizes.COUNTS`.

  Raises:
    ConfigError: a model is not known.
    ValueError: a ratio cannot be.
  """
  _check_positive("ratios", *ratios)
  cells = []
  for cell in _cells(config, models):
    size = sizes_lib.measure(config, cell)
    for ratio in ratios:
      chosen = (("tokens_per_parameter", float(ratio))
                if count == "params_total" else
                ("tokens", math.ceil(ratio * _count(size, count))))
      cells.append({**cell, **sizes_lib.duration(config, *chosen)})
  return cells


def learning_rates(
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    rate: float,
    *,
    d_model: int,
    exponent: float = -1.0,
) -> list[algebra.Overrides]:
  """The cells, each with the learning rate of its width.

  Under the standard parametrization rate * (width / d_model)^exponent, to six
  digits. Under the others, which carry a rate over to all widths by
  themselves (Yang et al. 2022, arXiv:2203.03466), `rate` as it is.

  Args:
    config: the experiment's.
    rate: the best at the width `d_model`.
    exponent: Yang et al. have -1 for Adam's hidden matrices in the limit of
      wide models; narrow ones are often found to fall less.

  Raises:
    ConfigError: a cell has no width.
    ValueError: a cell sets a learning rate itself, a number cannot be, or
      model.base_d_model is not `d_model`.
  """
  _check_positive("rate and d_model", rate, d_model)
  result = []
  for cell in cells:
    model = sizes_lib.model_of(config, cell)
    value = float(rate)
    if model.parametrization != "standard":
      if model.base_d_model != d_model:
        raise ValueError(
            f"learning_rates: {rate:g} is for the width {d_model}, and of a "
            f"cell model.base_d_model is {model.base_d_model}; give that one")
    else:
      value = algebra.rounded(rate * (model.d_model / d_model) ** exponent)
    result.append(algebra.merged(
        cell, {"optimizer.learning_rate": value}))
  return result


# --- Details -----------------------------------------------------------------


def _cells(config: ml_collections.ConfigDict,
           models: Sequence[Model] | None) -> list[algebra.Overrides]:
  """Models as cells, with a size's shape in place of the config's own."""
  if models is None:
    models = list(families.LADDER)
  if isinstance(models, str) or not models:
    raise ValueError(f"models must be a list of sizes or cells, not {models!r}")
  chosen = {f"model.{name}": None
            for name in ("d_model", "num_layers", "num_heads")
            if config.model[name] is not None}
  return [algebra.checked({**chosen, "model.size": model}
                          if isinstance(model, str) else model)
          for model in models]


def _count(size: sizes_lib.Size, count: str) -> int:
  if count not in sizes_lib.COUNTS:
    raise ValueError(f"count is {count!r}; must be one of "
                     f"{', '.join(sizes_lib.COUNTS)}")
  return size.params[count]


def _check_positive(name: str, *values: float) -> None:
  for value in values:
    if not 0 < value < math.inf:
      raise ValueError(f"{name}: {value!r} is not a number above 0")


def _no_cell(budget: float, known: Sequence[sizes_lib.Size], count: str,
             least_steps: int, most_tokens: float | None) -> str:
  """Why no model suits a budget: what it would come to."""
  def words(size: sizes_lib.Size) -> str:
    tokens = budget / size.flops_per_token
    return (f"{size.params[count]:,} parameters would see {tokens:,.0f} "
            f"tokens, {tokens / size.params[count]:.3g} a parameter, in "
            f"{tokens / size.batch_tokens:,.0f} steps")
  ordered = sorted(known, key=lambda size: size.params[count])
  said = "; ".join(map(words, [ordered[0], *ordered[1:][-1:]]))
  limit = "" if most_tokens is None else f", most_tokens={most_tokens:,.0f}"
  return (f"no model suits the budget of {budget:.3g} FLOPs: {said}; change "
          f"the models, tokens_per_parameter, least_steps={least_steps}{limit} "
          "or the budget")
