# SPDX-License-Identifier: Apache-2.0
"""Published numbers come out of this library: Gadre, Qiu, Step Law, Hoffmann.

Where the studies' tables are absent, small made-up ones test the same code.
"""

import json

import numpy as np
import pandas as pd
import pytest

from tfjax.scaling import published
from tfjax.scaling.published import gadre
from tfjax.scaling.published import hoffmann
from tfjax.scaling.published import step_law
from tfjax.scaling.published import supercollapse

def ours(rows):
  return {row.quantity: row.ours for row in rows}


@pytest.mark.parametrize("study, count", [
    ("gadre_overtraining", 16), ("supercollapse", 24), ("steplaw", 7),
    ("published_constants", 5)])
def test_published_numbers_are_reproduced(study, count, tables):
  rows = published.STUDIES[study](tables(study))
  missed = [f"{r.quantity}: published {r.published}, ours {r.ours} ({r.note})"
            for r in rows if not r.ok]
  assert not missed, "\n".join(missed)
  assert len(rows) == count
  assert {row.study for row in rows} == {study}


# --- Gadre et al. ------------------------------------------------------------


def write_gadre(directory, truth):
  """Every run on the law, and the error of one task that counts."""
  rows = []
  for dataset in ("c4_original", "rpj", "rw_original"):
    for model, n, multiples in (
        ("d=96_l=8_h=4", 1e7, (1, 4, 16, 32)), ("d=512_l=8_h=4", 8e7, (1, 4)),
        ("d=576_l=24_h=8", 1.5e8, (1, 4)), ("d=1024_l=24_h=8", 4e8, (1, 4)),
        ("open_lm_1b", 1.4e9, (1, 32)), ("open_lm_7b", 6.9e9, (1,))):
      for multiple in multiples:
        flops, ratio = 6 * n * n * 20 * multiple, 20 * multiple
        loss = truth["E"] + flops ** -truth["eta"] * (
            truth["a"] * ratio ** truth["eta"]
            + truth["b"] * ratio ** -truth["eta"])
        # What is no part of the recipe is off the law.
        loss *= 1.3 if 1 < multiple < 16 else 1
        rows.append({"train_dataset": dataset, "model": model, "N": n,
                     "D": n * ratio, "cc_mult": multiple, "loss_c4_val": loss,
                     "err_good": 0.85 - 2.2 * np.exp(-0.7 * loss),
                     "err_chance": 0.7, "err_almost": 0.41})
  pd.DataFrame(rows).to_csv(directory / "models_104.csv", index=False)
  pd.DataFrame({"Eval Task": ["good", "chance", "almost", "unused"],
                "Random baseline": [0, 25, 50, 0]}).to_csv(
                    directory / "eval_metadata.csv", index=False)


def test_overtraining_and_errors_of_a_made_up_study(tmp_path):
  truth = {"E": 1.8, "a": 200.0, "b": 350.0, "eta": 0.135}
  write_gadre(tmp_path, truth)
  rows = ours(gadre.reproduce(tmp_path))
  for name, value in truth.items():
    for dataset in ("C4", "RedPajama", "RefinedWeb"):
      assert rows[f"{dataset}: {name}"] == pytest.approx(value, rel=1e-4)
  for quantity in ("1.4B, M = 640: relative error of loss, %",
                   "1.4B, M = 640: relative error of error, %",
                   "6.9B, M = 20: relative error of loss, %",
                   "6.9B, M = 20: relative error of error, %"):
    assert rows[quantity] == pytest.approx(0, abs=0.01)
  runs = gadre.load(tmp_path)
  # 10 points better than 0.5 would be an error below 0.4.
  assert gadre.tasks(runs, pd.read_csv(tmp_path / "eval_metadata.csv")) == [
      "err_good"]
  assert len(gadre.small_runs(runs, "rpj")) == 5
  assert len(gadre.two_step(runs, "rpj", bootstrap=0).task.runs) == 6


def test_the_study_chose_17_tasks(tables):
  directory = tables("gadre_overtraining")
  names = gadre.tasks(pd.read_csv(directory / "models_104.csv"),
                      pd.read_csv(directory / "eval_metadata.csv"))
  assert len(names) == 17
  assert "err_boolq" in names and "err_mmlu" not in names


# --- Supercollapse -----------------------------------------------------------


def write_supercollapse(directory, name, repeat=False):
  """Eight widths of three seeds that differ by a constant factor."""
  runs, points = [], []
  share = np.round(np.linspace(0.01, 1, 100), 2)
  for width in range(1, 9):
    for seed in range(3):
      run, budget = 10 * width + seed, 100.0 * 2**width
      rest = 3 * budget**-0.2 * (1 + 0.01 * (seed - 1))
      runs.append({"run": run, "P": 1000 * width, "seed": seed,
                   "opt_C": budget, "opt_L": 0.5 + rest})
      points.append(pd.DataFrame({
          "run": run, "step": np.arange(1, 101), "compute": budget * share,
          "test_loss": (0.5 + rest * (1 + (1 - share)**2)).round(5)}))
      if seed == 0 and repeat:  # What was measured last, at a later step.
        stale = points[-1][points[-1]["step"] == 30].assign(step=30.5)
        points.append(stale.assign(test_loss=9.0))
  if repeat:
    runs.append(runs[0] | {"run": 99})
    points.append(points[0].assign(run=99))
  pd.DataFrame(runs).to_csv(directory / f"{name}_runs.csv", index=False)
  pd.concat(points).sample(frac=1, random_state=0).to_csv(
      directory / f"{name}_curves.csv", index=False)


def test_collapse_of_a_made_up_study(tmp_path):
  for name in ("mlp", "chess", "c5m"):
    write_supercollapse(tmp_path, name, repeat=name == "mlp")
  made = supercollapse.reproduce(tmp_path)
  rows = ours(made)
  assert rows["chess: exponent of L(C)"] == pytest.approx(0.2, rel=1e-4)
  assert rows["chess: irreducible loss"] == pytest.approx(0.5, rel=1e-4)
  assert rows["c5m: R^2"] == pytest.approx(1, abs=1e-8)
  # Seeds at 0.99, 1 and 1.01 of their mean.
  assert rows["chess: largest noise of seeds"] == pytest.approx(
      0.01 * np.sqrt(2 / 3), rel=1e-3)
  assert rows["c5m: spread across widths at 0.5 C*"] < 1e-4
  assert rows["mlp: spread over noise, largest from 0.5 C* on"] < 0.2
  notes = {row.quantity: row.note for row in made}
  assert notes["mlp: exponent of L(C)"] == "1 of the runs is there twice"
  assert notes["c5m: exponent of L(C)"] == ""


def test_a_stale_point_is_no_point(tmp_path):
  write_supercollapse(tmp_path, "mlp", repeat=True)
  table = supercollapse.load(tmp_path, "mlp")
  assert table["loss"].max() < 9
  assert not table.duplicated(["run", "flops"]).any()


# --- Step Law ----------------------------------------------------------------


def test_best_learning_rates_of_a_made_up_study(tmp_path):
  rows = []
  for n in (2e8, 4e8, 8e8, 4e9):
    for d in (1e10, 4e10, 3e11):
      rate, batch = 1.8 * n**-0.7 * d**0.2, 0.6 * d**0.57 / 2048
      for step, factor in enumerate((0.8, 1.0, 1.25)):
        rows.append({"N": n, "D": d, "lr": rate * factor, "bs": batch * factor,
                     "loss": 1.0, "exp_name": f"{n:g}-{d:g}-{step}",
                     # Within 0.25% of the best on both sides.
                     "smooth loss": 2.0 * (1.002 if step != 1 else 1.0)})
      rows.append({"N": n, "D": d, "lr": 30 * rate, "bs": 9 * batch,
                   "loss": 0.5, "exp_name": "far", "smooth loss": 2.0051})
  pd.DataFrame(rows).to_csv(tmp_path / "dense_lr_bs_loss.csv", index=False)
  made = step_law.reproduce(tmp_path)
  found = ours(made)
  assert found["runs within 0.25% of their cell's best"] == 36
  assert found["learning rate, exponent of N, refitted"] == pytest.approx(-0.7)
  assert found["learning rate, exponent of D, refitted"] == pytest.approx(0.2)
  assert found["batch size, exponent of D, refitted"] == pytest.approx(0.57)
  batch = step_law.fit(step_law.near_best(tmp_path), "batch_size")
  assert batch.coefficients["c"] == pytest.approx(0.6, rel=0.02)  # tokens
  notes = {row.quantity: row.note for row in made}
  assert "does not reach the paper's 0.307 (outside of it)" in notes[
      "learning rate, exponent of D, refitted"]
  assert "0.571 (inside it)" in notes["batch size, exponent of D, refitted"]
  errors = [row.ours for row in made if "standard error" in row.quantity]
  # Three rates about each of 12 optima: by hand, least squares in logs.
  spread = np.std(np.log([0.8, 1.0, 1.25]))
  expected = spread / np.sqrt(36) / np.std(np.log([2e8, 4e8, 8e8, 4e9]))
  assert errors[0] == pytest.approx(expected, rel=0.15)


# --- Hoffmann et al. ---------------------------------------------------------


def test_slopes_and_optimum_of_a_made_up_table(tmp_path):
  flops = np.array([1e18, 1e20, 1e24])
  sizes = 0.1 * flops**0.5
  made_up = {
      "tableA3": {"rows": np.stack(
          [sizes, flops, sizes, 2 * sizes ** (1 / 0.45), sizes], 1).tolist(),
                  "erratum": "none"},
      "table3_approach1": {"rows": np.stack(
          [sizes, 3 * flops, sizes], 1).tolist()},
      # A = B, alpha = beta: N* = D*, the root of C / 6.
      "approach3_unrounded": {"a": 6.0, "b": 6.0, "e": 0.5, "alpha": 0.3,
                              "beta": 0.3}}
  (tmp_path / "hoffmann2022.json").write_text(json.dumps(made_up))
  rows = ours(hoffmann.reproduce(tmp_path))
  assert list(rows.values()) == pytest.approx(
      [0.5, 0.45, 0.5, 0.5, (5.76e23 / 6) ** 0.5])
