# SPDX-License-Identifier: Apache-2.0
"""The report is whole, safe and honest, whatever the runs are."""

import html
import json
import pathlib
import re
import subprocess
import sys

import pytest

from tfjax import scaling
from tfjax.scaling import report
from tfjax.scaling import wording

_SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "report.py"
_FIGURES = {"curves", "size", "compute", "cost", "frontier", "surface",
            "prediction", "residuals", "profiles"}


def written(workdir: pathlib.Path, **settings: object) -> str:
  settings = {"bootstrap": 100} | settings
  return report.write(workdir, settings).read_text(encoding="utf-8")


def figures(workdir: pathlib.Path) -> set[str]:
  return {path.name for path in (workdir / "figures").iterdir()}


def test_a_whole_report_of_runs_that_do_not_determine_the_law(
    write_ledger, write_run):
  workdir = write_ledger(noise=0.05)
  write_run(workdir / "blown", 50000, 300000, None, status="diverged",
            status_reason="<script>alert(1)</script>")
  (workdir / "begun").mkdir()
  (workdir / "begun" / "config.json").write_text("{}")
  text = written(workdir, holdout=3)
  fit = scaling.fit(scaling.load(workdir), holdout=3, bootstrap=100)
  assert figures(workdir) == {
      f"{name}.{ending}" for name in _FIGURES
      for ending in ("png", "svg", "pdf")}
  assert text.count("data:image/svg+xml;base64,") == len(_FIGURES)
  assert html.escape(wording.parameter(fit, "alpha")) in text
  assert f"{fit.holdout[0].predicted:.4f}" in text
  assert "20 complete runs of 21" in text
  # An exponent that is not determined is shown by its name.
  open_names = [n for n in fit.law.exponents if not fit.determined[n]]
  assert open_names
  for name in open_names:
    assert f'<span class="open">{name}</span>' in text
    assert f"{name} is not determined" in text
  assert "illustration only" in text
  assert "has no result.json" in text
  assert "entropy rate" not in text
  # Nothing from a record is taken for markup, and nothing is fetched.
  assert "<script" not in text and "&lt;script&gt;" in text
  assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
  assert "url(" not in text and "@import" not in text


def test_what_the_runs_cost_is_a_section(write_ledger, paid):
  workdir = write_ledger(sizes=(30000, 60000), tokens=(200000,), **paid)
  (workdir / "cost.json").write_text(json.dumps({"runs": [
      {"run_id": "n30000-d200000", "price_usd": 2.0}]}))
  text = written(workdir)
  at = [text.index(words) for words in (
      "What it cost</h2>", "<h3>Loss against device-hours, money and CO2e</h3>",
      "2\n→ 3 (1.50)", "there is no fit", "<h2>Runs</h2>")]
  assert at == sorted(at)
  assert {f"cost.{ending}" for ending in ("png", "svg", "pdf")} <= figures(
      workdir)


def test_one_data_size_has_no_frontier(write_ledger):
  workdir = write_ledger(tokens=(1000000,),
                         sizes=tuple(range(30000, 100000, 10000)))
  text = written(workdir)
  assert "1 distinct value of D" in text
  assert "profiles.png" not in figures(workdir)
  assert "No approach 3: the fit is not_identifiable" in text
  assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()


def test_too_few_runs_still_show_their_curves(write_ledger):
  workdir = write_ledger(sizes=(30000, 60000), tokens=(200000,))
  text = written(workdir)
  assert "There is no fit: too few runs" in text
  assert {"curves.png", "size.png", "compute.png"} <= figures(workdir)
  assert "prediction.png" not in figures(workdir)


def test_runs_that_cannot_be_compared_are_shown_without_a_fit(
    write_ledger, write_run):
  workdir = write_ledger(sizes=(30000, 60000), tokens=(200000, 400000))
  write_run(workdir / "odd", 50000, 300000, 3.0, tokenizer="byte")
  text = written(workdir)
  assert "There is no fit: the runs are not comparable" in text
  assert "tokenizer" in text


def test_only_failed_runs(tmp_path, write_run):
  write_run(tmp_path / "dead", 50000, 300000, None, status="failed",
            status_reason="out of memory")
  text = written(tmp_path)
  assert "There is no fit" in text and "out of memory" in text


def test_nothing_to_report(tmp_path):
  with pytest.raises(FileNotFoundError, match="nothing to report"):
    report.write(tmp_path)


def run_script(workdir: pathlib.Path) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, str(_SCRIPT), f"--workdir={workdir}"],
                        capture_output=True, text=True, timeout=60)


def test_script_takes_the_settings_of_the_recorded_fit(write_ledger):
  workdir = write_ledger(noise=0.002, corpus="synthetic", entropy_rate=1.4987)
  fit = scaling.fit(scaling.load(workdir), holdout=5, bootstrap=150,
                    params="params_non_embedding")
  (workdir / "fit.json").write_text(json.dumps(fit.to_dict()))
  done = run_script(workdir)
  assert done.returncode == 0, done.stderr
  text = (workdir / "report.html").read_text(encoding="utf-8")
  assert "The 5 runs with the most compute" in text
  assert "150 bootstrap resamples" in text
  assert html.escape(wording.parameter(fit, "A")) in text
  assert not done.stderr
  # The source's known rate stands beside the fitted irreducible loss.
  assert "1.4987 nats a token" in text
  assert fit.status == "converged"
  assert "not determined" not in text and "illustration" not in text


def test_script_with_nothing_to_report(tmp_path):
  done = run_script(tmp_path)
  assert done.returncode == 2
  assert "nothing to report" in done.stderr


@pytest.mark.parametrize("value, text", [
    (999, "999"), (1000, "1k"), (1234567, "1.23M"), (999600, "1M"),
    (2.5e9, "2.5B"), (0.2, "0.2"), (0.0, "0"), (float("nan"), "unknown"),
    (None, "unknown")])
def test_counts(value, text):
  assert wording.count(value) == text


def test_other_wordings():
  assert wording.power(3.24e15) == "3.2×10¹⁵"
  assert wording.power(9.97e15) == "1.0×10¹⁶"
  assert wording.duration(12.34) == "12.3 s"
  assert wording.duration(150) == "2.5 min"
  assert wording.duration(4020) == "1 h 7 min"
  assert wording.duration(None) == "unknown"
