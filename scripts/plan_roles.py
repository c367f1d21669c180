# SPDX-License-Identifier: Apache-2.0
"""What a parametrization does to the parameters of a model, as
scripts/plan.py prints it."""

from typing import Sequence

from rich import console as console_lib

import plan_show as show
from tfjax import config as config_lib
from tfjax import sweep
from tfjax.cost import estimates
from tfjax.models import parametrization

_HEADER = ["role", "parameters", "initial std", "learning rate", "epsilon",
           "weight decay", "product"]


def tables(console: console_lib.Console,
           specs: Sequence[sweep.RunSpec]) -> None:
  """A table for each parametrization but standard, of its largest model."""
  largest: dict[str, sweep.RunSpec] = {}
  for spec in sorted(specs, key=lambda one: one.budget.params_total):
    largest[spec.config.model.parametrization] = spec
  for name, spec in largest.items():
    if name != "standard":
      _table(console, spec.config)


def _table(console: console_lib.Console,
           config: config_lib.ExperimentConfig) -> None:
  """A row for all parameters that are treated alike."""
  optimizer = config.optimizer
  model = estimates.with_vocabulary(config).model
  roles: dict[tuple[str, ...], list[str]] = {}
  for row in parametrization.table(model):
    scales = row.scales
    products = [f"{value:.4g}" for value in (row.forward, row.head)
                if value is not None]
    values = (f"{row.init_std:.4g}",
              f"{optimizer.learning_rate * scales.learning_rate:.4g}",
              f"{optimizer.epsilon * scales.epsilon:.4g}",
              f"{optimizer.weight_decay * scales.weight_decay:.4g}",
              ", as head ".join(products))
    roles.setdefault((row.role, *values), []).append(row.name)
  show.table(
      console, f"{model.parametrization}, d_model {model.d_model:,} from "
      f"{model.base_d_model:,}: what each role has",
      _HEADER, [[role, _names(found), *values]
                for (role, *values), found in roles.items()])


def _names(found: Sequence[str]) -> str:
  """The first parameter, and how many there are."""
  return found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "")
