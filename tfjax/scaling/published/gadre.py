# SPDX-License-Identifier: Apache-2.0
"""Gadre et al. 2024, arXiv:2403.08540: over-training, and errors downstream.

Five small runs predict the loss, and with a sixth the mean error on 17 tasks,
of two large ones: 1.4B parameters trained for 32 times as many tokens as is
compute-optimal, and 6.9B.
"""

import pathlib

import pandas as pd

from tfjax import scaling
from tfjax.scaling import downstream
from tfjax.scaling import published

_STUDY = "gadre_overtraining"
_SMALL = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8")
_TASKS_FROM = "d=576_l=24_h=8"  # 0.154B parameters
_ABOVE_CHANCE = 0.10
# Model, multiple of 20 tokens a parameter, name: relative errors in per cent
# of the loss on C4 and of the mean error on 17 tasks, trained on RedPajama.
_TARGETS = {("open_lm_1b", 32, "1.4B, M = 640"): (0.7103, 3.6365),
            ("open_lm_7b", 1, "6.9B, M = 20"): (0.7320, 0.0464)}
# Of the fitted surface by training set: a, b, eta, E.
_SURFACES = {"c4_original": ("C4", (141.3, 189.5, 0.1212, 1.508)),
             "rpj": ("RedPajama", (212.2, 366.7, 0.1364, 1.837)),
             "rw_original": ("RefinedWeb", (157.1, 246.2, 0.1272, 1.734))}
_UNITS = ((0.05, "a"), (0.05, "b"), (5e-5, "eta"), (5e-4, "E"))


def reproduce(directory: pathlib.Path) -> list[published.Row]:
  runs = load(directory)
  rows = []
  for dataset, (name, constants) in _SURFACES.items():
    made = scaling.fit(small_runs(runs, dataset), "overtraining",
                       objective="squares", space="linear", bootstrap=0)
    rows += [published.Row(_STUDY, f"{name}: {parameter}", theirs,
                           made.coefficients[parameter], unit, False)
             for theirs, (unit, parameter) in zip(constants, _UNITS)]
  chain = two_step(runs, "rpj", bootstrap=0)
  for (model, multiple, name), (of_loss, of_error) in _TARGETS.items():
    run, = runs[(runs["train_dataset"] == "rpj") & (runs["model"] == model)
                & (runs["cc_mult"] == multiple)].itertuples()
    point = dict(flops=6 * run.params * run.tokens,
                 tokens_per_parameter=run.tokens / run.params)
    for what, theirs, predicted, measured in (
        ("loss", of_loss, chain.loss.predict(**point), run.loss),
        ("error", of_error, chain.predict(**point), run.error)):
      rows.append(published.Row(
          _STUDY, f"{name}: relative error of {what}, %", theirs,
          100 * abs(float(predicted) / measured - 1), 0.01, False))
  return rows


def load(directory: pathlib.Path) -> pd.DataFrame:
  """All runs: params, tokens, loss (on C4's validation set), error (mean of
  the 17 tasks), and the study's train_dataset, model and cc_mult."""
  runs = pd.read_csv(directory / "models_104.csv").rename(
      columns={"N": "params", "D": "tokens", "loss_c4_val": "loss"})
  chosen = tasks(runs, pd.read_csv(directory / "eval_metadata.csv"))
  return runs.assign(error=runs[chosen].mean(axis=1))


def tasks(runs: pd.DataFrame, metadata: pd.DataFrame) -> list[str]:
  """Columns of tasks on which a model of 0.154B parameters, however long it
  was trained and on what, is 10 points better than chance."""
  chance = metadata.set_index("Eval Task")["Random baseline"] / 100
  models = runs[runs["model"] == _TASKS_FROM]
  return [name for name in runs if name.startswith("err_") and (
      models[name] < 1 - chance[name.removeprefix("err_")] - _ABOVE_CHANCE
  ).any()]


def small_runs(runs: pd.DataFrame, dataset: str) -> pd.DataFrame:
  """The five runs of the fit: four sizes at 20 tokens a parameter, and the
  smallest at 320."""
  optimal = runs["model"].isin(_SMALL) & (runs["cc_mult"] == 1)
  longer = (runs["model"] == _SMALL[0]) & (runs["cc_mult"] == 16)
  return runs[(runs["train_dataset"] == dataset) & (optimal | longer)]


def two_step(runs: pd.DataFrame, dataset: str, *, bootstrap: int
             ) -> downstream.TwoStep:
  """Loss from the five runs, error from them and 1.4B at M = 20."""
  five = small_runs(runs, dataset)
  sixth = runs[(runs["train_dataset"] == dataset)
               & (runs["model"] == "open_lm_1b") & (runs["cc_mult"] == 1)]
  return downstream.TwoStep(
      scaling.fit(five, "overtraining", objective="squares", space="linear",
                  bootstrap=bootstrap),
      scaling.fit(pd.concat([five, sixth]), "downstream_error",
                  objective="squares", space="linear", bootstrap=bootstrap))
