# SPDX-License-Identifier: Apache-2.0
"""Figures say what the fit says, and can be read without colour."""

import dataclasses
import itertools

import matplotlib
from matplotlib import colors
from matplotlib import legend
from matplotlib import text as text_lib
from matplotlib.backends import backend_agg
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tfjax import scaling
from tfjax.scaling import approaches
from tfjax.scaling import forms
from tfjax.scaling import plots
from tfjax.scaling import report
from tfjax.scaling import sections
from tfjax.scaling import wording
from tfjax.scaling.figures import canvas
from tfjax.scaling.figures import law as figures_law

TRUTH = {"E": 1.7, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.37}
_BUDGETS = np.geomspace(1e18, 1e21, 5)
_ALL = {"size", "compute", "isoflop", "frontier", "surface", "prediction",
        "residuals", "profiles"}


def isoflops(noise: float = 0.003, outlier: float = 0.0) -> pd.DataFrame:
  """Seven sizes about the optimum at each budget; no flops, no run names."""
  rows = []
  for budget, ratio in itertools.product(_BUDGETS, np.geomspace(0.2, 5, 7)):
    params = 0.09 * budget**0.5 * ratio
    rows.append({"params": params, "tokens": budget / (6 * params)})
  frame = pd.DataFrame(rows)
  loss = (TRUTH["E"] + TRUTH["A"] / frame["params"]**TRUTH["alpha"]
          + TRUTH["B"] / frame["tokens"]**TRUTH["beta"])
  draws = np.random.default_rng(0).standard_normal(len(frame))
  frame["loss"] = loss * np.exp(noise * draws)
  frame.loc[17, "loss"] *= np.exp(outlier)
  return frame


@pytest.fixture(scope="module", name="fit")
def fit_fixture() -> scaling.Fit:
  return scaling.fit(isoflops(outlier=0.05), bootstrap=100, holdout=3)


@pytest.fixture(scope="module", name="pictures")
def pictures_fixture(fit) -> dict[str, canvas.Picture]:
  return drawn(fit)


def drawn(fit: scaling.Fit) -> dict[str, canvas.Picture]:
  largest = max(h.flops for h in fit.holdout) if fit.holdout else (
      fit.runs["flops"].max())
  compared = None
  if {"params", "tokens"} <= set(fit.law.axes):
    compared = approaches.compare(fit, [largest, 10 * largest], bootstrap=0)
  return plots.draw(plots.runs_of(fit), {}, fit, compared=compared)


# --- Readable ----------------------------------------------------------------


def check_readable(picture: canvas.Picture) -> None:
  """Labelled axes, no tick label on another, and nothing cut off."""
  figure = picture.figure
  renderer = backend_agg.FigureCanvasAgg(figure).get_renderer()
  page = figure.bbox
  texts = [*figure.legends]
  for panel in figure.axes:
    for axis in (panel.xaxis, panel.yaxis):
      assert axis.get_label_text(), picture.title
      low, high = sorted(axis.get_view_interval())
      ticks = [tick.label1 for tick in axis.get_major_ticks()
               if low <= tick.get_loc() <= high]
      assert len(ticks) > 1, f"{picture.title}: {axis.get_label_text()}"
      boxes = [tick.get_window_extent(renderer) for tick in ticks]
      for one, other in itertools.pairwise(boxes):
        assert not one.overlaps(other), (
            f"{picture.title}: {axis.get_label_text()}")
      texts += [axis.label, *ticks]
    texts += [child for child in panel.get_children()
              if isinstance(child, legend.Legend)
              or isinstance(child, text_lib.Text) and child.get_text()
              and not child.get_clip_on()]
  for text in texts:
    box = text.get_window_extent(renderer)
    assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1, picture.title
    assert page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1, picture.title
  assert len(picture.caption) > 60 and "nan" not in picture.caption


def test_every_figure_is_readable(pictures):
  assert set(pictures) == _ALL
  for picture in pictures.values():
    check_readable(picture)


@pytest.mark.parametrize("law, options", [
    ("chinchilla_tied", dict(bootstrap=100)), ("compute", dict(bootstrap=100)),
    ("kaplan", dict(bootstrap=0, starts=dict(  # and no intervals at all
        u=[1e8], v=[1e8], alpha_N=[0.2], alpha_D=[0.2])))])
def test_other_laws_too(law, options):
  fit = scaling.fit(isoflops(), law, **options)
  pictures = drawn(fit)
  for picture in pictures.values():
    check_readable(picture)
  assert {"size", "prediction", "residuals", "profiles"} <= set(pictures)
  assert ("surface" in pictures) == (law != "compute")


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("cmap", ["viridis", "cividis"])
def test_series_differ_without_colour(count, cmap):
  levels = canvas.Levels.of(pd.Series(np.geomspace(1e6, 1e9, count)), cmap)
  assert len(levels) == count
  looks = {(levels.marker(k)["marker"], levels.line(k)["linestyle"])
           for k in range(count)}
  assert len(looks) == count
  # Luminance as a black-and-white printer sees it (Rec. 709).
  grey = np.array([np.dot(colors.to_rgb(levels.colour(k)),
                          [0.2126, 0.7152, 0.0722]) for k in range(count)])
  assert (np.diff(grey) > 0.5 / count).all()
  assert grey.max() < 0.85  # and is not lost on white


def test_many_values_become_few_series_without_empty_ones():
  column = pd.Series(np.r_[np.geomspace(1e6, 1.9e6, 12), 1e9])
  levels = canvas.Levels.of(column)
  assert levels.values == pytest.approx([1e6, 1e9]) and levels.sign == "≈"
  assert list(levels.index) == [0] * 12 + [1]


@pytest.mark.parametrize("scale", [1e-5, 1.0, 3e4])
def test_loss_against_cost_is_readable(scale):
  frame = isoflops()
  frame["run"] = [f"run {k}" for k in frame.index]
  hours = scale * (frame["params"] * frame["tokens"]) ** 0.6 / 1e10
  picture = plots.draw(frame.assign(flops=1e18), {}, None, spent=pd.DataFrame({
      "run": frame["run"], "device_hours": hours, "price_usd": 2 * hours,
      "energy_kwh": hours, "co2e_kg": 0.1 * hours, "occupied": True,
      "shared": [1e9] * 2 + [0.0] * (len(frame) - 2)}))["cost"]
  assert len(picture.figure.axes) == 3
  assert "2 runs of them branched off another one's trunk" in picture.caption
  check_readable(picture)


# --- True --------------------------------------------------------------------


def test_series_are_the_law_and_runs_keep_their_distance(fit, pictures):
  rows = figures_law.rows_of(fit)
  assert rows["held_out"].sum() == 3
  panel = pictures["size"].figure.axes[0]
  drawn_points = np.concatenate([
      line.get_xydata() for line in panel.lines
      if line.get_linestyle() == "None"])
  assert len(drawn_points) == len(rows)
  levels = canvas.Levels.of(rows["tokens"])
  at = dict(zip(rows["params"], levels.values[levels.index]))
  own = dict(zip(rows["params"], rows["loss"] / fit.predict(
      rows["params"], rows["tokens"])))
  for params, loss in drawn_points:
    assert loss / fit.predict(params, at[params]) == pytest.approx(own[params])


def test_the_residuals_of_a_known_outlier(fit, pictures):
  panel = pictures["residuals"].figure.axes[0]
  points = np.concatenate([line.get_ydata() for line in panel.lines
                           if line.get_marker() == "o"])
  assert len(points) == len(fit.runs)
  expected = 100 * (np.log(fit.runs["loss"]) - np.log(fit.predict(
      fit.runs["params"], fit.runs["tokens"])))
  assert np.sort(points) == pytest.approx(np.sort(expected))
  assert 4.5 < points.max() < 5.5  # 0.05 in logs
  assert f"the worst is {points.max():.2g}% off" in pictures[
      "residuals"].caption


def test_normal_quantiles(fit, pictures):
  panel = pictures["residuals"].figure.axes[-1]
  points = panel.lines[0].get_xydata()
  count = len(fit.runs)
  assert points[0, 0] == pytest.approx(stats.norm.ppf(0.5 / count))
  assert (np.diff(points, axis=0) >= 0).all()
  # The straight line has the median and the median absolute deviation.
  middle = np.median(points[:, 1])
  sigma = stats.median_abs_deviation(points[:, 1], scale="normal")
  ends = panel.lines[1].get_xydata()
  assert ends[:, 1] == pytest.approx(middle + sigma * ends[:, 0])


def test_profiles_cross_the_quantile_at_the_interval(fit, pictures):
  panels = pictures["profiles"].figure.axes
  names = list(fit.profile_intervals)
  assert names and len(panels) == len(names)
  for panel, name in zip(panels, names):
    value, deviance = panel.lines[0].get_data()
    limit = panel.lines[1].get_ydata()[0]
    assert limit == pytest.approx(stats.f.ppf(
        0.95, 1, len(fit.runs) - 5))  # five parameters
    low, high = fit.profile_intervals[name]
    assert low < fit.coefficients[name] < high
    for end in (low, high):
      assert np.interp(end, value, deviance) == pytest.approx(limit, rel=0.15)
    assert panel.get_title(loc="left") == (
        f"{name}: {wording.open_interval((low, high))}")


def test_the_frontier_lies_where_contours_touch_equal_compute(fit, pictures):
  (panel,) = pictures["surface"].figure.axes
  line = next(line for line in panel.lines if line.get_linewidth() == 2.2)
  points = line.get_xydata()
  for params, tokens in points[np.isfinite(points).all(axis=1)][::15]:
    budget = fit.cost.flops(params, tokens)
    others = params * np.array([0.95, 1.05])
    assert (fit.predict(others, fit.cost.tokens(others, budget))
            > fit.predict(params, tokens)).all()


def test_three_approaches_and_the_bias_beside_them(fit, pictures):
  caption = pictures["frontier"].caption
  left, right = pictures["frontier"].figure.axes
  for panel, letter in ((left, "N"), (right, "D")):
    keys = [text.get_text() for text in panel.get_legend().get_texts()]
    for approach, text in zip("123", keys):
      assert text.startswith(f"approach {approach}")
      assert f"{letter}* ~ C^" in text
    assert "its known bias: " in keys[1]
  compared = approaches.compare(fit, [1e22], bootstrap=0)
  assert compared.bias.method in caption
  assert "known bias of approach 2" in caption.lower()
  assert f"a {compared.bias.exponent:.4f} where it is" in caption


def test_isoflop_minima(pictures):
  (panel,) = pictures["isoflop"].figure.axes
  stars = [line.get_xydata()[0] for line in panel.lines
           if line.get_marker() == "*" and len(line.get_xdata()) == 1]
  assert len(stars) >= 4  # a budget that is held out in part may have none
  params = np.array(sorted(star[0] for star in stars))
  found = 0.09 * _BUDGETS[:len(params)]**0.5
  assert (np.abs(np.log(params / found)) < np.log(2.5)).all()


def test_a_law_of_three_axes_is_shown_axis_by_axis():
  frame = isoflops(noise=0.001)
  frame["steps"] = np.random.default_rng(1).permutation(
      np.geomspace(1e3, 1e5, len(frame)))
  form = lambda p, x: (p["E"] + p["A"] / x["params"]**p["alpha"]
                       + p["B"] / x["tokens"]**p["beta"]
                       + p["G"] / x["steps"]**0.5)
  parameters = tuple(forms.Parameter(name, low, high, (start,))
                     for name, low, high, start in (
                         ("E", 0.1, 5, 1.7), ("A", 1, 1e4, 400.0),
                         ("B", 1, 1e5, 2000.0), ("alpha", 0.05, 2, 0.34),
                         ("beta", 0.05, 2, 0.37), ("G", 1e-3, 10, 1.0)))
  law = forms.from_function(
      form, parameters, ("params", "tokens", "steps"), name="with_steps")
  frame["loss"] += 1.0 / frame["steps"]**0.5
  fit = scaling.fit(frame, law, bootstrap=0)
  picture = drawn_without_budgets(fit)["size"]
  check_readable(picture)
  assert len(picture.figure.axes) == 3
  assert "geometric means" in picture.caption


def test_scores_have_linear_axes():
  loss = np.linspace(2.0, 4.0, 20)
  error = 0.9 - 2.0 * np.exp(-0.9 * loss)
  frame = pd.DataFrame({"loss": loss, "error": error + 0.003 * np.cos(
      9 * np.arange(20))})
  fit = scaling.fit(frame, "downstream_error", bootstrap=100)
  pictures = drawn_without_budgets(fit)
  assert set(pictures) == {"size", "prediction", "residuals", "profiles"}
  assert pictures["size"].figure.axes[0].get_yscale() == "linear"
  for picture in pictures.values():
    check_readable(picture)


def drawn_without_budgets(fit: scaling.Fit) -> dict[str, canvas.Picture]:
  return plots.draw(plots.runs_of(fit), {}, fit)


# --- Written -----------------------------------------------------------------


def test_a_report_of_a_table_from_elsewhere(tmp_path):
  frame = isoflops()
  frame.loc[3, "loss"] = np.nan
  fit = scaling.fit(frame, bootstrap=100)
  path = report.write_fit(fit, tmp_path / "there", title="Elsewhere <b>")
  text = path.read_text(encoding="utf-8")
  written = {p.name for p in (tmp_path / "there" / "figures").iterdir()}
  assert written == {f"{name}.{ending}" for name in _ALL
                     for ending in plots.FORMATS}
  assert text.count("data:image/svg+xml;base64,") == len(_ALL)
  assert "Elsewhere &lt;b&gt;" in text and "<b>Elsewhere" not in text
  (row,) = fit.excluded
  assert f"<tr><td>row 3</td><td>{row.reason}</td></tr>" in text
  worst = max((h.relative_error for h in fit.extrapolation), key=abs)
  assert f"errors of at most {worst:+.2%}" in text
  assert fit.conventions["minimised"] in text
  assert "By three approaches" in text and "nown bias of approach 2" in text


def test_formats_are_what_their_names_say(tmp_path, pictures):
  svg = plots.save(pictures["profiles"], tmp_path, "profiles")
  assert (tmp_path / "profiles.svg").read_bytes() == svg
  assert b"<svg" in svg[:2000]
  assert (tmp_path / "profiles.pdf").read_bytes()[:5] == b"%PDF-"
  assert (tmp_path / "profiles.png").read_bytes()[1:4] == b"PNG"
  # The same figure is the same file, byte by byte.
  assert plots.save(pictures["profiles"], tmp_path, "again") == svg


def test_other_optima_are_listed():
  fit = scaling.fit(isoflops(), bootstrap=0)
  rival = {"coefficients": fit.coefficients | {"E": 1.2345},
           "objective": 1.5 * fit.objective}
  text = sections.fitted_law(
      dataclasses.replace(fit, optima=(rival,)))
  assert "Other optima" in text and "1.234" in text and "+50.00%" in text
  assert "Other optima" not in sections.fitted_law(fit)


def test_no_global_state_is_touched(fit):
  before = dict(matplotlib.rcParams)
  drawn_without_budgets(fit)
  assert dict(matplotlib.rcParams) == before
