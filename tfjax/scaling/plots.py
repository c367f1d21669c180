# SPDX-License-Identifier: Apache-2.0
"""All figures of runs and a fit: `draw` makes them, `save` writes one.

What each shows is in `tfjax.scaling.figures`.
"""

import io
import pathlib
from typing import Callable, Mapping

import matplotlib
import pandas as pd

from tfjax.scaling import approaches
from tfjax.scaling import result
from tfjax.scaling.figures import canvas
from tfjax.scaling.figures import cost as figures_cost
from tfjax.scaling.figures import frontier as figures_frontier
from tfjax.scaling.figures import law as figures_law
from tfjax.scaling.figures import profile as figures_profile
from tfjax.scaling.figures import residuals as figures_residuals
from tfjax.scaling.figures import runs as figures_runs
from tfjax.scaling.figures import surface as figures_surface

FORMATS = ("png", "svg", "pdf")


def draw(
    frame: pd.DataFrame | None,
    curves: Mapping[str, pd.DataFrame],
    fit: result.Fit | None,
    entropy_rate: float | None = None,
    compared: approaches.Comparison | None = None,
    spent: pd.DataFrame | None = None,
) -> dict[str, canvas.Picture]:
  """Every figure that the data allow, by name, in reading order.

  Args:
    frame: complete runs: run, params, tokens, loss, flops; None where there
      are none of which all of these are known.
    curves: metrics rows by run.
    fit: None where there is none; then only curves and points are drawn.
    entropy_rate: the known irreducible loss (nats a token), if any.
    compared: the three approaches on the runs of the fit, if they apply.
    spent: what the runs have cost, as `costs.spent` has it, if it is known.
  """
  made: list[tuple[str, Callable[[], canvas.Picture | None]]] = []
  has_runs = frame is not None and len(frame) > 0
  if has_runs and curves:
    made.append(("curves", lambda: figures_runs.curves(frame, curves)))
  if fit is not None:
    made.append(("size", lambda: figures_law.against_axes(fit)))
  elif has_runs:
    made.append(("size", lambda: figures_runs.against_sizes(frame)))
  if has_runs:
    made.append(("compute", lambda: figures_runs.compute(
        frame, fit, entropy_rate)))
  if has_runs and spent is not None:
    made.append(("cost", lambda: figures_cost.cost(frame, spent)))
  if fit is not None and has_runs and compared is not None:
    made += [("isoflop", lambda: figures_frontier.curves(
                 compared.isoflop, fit)),
             ("frontier", lambda: figures_frontier.approaches(
                 frame, fit, compared))]
  if fit is not None:
    made += [("surface", lambda: figures_surface.surface(fit)),
             ("prediction", lambda: figures_residuals.prediction(fit)),
             ("residuals", lambda: figures_residuals.residuals(fit)),
             ("profiles", lambda: figures_profile.profiles(fit))]
  with matplotlib.rc_context(canvas.STYLE):
    pictures = {name: picture for name, make in made
                if (picture := make()) is not None}
    for picture in pictures.values():
      picture.figure.draw_without_rendering()
      # Laid out once, not for each format.
      picture.figure.set_layout_engine("none")
  return pictures


def runs_of(fit: result.Fit) -> pd.DataFrame | None:
  """Runs of a fit as `draw` takes them, held-out ones too; None where the law
  does not know N, D and their loss."""
  rows = figures_law.rows_of(fit)
  names = ["run", "params", "tokens", "loss", "flops"]
  return rows[names] if set(names) <= set(rows) else None


def save(picture: canvas.Picture, directory: pathlib.Path, name: str) -> bytes:
  """Writes directory/name.{png,svg,pdf}, and returns the SVG."""
  figure = picture.figure
  with matplotlib.rc_context(canvas.STYLE):
    figure.savefig(directory / f"{name}.png")
    figure.savefig(directory / f"{name}.pdf",
                   metadata={"CreationDate": None, "Title": picture.title})
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg",
                   metadata={"Date": None, "Title": picture.title})
  (directory / f"{name}.svg").write_bytes(buffer.getvalue())
  return buffer.getvalue()
