# SPDX-License-Identifier: Apache-2.0
"""Curves collapse onto one where they should, and give rows for fits."""

import json
import math
import pathlib

import numpy as np
import pandas as pd
import pytest

from tfjax import scaling
from tfjax import train
from tfjax.scaling import curves
from tfjax.scaling import table

_SHARES = np.linspace(0.01, 1, 100)


def shape(x):
  """What all curves of `ladder` have in common; 1 at the end."""
  return 1 + 3 * (1 - x) ** 2


def ladder(sizes=(1e6, 2e6, 4e6, 8e6, 16e6), seeds=1, noise=0.0):
  """Runs whose loss is 1.5 + 40 C^-0.25 at the end and `shape` before."""
  rng = np.random.default_rng(0)
  parts = []
  for size in sizes:
    budget = 120 * size**2
    for seed in range(seeds):
      rest = 40 * budget**-0.25 * (1 + noise * rng.standard_normal())
      parts.append(pd.DataFrame({
          "run": f"n{size:g}-{seed}", "params": size, "seed": seed,
          "flops": budget * _SHARES, "loss": 1.5 + rest * shape(_SHARES)}))
  return pd.concat(parts, ignore_index=True)


# --- Collapse ----------------------------------------------------------------


def test_curves_of_one_shape_collapse_onto_it():
  made = curves.collapse(ladder(), bootstrap=0)
  assert made.irreducible == pytest.approx(1.5, rel=1e-6)
  assert made.fit.coefficients["alpha"] == pytest.approx(0.25, rel=1e-5)
  one = made.normalised[made.normalised["run"] == "n4e+06-0"]
  assert list(one["x"]) == list(curves.GRID)
  # Between points a hundredth apart, linear: off by 3 * 0.005^2 at most.
  np.testing.assert_allclose(one["value"], shape(curves.GRID), atol=8e-5)
  assert one["value"].iloc[-1] == pytest.approx(1.0, abs=1e-12)
  assert (made.spread["spread"] < 1e-6).all()
  assert made.spread["noise"].isna().all()  # One seed a size.
  assert not made.excluded


def test_spread_and_noise_by_hand():
  # L - 1 at half of C* and at the end, of two seeds a size.
  rests = {("a", 1): (4, 2), ("b", 1): (6, 3), ("c", 2): (6, 2),
           ("d", 2): (10, 2)}
  frame = pd.DataFrame([
      {"run": run, "width": width, "flops": 10.0 * width * share,
       "loss": 1.0 + rest}
      for (run, width), rest in rests.items()
      for share, rest in zip((0.5, 1.0), rest)])
  made = curves.collapse(frame, size="width", irreducible=1.0,
                         grid=np.array([0.5, 0.75, 1.0]))
  assert made.fit is None
  assert list(made.normalised["value"]) == [
      2, 1.5, 1, 2, 1.5, 1, 3, 2, 1, 5, 3, 1]
  half = made.at(0.5)
  # Sizes' means are 2 and 4: 1 over 3. Runs: 2, 2, 3, 5.
  assert half["spread"] == pytest.approx(1 / 3)
  assert half["pooled"] == pytest.approx(math.sqrt(6 / 4) / 3)
  # Seeds before they are normalised: 4 and 6, 6 and 10: 1 over 5, 2 over 8.
  assert half["noise"] == pytest.approx((1 / 5 + 2 / 8) / 2)
  assert made.at(1.0)["spread"] == 0
  assert made.at(0.6)["x"] == 0.75  # The first from there on.
  with pytest.raises(ValueError, match="at most 1"):
    made.at(1.1)


def test_noise_is_of_seeds_and_a_wrong_budget_shows_as_spread():
  made = curves.collapse(ladder(seeds=4, noise=0.01), irreducible=1.5)
  assert made.spread["noise"].between(0.005, 0.015).all()
  assert (made.spread["spread"] < 1e-6).all()
  off = ladder(seeds=4, noise=0.01)
  # The largest stops at half of what the others' shape says.
  largest = off["params"] == 16e6
  off = off[~largest | (off["flops"] <= 0.5 * off["flops"].max())]
  made = curves.collapse(off, irreducible=1.5)
  assert (made.at(0.25)["spread"] > 2 * made.at(0.25)["noise"])


def test_end_points_are_means_of_seeds():
  ends = curves.end_points(ladder(sizes=(1e6, 2e6), seeds=3, noise=0.01))
  assert list(ends["runs"]) == [3, 3]
  assert list(ends["flops"]) == [120e12, 480e12]
  alone = [curves.end_points(ladder(sizes=(1e6, 2e6), seeds=3, noise=0.01)
                             .query(f"seed == {seed}")) for seed in range(3)]
  assert ends["loss"][0] == pytest.approx(
      np.mean([one["loss"][0] for one in alone]))


@pytest.mark.parametrize("change, reason", [
    (lambda t: t.assign(loss=t["loss"].where(t.index != 50, np.nan)),
     "a loss is nan"),
    (lambda t: t.assign(loss=t["loss"].where(t.index != 50, -1.0)),
     "a loss is -1"),
    (lambda t: t.assign(flops=t["flops"].where(t.index != 50, t["flops"][51])),
     "two points at"),
    (lambda t: t.assign(flops=t["flops"].where(t.index != 50, np.inf)),
     "must be finite"),
    (lambda t: t[10:], "its first point is at 0.11"),
    (lambda t: t.assign(status="diverged"), "diverged"),
    (lambda t: t.assign(params=np.where(t.index < 50, 1e6, 2e6)),
     "its params is not one number"),
])
def test_a_curve_that_cannot_be_used_is_left_out(change, reason):
  frame = ladder(sizes=(1e6, 2e6), seeds=2, noise=0.01).assign(
      status="complete")
  bad = change(frame[:100])
  made = curves.collapse(pd.concat([bad, frame[100:]]), irreducible=1.5)
  left, = made.excluded
  assert left.run == "n1e+06-0" and reason in left.reason
  whole = curves.collapse(frame[100:], irreducible=1.5)
  pd.testing.assert_frame_equal(made.spread, whole.spread)


def test_a_repeated_curve_counts_once():
  frame = ladder(sizes=(1e6, 2e6), seeds=2, noise=0.01)
  again = frame[:100].assign(run="copy")
  made = curves.collapse(pd.concat([frame, again]), irreducible=1.5)
  assert [(e.run, e.reason) for e in made.excluded] == [
      ("copy", "repeats run n1e+06-0")]


@pytest.mark.parametrize("frame, options, problem", [
    (ladder(), {"irreducible": 1.7}, "below every loss"),
    (ladder(), {"irreducible": -0.1}, "at least 0"),
    (ladder(), {"grid": np.array([0.5, 0.2])}, "grid must increase"),
    (ladder(), {"grid": np.array([0.0, 1.0])}, "grid must increase"),
    (ladder(), {"size": "width"}, "needs a column 'width'"),
    (ladder(sizes=(1e6,)), {"irreducible": 1.5}, "two sizes or more"),
    (ladder(sizes=(1e6, 2e6, 4e6)), {}, "3 sizes do not determine"),
    (ladder().assign(params=1e6), {}, "end at different compute"),
    (ladder()[:0], {}, "two sizes or more"),
])
def test_what_cannot_collapse_is_refused(frame, options, problem):
  with pytest.raises((ValueError, table.TableError), match=problem):
    curves.collapse(frame, **options)


# --- Run directories ---------------------------------------------------------


def write_curve(write_run, directory, params, tokens, truth, *, points=12,
                schedule="constant", warmup=5, level=1.0, **changes):
  """A run of 60 steps that was evaluated every few."""
  write_run(directory, params, tokens, None, **changes)
  share = np.arange(1, points + 1) / points
  loss = level * (truth["E"] + truth["A"] / params**truth["alpha"]
                  + truth["B"] / (tokens * share)**truth["beta"])
  with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.writelines(json.dumps({
        "kind": "evaluation", "step": round(60 * x), "tokens": tokens * x,
        "flops": 6.0 * params * tokens * x, "loss": y}) + "\n"
                    for x, y in zip(share, loss))
  (directory / "config.json").write_text(json.dumps({"optimizer": {
      "schedule": schedule, "warmup_steps": warmup, "warmup_fraction": 0.1}}))


def test_curves_of_run_directories(tmp_path, write_run, truth):
  write_curve(write_run, tmp_path / "a", 1000, 60000, truth,
              unique_tokens=20000)
  write_curve(write_run, tmp_path / "b", 2000, 60000, truth, warmup=None,
              unique_tokens=None)
  frame = curves.of_runs(tmp_path)
  a, b = frame[frame["run"] == "a"], frame[frame["run"] == "b"]
  assert list(a["step"]) == list(range(5, 61, 5))
  assert a["tokens"].iloc[0] == 5000 and a["params"].iloc[0] == 1000
  assert a["flops"].iloc[-1] == 6.0 * 1000 * 60000
  assert list(a["unique_tokens"][:5]) == [5000, 10000, 15000, 20000, 20000]
  assert b["unique_tokens"].isna().all()
  assert set(a["warmup_steps"]) == {5} and set(b["warmup_steps"]) == {6}
  assert set(frame["schedule"]) == {"constant"}
  assert set(frame["tokenizer"]) == {"bpe-1024"}
  rows = curves.of_runs(tmp_path, kind="train")
  assert len(rows) == 120
  with pytest.raises(ValueError, match="evaluation or train"):
    curves.of_runs(tmp_path, kind="eval")


def test_a_directory_without_runs_is_an_empty_table(tmp_path):
  frame = curves.of_runs(tmp_path)
  assert not len(frame) and "warmup_steps" in frame
  with pytest.raises(table.TableError, match="no run has a curve"):
    curves.fit(frame)


def test_run_directories_collapse(tmp_path, write_run):
  for size in (1e5, 2e5, 4e5, 8e5):
    for seed in (0, 1):
      tokens = 20 * size
      write_run(tmp_path / f"n{size:g}-{seed}", int(size), int(tokens), 2.0,
                seed=seed)
      budget = 6 * size * tokens
      rest = 40 * budget**-0.1 * (1 + 0.01 * seed)
      (tmp_path / f"n{size:g}-{seed}" / "metrics.jsonl").write_text("".join(
          json.dumps({"kind": "evaluation", "step": k, "tokens": tokens * x,
                      "flops": budget * x, "loss": 1.5 + rest * shape(x)})
          + "\n" for k, x in enumerate(_SHARES, start=1)))
  made = curves.collapse(curves.of_runs(tmp_path), bootstrap=0)
  assert made.irreducible == pytest.approx(1.5, rel=1e-5)
  assert (made.spread["spread"] < 1e-4).all()
  # Two seeds 1% apart: half of it, over their mean.
  np.testing.assert_allclose(made.spread["noise"], 0.005 / 1.005, rtol=1e-3)


# --- Whole curves in fits ----------------------------------------------------


def test_points_after_the_warmup_are_rows(tmp_path, write_run, truth):
  write_curve(write_run, tmp_path / "a", 1000, 60000, truth, warmup=10)
  rows, refused = curves.prefixes(curves.of_runs(tmp_path))
  assert not refused
  assert list(rows["step"]) == list(range(15, 61, 5))
  assert list(rows["run_id"][:2]) == ["a@15", "a@20"]


@pytest.mark.parametrize("changes, reason", [
    (dict(schedule="cosine"), "its learning rate decays"),
    (dict(schedule="linear"), "'linear'"),
    (dict(schedule="wsd"), "not the result of a shorter run"),
    (dict(schedule=None), "its learning-rate schedule is unknown"),
    (dict(warmup=None, steps=None), "its steps of warmup are unknown"),
    (dict(warmup=60), "no point after its warmup"),
    (dict(status="diverged"), "diverged"),
    (dict(status="interrupted"), "interrupted"),
])
def test_other_runs_are_refused(tmp_path, write_run, truth, changes, reason):
  write_curve(write_run, tmp_path / "good", 1000, 60000, truth)
  write_curve(write_run, tmp_path / "odd", 2000, 60000, truth, **changes)
  rows, refused = curves.prefixes(curves.of_runs(tmp_path))
  assert set(rows["run"]) == {"good"}
  left, = refused
  assert left.run == "odd" and reason in left.reason


def test_without_a_constant_rate_there_is_nothing_to_fit(
    tmp_path, write_run, truth):
  write_curve(write_run, tmp_path / "a", 1000, 60000, truth, schedule="cosine")
  with pytest.raises(table.TableError, match="no run has a curve.*\n.*decays"):
    curves.fit(curves.of_runs(tmp_path))
  with pytest.raises(table.TableError, match="needs a column 'schedule'"):
    curves.prefixes(curves.of_runs(tmp_path).drop(columns="schedule"))


def test_few_runs_determine_a_law_by_their_curves(tmp_path, write_run, truth):
  for n in np.geomspace(3e4, 1e6, 5):
    write_curve(write_run, tmp_path / f"n{n:.0f}", int(n), 4_000_000, truth)
  write_curve(write_run, tmp_path / "decayed", 50000, 4_000_000, truth,
              schedule="cosine", level=0.9)
  made = curves.fit(curves.of_runs(tmp_path), bootstrap=100)
  for name, value in truth.items():
    assert made.coefficients[name] == pytest.approx(value, rel=1e-4), name
  assert len(made.runs) == 5 * 11
  assert [e.run for e in made.excluded] == ["decayed"]
  # End points alone cannot: they have one D.
  frame = curves.of_runs(tmp_path).groupby("run").tail(1)
  ends = scaling.fit(frame[frame["schedule"] == "constant"].assign(
      run_id=lambda t: t["run"]), bootstrap=0)
  assert ends.status == "not_identifiable"


def test_points_of_one_run_are_drawn_together(tmp_path, write_run, truth):
  rng = np.random.default_rng(3)
  for n in np.geomspace(3e4, 1e6, 8):
    write_curve(write_run, tmp_path / f"n{n:.0f}", int(n), 4_000_000, truth,
                level=float(np.exp(0.01 * rng.standard_normal())))
  frame = curves.of_runs(tmp_path)
  made = curves.fit(frame, bootstrap=200)
  alone = scaling.fit(curves.prefixes(frame)[0], bootstrap=200)
  at = made.law.parameters.index("alpha")
  # Errors are the runs': 88 independent points would know much more.
  assert made.samples[:, at].std() > 1.5 * alone.samples[:, at].std()


def test_a_prefix_of_a_constant_run_is_a_shorter_run(
    make_config, tmp_path: pathlib.Path) -> None:
  """The claim itself, on the trainer; and its own config tells the schedule."""
  short, long, decayed = (
      train.run(make_config({
          "duration.steps": steps, "optimizer.schedule": schedule,
          "optimizer.warmup_steps": 2, "evaluation.every_steps": 4}),
          tmp_path / str(index))
      for index, (steps, schedule) in enumerate([
          (4, "constant"), (8, "constant"), (8, "cosine")]))
  frame = curves.of_runs(tmp_path)
  losses = frame[frame["step"] == 4].set_index("run")["loss"]
  assert losses[long.run_id] == short.loss  # Bitwise.
  assert losses[decayed.run_id] != short.loss
  rows, refused = curves.prefixes(frame)
  assert set(rows["run"]) == {short.run_id, long.run_id}
  assert [e.run for e in refused] == [decayed.run_id]
  assert set(rows["warmup_steps"]) == {2}
