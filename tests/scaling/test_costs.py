# SPDX-License-Identifier: Apache-2.0
"""What runs have cost, worked out by hand."""

import dataclasses
import html
import json
import math
import pathlib
import re
from typing import Any

from matplotlib import colors
import numpy as np
import pandas as pd
import pytest

from tfjax import scaling
from tfjax.scaling import cost_section
from tfjax.scaling import costs
from tfjax.scaling import frontier
from tfjax.scaling import laws
from tfjax.scaling import plots
from tfjax.scaling import records
from tfjax.scaling import report
from tfjax.scaling.figures import cost as figures_cost

# Of a run of an hour, as scripts/plan.py has forecast it.
_PLANNED = {"params_total": 50000, "tokens": 300000, "flops": 2e12,
            "seconds": 1800, "device_seconds": 3600, "price_usd": 1.5,
            "energy_kwh": 0.25, "co2e_kg": 0.06}


def forecast(workdir: pathlib.Path, runs: list[Any], **changes: Any
             ) -> pathlib.Path:
  content = {"created": "2025-01-01T00:00:00+00:00", "basis": "a short timing",
             "hardware": "a-chip", "workers": 2,
             "total": {"runs": len(runs), "hours": 1.5}, "runs": runs}
  path = workdir / costs.FORECAST
  path.write_text(json.dumps(content | changes))
  return path


def plain(text: str) -> str:
  """The report's words: no markup, no pictures."""
  return html.unescape(re.sub("<[^>]*>", "|", text))


# --- Sums --------------------------------------------------------------------


def test_units(tmp_path, write_run, paid):
  write_run(tmp_path / "new", 50000, 300000, 3.0, flops_total=2e12, **paid)
  write_run(tmp_path / "old", 50000, 300000, 3.0, device_seconds=900)
  write_run(tmp_path / "dead", 50000, 300000, None, status="failed",
            device_seconds=None, flops_total=None)
  made = costs.spent(scaling.load(tmp_path)).set_index("run")
  assert made.loc["new", list(costs.QUANTITIES)].tolist() == [
      2e12, 1.0, 2.0, 3.0, 0.5, 0.12]
  # Inside training steps, as there is nothing else; and it says so.
  assert made["device_hours"]["old"] == 0.25
  assert made["occupied"].to_dict() == {
      "new": True, "old": False, "dead": False}
  assert made.loc["dead", list(costs.QUANTITIES)].isna().all()
  total = costs.Total.of(made["device_hours"])
  assert total == costs.Total(2.25, 2, 1)
  assert math.isnan(costs.Total.of(made["price_usd"][["old"]]).value)


def test_where_the_time_went(tmp_path, write_run, paid):
  write_run(tmp_path / "hour", 50000, 300000, 3.0, **paid)
  write_run(tmp_path / "half", 50000, 300000, 3.0, **paid | {
      "wall_seconds": 1800.0, "step_seconds": 720.0})
  write_run(tmp_path / "old", 50000, 300000, 3.0, compile_seconds=5.0)
  parts = costs.time_parts(scaling.load(tmp_path)).set_index("part")
  assert parts["hours"].to_dict() == pytest.approx({
      "startup": 240 / 3600, "compile": 0.1, "input": 120 / 3600,
      "step": 0.9, "evaluation": 480 / 3600, "checkpoint": 0.05, "lost": 0.05,
      "other": 600 / 3600})
  assert parts["share"].sum() == pytest.approx(1)
  assert parts.loc["step", ["share", "least", "most", "runs"]].tolist() == (
      pytest.approx([3240 / 5400, 0.4, 0.7, 2]))


def test_old_records_have_no_parts(write_ledger):
  frame = scaling.load(write_ledger(sizes=(30000,), tokens=(200000,)))
  assert not len(costs.time_parts(frame))


# --- Forecasts ---------------------------------------------------------------


def test_predicted_and_spent(tmp_path, write_run, paid):
  write_run(tmp_path / "both", 50000, 300000, 3.0, flops_total=2e12, **paid)
  write_run(tmp_path / "more", 50000, 300000, 3.0, flops_total=1e12, **paid)
  forecast(tmp_path, [_PLANNED | {"run_id": "both"},
                      _PLANNED | {"run_id": "never", "co2e_kg": None}])
  planned = costs.read_forecast(tmp_path)
  assert (planned.basis, planned.workers, planned.hours) == (
      "a short timing", 2, 1.5)
  made = costs.compare(costs.spent(scaling.load(tmp_path)), planned
                       ).set_index("run")
  assert list(made.index) == ["both", "more", "never"]
  assert made["planned"].to_dict() == {
      "both": True, "more": False, "never": True}
  assert made["status"].to_dict() == {
      "both": "complete", "more": "complete", "never": None}
  both = made.loc["both"]
  assert [both[f"{q}_predicted"] for q in costs.QUANTITIES] == [
      2e12, 0.5, 1.0, 1.5, 0.25, 0.06]
  assert [both[f"{q}_ratio"] for q in costs.QUANTITIES] == [1, 2, 2, 2, 2, 2]
  assert made["price_usd_spent"]["more"] == 3.0
  assert made["price_usd_predicted"]["never"] == 1.5
  assert made[["price_usd_ratio", "co2e_kg_predicted"]].isna().to_dict(
      "index")["never"] == {"price_usd_ratio": True, "co2e_kg_predicted": True}


def test_a_run_with_two_records_has_cost_both(tmp_path, write_run, paid):
  for name in ("a", "b"):
    write_run(tmp_path / name, 50000, 300000, 3.0, run_id="twice",
              status={"a": "failed", "b": "complete"}[name], **paid)
  forecast(tmp_path, [_PLANNED | {"run_id": "twice"}])
  made = costs.compare(costs.spent(scaling.load(tmp_path)),
                       costs.read_forecast(tmp_path))
  assert made["price_usd_spent"].tolist() == [6.0]
  assert made["status"].tolist() == ["failed, complete"]


def test_no_forecast(tmp_path):
  assert costs.read_forecast(tmp_path) is None


def test_a_forecast_of_nothing_predicts_no_ratio(tmp_path, write_run, paid):
  write_run(tmp_path / "run", 50000, 300000, 3.0, **paid)
  forecast(tmp_path, [_PLANNED | {"run_id": "run", "price_usd": 0}])
  made = costs.compare(costs.spent(scaling.load(tmp_path)),
                       costs.read_forecast(tmp_path))
  assert math.isnan(made["price_usd_ratio"][0])


_ROW = _PLANNED | {"run_id": "a"}


@pytest.mark.parametrize("text, problem", [
    ('{"runs": [', "not valid JSON"), ("[]", "must be a JSON object"),
    ("{}", "'runs' must be a list"), ('{"runs": [1]}', "'runs' must be a list"),
    ('{"runs": [{}]}', r"'runs\[0\].run_id' must be a run's name, not None"),
    ({"runs": [_ROW, _ROW]}, "holds 'a' more than once"),
    ({"runs": [_ROW | {"flops": "2e12"}]}, r"'runs\[0\].flops' must be a num"),
    ({"runs": [_ROW, _ROW | {"run_id": "b", "energy_kwh": -1}]},
     r"'runs\[1\].energy_kwh' must be finite and at least 0"),
    ({"runs": [_ROW | {"seconds": math.inf}]}, r"runs\[0\].seconds"),
    ({"runs": [], "total": 3}, "'total' must be an object"),
    ({"runs": [], "total": {"hours": -1}}, "'total.hours' must be finite"),
    ({"runs": [], "workers": 0}, "'workers' must be finite and at least 1"),
    ({"runs": [], "basis": 3}, "'basis' must be text or null")])
def test_a_damaged_forecast_names_its_file_and_field(
    tmp_path, write_run, text, problem):
  write_run(tmp_path / "run", 50000, 300000, 3.0)
  path = tmp_path / costs.FORECAST
  path.write_text(text if isinstance(text, str) else json.dumps(text))
  with pytest.raises(scaling.RecordError, match=problem) as error:
    report.write(tmp_path)
  assert str(path) in str(error.value)


# --- The frontier ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Known:
  """What is asked of a fit: L = 1 + 10 / N^0.5 + 10 / D^0.5, C = 6 N D."""

  samples: np.ndarray = dataclasses.field(
      default_factory=lambda: np.array([[1.0, 10.0, 10.0, 0.5, 0.5]] * 9))
  law: Any = laws.get("chinchilla")
  cost: Any = frontier.CONVENTION
  has_intervals: bool = True
  level: float = 0.9

  @property
  def coefficients(self) -> dict[str, float]:
    return dict(zip(self.law.parameters, (1.0, 10.0, 10.0, 0.5, 0.5)))


@pytest.fixture(name="rows", params=["alone", "branched", "unknown"])
def rows_fixture(request) -> pd.DataFrame:
  """A run of 4e6 parameters and 2.5e5 tokens, which cost 6.6e12 FLOPs (more
  than 6 N D), and one on the frontier. Of a branch that did half of its way
  itself, for half of the cost, everything is the same; and where it is unknown
  what its trunk took for the other half."""
  runs = pd.DataFrame({"run": ["large", "best"], "params": [4e6, 1e6],
                       "tokens": [2.5e5, 1e6], "flops": [6.6e12, 6e12],
                       "loss": [1.03, 1.02]})
  cost = pd.DataFrame({
      "run": ["other", "best", "large"], "device_hours": [9.0, 2.0, 1.0],
      "price_usd": [9.0, math.nan, 10.0], "energy_kwh": [9.0, 1.0, 2.0],
      "co2e_kg": [9.0, 0.5, 0.4], "hours": [9.0, 1.0, 1.0],
      "flops": [math.nan, 6e12, 6.6e12], "shared": [0.0, 0.0, 0.0],
      "shared_device_hours": [0.0, 0.0, 0.0], "begin_device_hours": 0.0})
  if request.param != "alone":
    cost.loc[2, costs.QUANTITIES] /= 2
    cost.loc[2, "shared"] = 3.3e12
    cost.loc[2, "shared_device_hours"] = (
        0.5 if request.param == "branched" else math.nan)
  return costs.off_frontier(Known(), runs, cost)


def test_what_a_loss_would_have_cost_on_the_frontier(rows):
  # N = D = 640,000 has the loss of the first: 0.64^2 of its compute.
  assert rows["overhead"].to_numpy() == pytest.approx([1 / 0.4096, 1.0])
  assert rows["loss"].to_numpy() == pytest.approx([1.025, 1.02])
  large = rows.iloc[0]
  assert large["flops_optimal"] == pytest.approx(6.6e12 * 0.4096)
  assert large["device_hours_optimal"] == pytest.approx(0.4096)
  assert large["price_usd_optimal"] == pytest.approx(4.096)
  assert large["energy_kwh_optimal"] == pytest.approx(0.8192)
  assert large["co2e_kg_optimal"] == pytest.approx(0.16384)
  assert math.isnan(rows["price_usd_optimal"][1])
  assert rows["overhead_low"][0] == pytest.approx(1 / 0.4096)


def test_what_the_best_loss_would_cost_at_other_sizes(rows):
  made = costs.other_sizes(Known(), rows.iloc[1].to_dict())
  # L = 1.02 with N = k 1e6: 10 / D^0.5 = 0.02 - 0.01 / k^0.5.
  factors = np.array([0.5, 1, 2, 4])
  tokens = (10 / (0.02 - 0.01 / factors**0.5)) ** 2
  assert made["params"].to_numpy() == pytest.approx(1e6 * factors, rel=1e-5)
  assert made["tokens"].to_numpy() == pytest.approx(tokens, rel=1e-5)
  overhead = factors * tokens / 1e6
  assert made["overhead"].to_numpy() == pytest.approx(overhead, rel=1e-5)
  assert overhead[3] == pytest.approx(16 / 9)
  assert made["flops"].to_numpy() == pytest.approx(6e12 * overhead, rel=1e-5)
  assert made["energy_kwh"].to_numpy() == pytest.approx(overhead, rel=1e-5)
  assert made["price_usd"].isna().all()


def test_other_sizes_are_counted_from_the_optimum(rows):
  made = costs.other_sizes(Known(), rows.iloc[0].to_dict())
  # Of the optimal 640,000, not of the run's own 4e6.
  assert made["params"][2] == pytest.approx(1.28e6, rel=1e-5)
  assert made["overhead"][1] == pytest.approx(1.0)
  assert made["price_usd"][1] == pytest.approx(4.096)


def test_no_frontier_and_why():
  assert not costs.no_frontier(Known())
  assert costs.no_frontier(None) == "there is no fit"
  assert "what N and D cost is unknown" in costs.no_frontier(Known(cost=None))
  assert "depends on flops alone" in costs.no_frontier(
      Known(law=laws.get("compute")))
  assert "no intervals" in costs.no_frontier(Known(has_intervals=False))


# --- On the page -------------------------------------------------------------


@pytest.fixture(name="sweep")
def sweep_fixture(write_ledger, write_run, paid) -> pathlib.Path:
  """Twenty complete runs, one that diverged, one that failed and does not
  know what it has cost, one begun; forecast but for one, and one too many."""
  workdir = write_ledger(noise=0.002, **paid)
  write_run(workdir / "blown", 50000, 300000, None, status="diverged",
            flops_total=1e12, **paid)
  write_run(workdir / "dead", 50000, 300000, None, status="failed",
            flops_total=None, device_seconds=None,
            energy_source="unknown: no TDP")
  (workdir / "begun").mkdir()
  (workdir / "begun" / "config.json").write_text("{}")
  names = [path.name for path in sorted(workdir.iterdir())
           if path.name not in ("n30000-d200000", "dead")]
  forecast(workdir, [_PLANNED | {"run_id": name}
                     for name in [*names, "never"]])
  return workdir


def section(workdir: pathlib.Path, **settings: Any) -> str:
  """Its words alone; drawing the figures takes a report most of its time."""
  frame = scaling.load(workdir)
  fit = scaling.fit(frame, **settings)
  return plain(cost_section.section(
      frame, costs.read_forecast(workdir),
      [path.name for path in records.unfinished(workdir)], fit,
      plots.runs_of(fit), ""))


def test_the_section(sweep):
  text = section(sweep, bootstrap=100)
  # 21 runs of an hour, two devices, 3 US$, 0.5 kWh and 0.12 kg.
  for value, label in (("21", "hours"), ("42", "device-hours"), ("63", "US$"),
                       ("10.5", "kWh"), ("2.52", "kg CO2e")):
    assert f"|{value}||{label}, 1 run unknown|" in text
  assert "paid for and in every total: 1 diverged (blown) and 1 failed (dead)" \
      in text
  assert "≥ 3 US$" in text and "in no total: 1 run (begun)" in text
  for how in ("1.5 US$ an hour", "TDP 250 W; without the PUE", "0.2 kg a kWh",
              "25.0%||21||of 2.0×10¹¹ FLOP/s a device (its data sheet)",
              "of runs side by side the sum; a member's share of its "
              "ensemble's", "wall time from claim to result, times devices; a "
              "member's share of its ensemble's"):
    assert how in text
  assert "kWh||1 of 22||unknown: no TDP||cost.hardware" in text
  assert text.count("cost.region") == 1
  # 1.5 US$ were predicted of each; of 20 runs both are known, and one of them
  # has not come to the end that was.
  assert "1.5\n→ 3 (2.00)" in text
  assert "28.5\n→ 57 (2.00)\n19 runs" in text
  assert "|all||" in text and "\n→ ≥ 63|" in text
  assert "never\nnot begun|" in text and "begun\nno result yet|" in text
  assert "n30000-d200000\ncomplete, not predicted|" in text
  assert ("for a-chip; hours: a short timing. From start to end with 2 workers "
          "it was to take 1 h 30 min; 60 s lie between") in text
  assert "Goodput, the share of time in training steps that were kept: 70.0%" \
      in text
  assert "|step||14 h 42 min||70.0%|" in text
  assert "nan" not in text and "inf" not in text
  fit = scaling.fit(scaling.load(sweep), bootstrap=100, holdout=0)
  rows = costs.off_frontier(fit, plots.runs_of(fit), costs.spent(
      scaling.load(sweep)))
  worst = rows.loc[rows["overhead"].idxmax()]
  assert f"|{worst['run']}|" in text
  assert (f"× {worst['overhead']:.2f}\n{worst['overhead_low']:.2f} to"
          in text)
  assert f"|3\n→ {3 / worst['overhead']:.3g}|" in text


def test_what_a_trunk_did_for_others_is_counted_once(
    write_ledger, write_run, paid):
  """A trunk of 9 units of compute, a branch of 6 of which it did 4, and one
  that failed at once, of which nothing is known."""
  unit, sweep = 3e8, write_ledger()
  others = scaling.load(sweep)["flops_total"].sum()
  write_run(sweep / "trunk", 50000, 9000, 3.0, flops_total=9 * unit, **paid)
  write_run(sweep / "branch", 50000, 6000, 3.1, flops_total=6 * unit,
            branched_from="trunk", branch_step=4, shared_flops=4 * unit,
            shared_device_seconds=3200.0, **paid | dict(price_usd=2.0))
  write_run(sweep / "failed", 50000, 6000, None, status="failed",
            flops_total=None, **paid)
  made = costs.spent(scaling.load(sweep)).set_index("run").loc[
      ["trunk", "branch", "failed"]]
  assert made["flops"].to_dict() == pytest.approx(
      {"branch": 2 * unit, "failed": math.nan, "trunk": 9 * unit},
      nan_ok=True)
  assert made["device_hours"].sum() == 6.0  # what was paid for, no more
  whole = costs.alone(made)
  assert whole.loc["branch", "flops"] == 6 * unit
  # Its own 2 hours, for 2 US$, and 3200 s of its trunk, but for the 600 s that
  # it took to start and compile once more.
  hours = 2 + (3200 - 600) / 3600
  assert whole.loc["branch", "device_hours"] == pytest.approx(hours)
  assert whole.loc["branch", "price_usd"] == pytest.approx(hours)
  assert whole.loc["trunk", "price_usd"] == 3.0
  assert whole.loc["failed", "price_usd"] == 3.0
  text = section(sweep, bootstrap=0)
  share = (others + 11 * unit) / (others + 15 * unit)
  assert ("1 run branched off another one's trunk, where 1.2×10⁹ FLOPs of "
          f"their way are counted, once: {share:.1%} of what") in text


def test_old_runs_without_a_forecast(write_ledger):
  text = section(write_ledger(), bootstrap=0)
  assert "there is no cost.json beside the runs. scripts/plan.py" in text
  assert "time inside training steps, times devices" in text
  assert "|US$||20 of 20||not said||cost.hardware" in text
  assert "|MFU||20 of 20|" in text
  assert "Where the time went" not in text
  assert "The best run's loss at other sizes" in text


def test_old_runs_with_a_forecast_are_no_match_for_it(write_ledger):
  workdir = write_ledger()
  forecast(workdir, [])
  assert "the device-hours that 20 runs spent are those inside" in section(
      workdir, bootstrap=0)


def test_a_forecast_for_another_machine_is_named_as_such(
    write_ledger, paid):
  workdir = write_ledger(**paid)
  forecast(workdir, [], hardware="another-chip")
  assert "for another-chip (runs were on a-chip); hours:" in section(
      workdir, bootstrap=0)


def test_a_law_without_a_frontier_says_why(write_ledger):
  text = section(write_ledger(), law="compute", bootstrap=0)
  assert "on the frontier is unknown: law 'compute' has no compute-optimal" \
      in text


# --- The figure --------------------------------------------------------------


def figure_runs() -> tuple[pd.DataFrame, pd.DataFrame]:
  frame = pd.DataFrame({
      "run": list("bacd"), "params": [1e6, 1e6, 8e6, 8e6],
      "tokens": [2e7, 1e7, 1e7, 2e7], "loss": [2.8, 3.0, 2.7, 2.4],
      "flops": [1.2e14, 6e13, 4.8e14, 9.6e14]})
  return frame, pd.DataFrame({
      "run": list("dcbax"), "device_hours": [8.0, 4.0, 2.0, 1.0, 50.0],
      "price_usd": [math.nan, 12.0, 6.0, 0.0, 50.0], "energy_kwh": math.nan,
      "co2e_kg": math.nan, "occupied": [True, True, True, False, True],
      "shared": 0.0})


def test_the_figure_shows_what_is_known():
  frame, spent = figure_runs()
  picture = plots.draw(frame, {}, None, spent=spent)["cost"]
  hours, money = picture.figure.axes
  assert [panel.get_xlabel() for panel in (hours, money)] == [
      "device-hours", "price (US$)"]
  joined = [line.get_xydata().tolist() for line in hours.lines
            if line.get_linestyle() != "None"]
  assert joined == [[[1, 3.0], [2, 2.8]], [[4, 2.7], [8, 2.4]]]
  points = np.concatenate([line.get_xydata() for line in money.lines
                           if line.get_linestyle() == "None"])
  assert points.tolist() == [[6, 2.8], [12, 2.7]]  # Others: unknown, and none.
  assert picture.title == "Loss against device-hours and money"
  assert "the money of 2 runs" in picture.caption
  assert "The device-hours of 1 run are those inside" in picture.caption
  assert "2.400 nats a token, took 8 device-hours." in picture.caption
  looks = {(line.get_marker(), line.get_linestyle()) for line in hours.lines}
  assert len(looks) == 4  # Sizes differ by marker and by line,
  greys = {round(float(np.dot(colors.to_rgb(line.get_color()),
                              [0.2126, 0.7152, 0.0722])), 2)
           for line in hours.lines}
  assert len(greys) == 2 and np.ptp(list(greys)) > 0.3  # and by lightness.


def test_energy_stands_in_for_co2e():
  frame, spent = figure_runs()
  spent["energy_kwh"] = [4.0, 3.0, 2.0, 1.0, 9.0]
  made = figures_cost.cost(frame, spent)
  assert made.figure.axes[-1].get_xlabel() == "energy (kWh)"
  spent["co2e_kg"] = spent["energy_kwh"] / 10
  made = figures_cost.cost(frame, spent)
  assert made.figure.axes[-1].get_xlabel() == "CO2e (kg)"
  assert len(made.figure.axes) == 3


def test_no_figure_of_nothing():
  frame, spent = figure_runs()
  spent[["device_hours", "price_usd"]] = math.nan
  assert figures_cost.cost(frame, spent) is None
