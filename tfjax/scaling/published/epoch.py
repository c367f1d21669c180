# SPDX-License-Identifier: Apache-2.0
"""Besiroglu et al. 2024 (Epoch AI), arXiv:2404.10102: Chinchilla replicated.

The table is svg_extracted_data.csv: 245 points read off figure 4 of Hoffmann
et al. 2022. Columns used: "Model Size" is N, "Training FLOP" is C, loss is in
nats a token; D = C / (6 N). The study drops the five largest losses, 240 are
left. Fits are of the chinchilla law with the sum of Huber's losses of log
residuals; its grid of starts is Hoffmann et al. 2022, appendix D.2.
"""

import pathlib

import numpy as np
import pandas as pd

from tfjax import scaling
from tfjax.scaling import published
from tfjax.scaling import result

STUDY = "epoch_chinchilla"
# Hoffmann et al. 2022, appendix D.2: 6 x 6 x 5 x 5 x 5 = 4500 starts.
GRID: dict[str, tuple[float, ...]] = {
    "E": tuple(np.exp([-1.0, -0.5, 0.0, 0.5, 1.0])),
    "A": tuple(np.exp(np.arange(0.0, 30.0, 5.0))),
    "B": tuple(np.exp(np.arange(0.0, 30.0, 5.0))),
    "alpha": (0.0, 0.5, 1.0, 1.5, 2.0),
    "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
}
_DROPPED = 5  # largest losses that the study leaves out
_BOOTSTRAPS = 4000
_LARGEST_FLOPS = 1e21  # of the linear-space fit
_PARAMS_UNIT, _TOKENS_UNIT = 1e6, 1e9  # of the linear-space fit's A and B


def load(directory: pathlib.Path) -> pd.DataFrame:
  """All 245 points: params, tokens, flops, loss, in the file's order."""
  frame = pd.read_csv(directory / "svg_extracted_data.csv").rename(
      columns={"Model Size": "params", "Training FLOP": "flops"})
  frame["tokens"] = frame["flops"] / (6 * frame["params"])
  return frame[["params", "tokens", "flops", "loss"]]


def kept(frame: pd.DataFrame) -> pd.DataFrame:
  """The points that the study fits: without its five largest losses."""
  limit = np.sort(frame["loss"])[-_DROPPED]
  return frame[frame["loss"] < limit].reset_index(drop=True)


def resamples(rows: int, count: int = _BOOTSTRAPS) -> np.ndarray:
  """[count, rows] row indices as the study's notebook draws them: seed 42,
  then one `numpy.random.choice(indices, rows)` a resample."""
  generator = np.random.RandomState(42)
  return np.stack([generator.choice(rows, rows) for _ in range(count)])


def reproduce(directory: pathlib.Path) -> list[published.Row]:
  """Optimum, bootstraps, least absolute deviations, all points, linear."""
  everything = load(directory)
  frame = kept(everything)
  fit = scaling.fit(frame, delta=1e-3, starts=GRID,
                    resamples=resamples(len(frame)))
  return (_optimum(fit) + _bootstraps(fit) + _absolute(frame)
          + _all_points(everything) + _linear(frame))


def _optimum(fit: result.Fit) -> list[published.Row]:
  what = "Huber 1e-3"
  # One unit of the last digit that the target is written with.
  objective = published.Row(
      STUDY, f"{what}, objective", 0.001018274018, fit.objective, 1e-12, False,
      f"{fit.share_at_best:.0%} of {fit.starts} starts end there",
      at_most=True)
  return [objective, *published.compare(
      STUDY, what, {"A": 477.826, "B": 2143.417, "E": 1.817218,
                    "alpha": 0.3473105, "beta": 0.3671724},
      fit.coefficients, 1e-4)]


def _bootstraps(fit: result.Fit) -> list[published.Row]:
  errors = dict(zip(fit.law.parameters, fit.samples.std(axis=0)))
  samples = dict(zip(fit.law.parameters, fit.samples.T))
  share = samples["beta"] / (samples["alpha"] + samples["beta"])
  low, high = np.percentile(share, [2.5, 97.5])
  note = f"{len(fit.samples)} resamples, seed 42"
  return published.compare(
      STUDY, "bootstrap, standard error",
      {"A": 124.52, "B": 1293.28, "E": 0.02566, "alpha": 0.01540,
       "beta": 0.02060}, errors, 0.03, note=note) + published.compare(
           STUDY, "bootstrap, N* ~ C^a",
           {"mean a": 0.5165, "a at 2.5%": 0.481, "a at 97.5%": 0.556},
           {"mean a": share.mean(), "a at 2.5%": low, "a at 97.5%": high},
           1e-3, relative=False, note=note)


def _absolute(frame: pd.DataFrame) -> list[published.Row]:
  """The printed estimate: its notebook's Huber delta shrinks to e^-12."""
  narrow = scaling.fit(frame, delta=1e-7, bootstrap=0)
  absolute = scaling.fit(frame, objective="absolute", bootstrap=0)
  return published.compare(
      STUDY, "Huber 1e-7",
      {"A": 481.999, "B": 2085.393, "E": 1.816862, "alpha": 0.347812,
       "beta": 0.365853}, narrow.coefficients, 1e-3) + published.compare(
           STUDY, "least absolute deviations",
           {"A": 482.01, "B": 2085.43, "E": 1.8169, "alpha": 0.3478,
            "beta": 0.3659}, absolute.coefficients, 1e-3,
           note="as the paper prints it")


def _all_points(frame: pd.DataFrame) -> list[published.Row]:
  fit = scaling.fit(frame, delta=1e-3, bootstrap=0)
  return published.compare(
      STUDY, "all 245 points",
      {"A": 495.73, "B": 12845.6, "E": 1.89134, "alpha": 0.34931,
       "beta": 0.45305, "objective": 0.00182601}, _with_objective(fit), 1e-4,
      note="an independent fit; the paper has none")


def _linear(frame: pd.DataFrame) -> list[published.Row]:
  small = frame[frame["flops"] < _LARGEST_FLOPS]
  fit = scaling.fit(small, objective="squares", space="linear", bootstrap=0)
  found = _with_objective(fit)
  found["A"] /= _PARAMS_UNIT ** found["alpha"]
  found["B"] /= _TOKENS_UNIT ** found["beta"]
  return published.compare(
      STUDY, "least squares of loss, C < 1e21",
      {"E": 1.9051, "A": 4.0005, "B": 1.0509, "alpha": 0.3511, "beta": 0.4587,
       "objective": 0.062414}, found, 2e-4,
      note=f"{len(small)} points; N in millions, D in billions; from vpnls "
           "and apple/ml-scalefit")


def _with_objective(fit: result.Fit) -> dict[str, float]:
  return fit.coefficients | {"objective": fit.objective}
