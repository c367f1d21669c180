# SPDX-License-Identifier: Apache-2.0
"""What a report says of a fit, section by section.

Works from the fit alone, whatever its law and wherever its runs come from.
The page as a whole is put together in `report`.
"""

import html
from typing import Sequence

import numpy as np

from tfjax.scaling import approaches
from tfjax.scaling import forms
from tfjax.scaling import page
from tfjax.scaling import result
from tfjax.scaling import wording
from tfjax.scaling.figures import canvas

# Of a fit's conventions, what has a row of its own.
_SAID_ELSEWHERE = ("notes", "minimised")


def fitted_law(fit: result.Fit, entropy_rate: float | None = None) -> str:
  """The law with its numbers, how far to trust it, and its parameters."""
  rows = parameter_rows(fit)
  if entropy_rate is not None:
    rows.append(["entropy rate of the source", f"{entropy_rate:.4f} nats a "
                 "token, known", "what E should be"])
  body = (_equation(fit) + f"<p>{page.chip(status_words(fit), fit.status)} "
          f"{html.escape(fit_words(fit))}</p>"
          + page.table(["", f"estimate ({fit.level:.0%} bootstrap interval)",
                        "profile likelihood"], rows, "left"))
  return (page.heading("The fitted law") + page.card(body) + _optima(fit)
          + unseen(fit))


def parameter_rows(fit: result.Fit) -> list[list[str]]:
  """Name, estimate and profile interval of each parameter, and of what
  follows from them."""
  rows = [[name, wording.parameter(fit, name), _profile(fit, name)]
          for name in fit.law.parameters]
  return rows + [[name, wording.number(value), "follows from the others"]
                 for name, value in fit.derived.items()]


def no_fit(problem: str) -> str:
  return page.heading("The fitted law") + page.card(
      page.chip("no fit", "") + page.paragraph(f"There is no fit: {problem}"))


def fit_words(fit: result.Fit) -> str:
  """One sentence on how far the fit is to be trusted."""
  words = {"converged": "The runs determine the law",
           "not_identifiable": "The runs do not determine the law",
           "bound_hit": "A parameter ran into the end of its range",
           "multiple_optima": "More than one law fits these runs",
           "max_iterations": "The fit did not settle"}[fit.status]
  detail = "" if fit.status == "converged" else f": {fit.reason}"
  return (f"{words}{detail}. {fit.share_at_best:.0%} of {fit.starts} starts "
          f"reached this optimum.")


def status_words(fit: result.Fit) -> str:
  return fit.status.replace("_", " ")


def held_out_words(fit: result.Fit) -> str:
  count = len(fit.holdout)
  return (f"The {f'{count} runs' if count > 1 else 'run'} with the most "
          f"compute took no part in the fit; it predicts their "
          f"{_target(fit)} with errors of at most "
          f"{wording.worst(fit.holdout)}.")


def unseen(fit: result.Fit) -> str:
  """What the fit says of runs that it has not seen: those held out, or else
  the largest, which another fit leaves out."""
  if fit.holdout:
    return page.heading("Held-out prediction") + page.paragraph(
        held_out_words(fit)) + _predictions(fit, fit.holdout)
  head = page.heading("Extrapolation")
  if not fit.extrapolation:
    return head + page.paragraph(
        "No run was held out of this fit, and too few would be left without "
        "those of the most compute, or their compute is unknown: nothing here "
        "tests it.")
  count = len(fit.extrapolation)
  least = min(h.flops for h in fit.extrapolation)
  return head + page.paragraph(
      f"No run was held out. Fitted again without the "
      f"{f'{count} runs' if count > 1 else 'run'} of the most compute "
      f"({wording.power(least)} FLOPs and more), the law predicts "
      f"{'them' if count > 1 else 'it'} with errors of at most "
      f"{wording.worst(fit.extrapolation)}."
      ) + _predictions(fit, fit.extrapolation)


def figure(name: str, picture: canvas.Picture, svg: bytes,
           level: int = 2) -> str:
  """A figure with its caption, and where it lies as a file."""
  files = ", ".join(f"figures/{name}.{ending}" for ending in ("png", "svg",
                                                             "pdf"))
  return page.heading(picture.title, level) + page.figure(
      svg, f"{picture.caption} ({files})", picture.title)


def optimal(fit: result.Fit,
            compared: approaches.Comparison | None) -> str:
  """Where a few budgets are best spent; nothing where the law has no say."""
  if compared is None:
    return ""
  return (page.heading("Compute-optimal size and data") + _by_surface(fit)
          + _by_approach(compared))


def _by_surface(fit: result.Fit) -> str:
  if not fit.has_intervals:
    return page.paragraph("The fitted law says nothing: its parameters have no "
                          "intervals.")
  rows = fit.compute_optimal(optimal_budgets(fit))
  cell = wording.banded
  cells = [[wording.power(row.flops) + (" *" if row.extrapolated else ""),
            cell(row, "params", wording.count),
            cell(row, "tokens", wording.count),
            cell(row, "tokens_per_parameter", wording.count),
            cell(row, "loss", "{:.3f}".format)] for row in rows.itertuples()]
  note = f"{wording.cost(fit)}. * beyond the fitted runs: an extrapolation."
  if fit.status != "converged":
    note += f" The fit is {status_words(fit)}: illustration only."
  return page.table(
      ["FLOPs", "N*", "D*", "tokens / parameter", "loss"], cells
      ) + page.paragraph(note, "note")


def _by_approach(compared: approaches.Comparison) -> str:
  """The three approaches side by side, and what is known against approach 2."""
  cell = wording.banded
  def exponent(value: float) -> str:
    return wording.decimal(value, 3)
  words = {"1": "1, envelope", "2": "2, isoFLOP", "3": "3, fitted law"}
  cells = [[words[row.approach], wording.power(row.flops),
            cell(row, "exponent_params", exponent),
            cell(row, "exponent_tokens", exponent),
            cell(row, "params", wording.count),
            cell(row, "tokens", wording.count), f"{row.loss:.3f}"]
           for row in compared.table.itertuples()]
  return page.heading("By three approaches", 3) + page.table(
      ["approach", "FLOPs", "a of N* ~ C^a", "b of D* ~ C^b", "N*", "D*",
       "loss"], cells) + page.paragraph(
           "The loss is the fitted law's at that N*.", "note") + "".join(
           page.paragraph(f"{note[:1].upper()}{note[1:]}.", "note")
           for note in compared.caveats())


def optimal_budgets(fit: result.Fit) -> np.ndarray:
  """A few budgets: the cheapest run's to ten times the dearest's."""
  spent = [*fit.runs["flops"], *(h.flops for h in fit.holdout)]
  return np.geomspace(min(spent), 10 * max(spent), 5)


def conventions(fit: result.Fit) -> str:
  """What N, D, C and the loss are, and what was minimised, how."""
  said = fit.conventions
  rows = [["law", f"{fit.law.form} ({fit.law.source})"],
          ["minimised", f"{said['minimised']}: {fit.objective:.9g}"]]
  rows += [[_convention(name), wording.UNKNOWN if value is None else str(value)]
           for name, value in said.items() if name not in _SAID_ELSEWHERE]
  if "notes" in said:
    rows.append(["note", said["notes"]])
  rows += [[f"{name} fixed at", wording.number(value)]
           for name, value in fit.settings["fixed"].items()]
  count = fit.settings["bootstrap"]
  drawn = (f"groups by {fit.settings['group']}" if fit.settings["group"]
           else "the runs")
  rows.append(["resampling", f"{count} bootstrap resamples of {drawn}, "
               f"{fit.level:.0%} percentile intervals, seed "
               f"{fit.settings['seed']}" if count else "none: no intervals"])
  if fit.cost is not None:
    rows.append(["FLOPs of N and D", wording.cost(fit)])
  return page.heading("Conventions") + page.table([], rows, "left wrap")


def excluded(rows: Sequence[Sequence[str]], empty: str) -> str:
  """Rows (name, reason) that were left out."""
  head = page.heading("Runs left out")
  if not rows:
    return head + page.paragraph(empty)
  return head + page.table(["run", "why"], rows, "left wrap")


# --- Details -----------------------------------------------------------------


def _profile(fit: result.Fit, name: str) -> str:
  if name in fit.settings["fixed"]:
    return "fixed"
  if name not in fit.profile_intervals:
    return ""
  return wording.open_interval(fit.profile_intervals[name])


def _equation(fit: result.Fit) -> str:
  """The law with its numbers, those that are not determined left as names;
  as it is written, where it is not a sum of terms."""
  left, _, right = fit.law.form.partition(" = ")
  if not fit.law.terms:
    return f'<p class="law small">{html.escape(fit.law.form)}</p>'
  terms = " + ".join(_term(fit, term) for term in fit.law.terms)
  return f'<p class="law">{html.escape(left)} = {terms}</p>'


def _term(fit: result.Fit, term: forms.Term) -> str:
  def shown(name: str) -> str:
    if fit.determined[name]:
      return wording.number(fit.coefficients[name], 3)
    return f'<span class="open">{html.escape(name)}</span>'
  above, below = [shown(term.coefficient)], []
  for axis, name, factor in term.powers():
    times = "" if abs(factor) == 1 else f"{abs(factor):g} × "
    power = (f"{html.escape(wording.symbol(axis))}"
             f"<sup>{times}{shown(name)}</sup>")
    (above if factor > 0 else below).append(power)
  return " ".join(above) + (f" / {' '.join(below)}" if below else "")


def _optima(fit: result.Fit) -> str:
  if not fit.optima:
    return ""
  names = fit.law.parameters
  rows = [["this fit", f"{fit.objective:.6g}", "",
           *(wording.number(fit.coefficients[name]) for name in names)]]
  for other in fit.optima:
    excess = (f"{other['objective'] / fit.objective - 1:+.2%}"
              if fit.objective else "")
    rows.append(["another", f"{other['objective']:.6g}", excess, *(
        wording.number(other["coefficients"][name]) for name in names)])
  return page.heading("Other optima", 3) + page.paragraph(
      "These fit the runs as well, or nearly, with other numbers; what they "
      "disagree on, the runs do not say.") + page.table(
          ["", "objective", "worse by", *names], rows)


def _predictions(fit: result.Fit, runs: Sequence[result.HeldOut]) -> str:
  sizes = all(wording.known(h.params) and wording.known(h.tokens)
              for h in runs)
  bands = any(h.interval for h in runs)
  rows = [[h.run,
           *((wording.count(h.params), wording.count(h.tokens)) * sizes),
           wording.power(h.flops), wording.decimal(h.predicted),
           *((wording.between(h.interval, "{:.4f}"),) * bands),
           wording.decimal(h.measured), wording.error(h.relative_error)]
          for h in runs]
  return page.table(
      ["run", *(("N", "D") * sizes), "FLOPs", "predicted",
       *((f"{fit.level:.0%} interval",) * bands), "measured", "error"], rows)


def _convention(name: str) -> str:
  symbol = wording.symbol(name)
  text = name.replace("_", " ")
  return f"{symbol} ({text}) is" if symbol != name else text


def _target(fit: result.Fit) -> str:
  return fit.law.target.replace("_", " ")
