# SPDX-License-Identifier: Apache-2.0
"""How fast laws are fitted: tfjax beside scipy and vpnls, for bench.py --fit.

The table is the digitised runs of Hoffmann et al. 2022 (Besiroglu et al. 2024,
arXiv:2404.10102), where it is at hand, and 240 runs of their fitted surface
with as much noise where not. tfjax runs in a new process each time, so that
compilation counts; scipy (L-BFGS-B with analytic gradients, one start after
another, as the study did) and vpnls (its grid, 0.001 apart) have none.
"""

import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any, Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# pylint: disable=wrong-import-position
import numpy as np
import pandas as pd

_TABLE = (ROOT / ".." / "shared" / "refdata" / "epoch_chinchilla"
          / "svg_extracted_data.csv")
_BOOTSTRAP = 4000
_DELTA = 1e-3
# Hoffmann et al. 2022, appendix D.2: logs of E, A, B, and the exponents.
_GRID = {"E": np.exp(np.arange(-1, 1.5, 0.5)), "A": np.exp(np.arange(0, 30, 5)),
         "B": np.exp(np.arange(0, 30, 5)), "alpha": np.arange(0, 2.5, 0.5),
         "beta": np.arange(0, 2.5, 0.5)}


def table() -> pd.DataFrame:
  """Columns params, tokens, loss: 240 rows."""
  if _TABLE.is_file():
    frame = pd.read_csv(_TABLE)
    frame = frame[frame["loss"] < np.sort(frame["loss"])[-5]]
    params = frame["Model Size"]
    return pd.DataFrame({
        "params": params, "tokens": frame["Training FLOP"] / (6 * params),
        "loss": frame["loss"]}).reset_index(drop=True)
  rng = np.random.default_rng(0)
  params, flops = np.exp(rng.uniform(
      np.log([4e7, 6e18]), np.log([1.5e10, 3e21]), size=(240, 2))).T
  tokens = flops / (6 * params)
  loss = 1.817 + 477.8 / params**0.3473 + 2143.4 / tokens**0.3672
  return pd.DataFrame({"params": params, "tokens": tokens, "loss":
                       loss * np.exp(0.005 * rng.standard_normal(240))})


def main(rounds: int) -> dict[str, Any]:
  """Measures all contenders in turn, prints and returns the figures."""
  frame = table()
  print("the digitised runs of the study" if _TABLE.is_file() else
        "made-up runs: the study's table is not at hand")
  contenders: dict[str, Callable[[], dict[str, float]]] = {
      "tfjax": _in_new_process, "scipy": lambda: _scipy(frame)}
  if importlib.util.find_spec("vpnls"):
    contenders["vpnls"] = lambda: _vpnls(frame)
  else:
    print("vpnls is not installed (pip install -e '.[vpnls]'); left out")
  taken: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
  for _ in range(rounds):
    for name, run in contenders.items():
      taken[name].append(run())
  figures = {name: {key: statistics.median(t[key] for t in times)
                    for key in times[0]} for name, times in taken.items()}
  for name, values in figures.items():
    print(f"{name:6} " + ", ".join(f"{k} {v:.6g}" for k, v in values.items()))
  ours, theirs = figures["tfjax"], figures["scipy"]
  both = ours["fit_s"] + ours["bootstrap_s"]
  print(f"4500 starts and {_BOOTSTRAP} resamples: {both:.2f} s with "
        f"compilation; scipy takes {(theirs['fit_s'] + theirs['bootstrap_s']) / both:.1f} "
        "times as long")
  if "vpnls" in figures:
    ratio = figures["vpnls"]["grid_s"] / ours["grid_s"]
    print(f"grid of exponents 0.001 apart: {ours['grid_s']:.3f} s; vpnls takes "
          f"{ratio:.1f} times as long")
  return {"fit": figures}


def _in_new_process() -> dict[str, float]:
  made = subprocess.run(
      [sys.executable, __file__], check=True, capture_output=True, text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"})
  return json.loads(made.stdout.splitlines()[-1])


def _tfjax(frame: pd.DataFrame) -> dict[str, float]:
  start = time.perf_counter()
  from tfjax import scaling
  from tfjax.scaling import laws
  from tfjax.scaling import varpro
  imported = time.perf_counter()
  fit = scaling.fit(frame, delta=_DELTA, starts=_GRID, bootstrap=0)
  fitted = time.perf_counter()
  more = scaling.fit(frame, delta=_DELTA, bootstrap=_BOOTSTRAP,
                     starts={k: [v] for k, v in fit.coefficients.items()})
  resampled = time.perf_counter()
  axes = {"params": frame["params"].to_numpy(),
          "tokens": frame["tokens"].to_numpy()}
  varpro.search(laws.get("chinchilla"), axes, frame["loss"].to_numpy(),
                np.ones(len(frame)), np.arange(1, 1001) / 1000)
  projected = time.perf_counter()
  return {"import_s": imported - start, "fit_s": fitted - imported,
          "bootstrap_s": resampled - fitted, "grid_s": projected - resampled,
          "starts": fit.starts, "objective": fit.objective,
          "stderr_alpha": float(more.samples[:, 3].std())}


def _scipy(frame: pd.DataFrame) -> dict[str, float]:
  from scipy import optimize
  logs = np.log(frame[["params", "tokens", "loss"]].to_numpy(np.float64)).T

  def value(theta: np.ndarray, data: np.ndarray) -> tuple[float, np.ndarray]:
    size, tokens, loss = data
    terms = np.stack([np.full_like(size, theta[0]), theta[1] - theta[3] * size,
                      theta[2] - theta[4] * tokens])
    top = terms.max(axis=0)
    share = np.exp(terms - top)
    total = share.sum(axis=0)
    residual = top + np.log(total) - loss
    share /= total
    pull = np.clip(residual, -_DELTA, _DELTA)
    inside = np.minimum(np.abs(residual), _DELTA)
    weighted = share * pull
    gradient = np.array([*weighted.sum(axis=1), -weighted[1] @ size,
                         -weighted[2] @ tokens])
    return float(np.sum(inside * (np.abs(residual) - inside / 2))), gradient

  def solve(theta: np.ndarray, data: np.ndarray) -> Any:
    # At its own tolerances it stops where it starts: the objective is tiny.
    return optimize.minimize(
        value, theta, (data,), "L-BFGS-B", jac=True,
        options={"maxiter": 5000, "maxfun": 20000, "ftol": 0, "gtol": 1e-9})

  start = time.perf_counter()
  grid = itertools.product(*(np.log(v) if k in "EAB" else v
                             for k, v in _GRID.items()))
  best = min((solve(np.array(theta), logs) for theta in grid),
             key=lambda end: end.fun)
  fitted = time.perf_counter()
  rng = np.random.default_rng(0)
  samples = [solve(best.x, logs[:, rng.integers(0, len(frame), len(frame))]).x
             for _ in range(_BOOTSTRAP)]
  resampled = time.perf_counter()
  return {"fit_s": fitted - start, "bootstrap_s": resampled - fitted,
          "objective": float(best.fun),
          "stderr_alpha": float(np.std(samples, axis=0)[3])}


def _vpnls(frame: pd.DataFrame) -> dict[str, float]:
  from vpnls import api
  start = time.perf_counter()
  found = api.fit_vpnls(
      frame["params"].to_numpy() / 1e6, frame["tokens"].to_numpy() / 1e9,
      frame["loss"].to_numpy().copy(), resolution=0.001)
  return {"grid_s": time.perf_counter() - start, "objective": found.rss}


if __name__ == "__main__":
  print(json.dumps(_tfjax(table())))
