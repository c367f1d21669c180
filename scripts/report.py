# SPDX-License-Identifier: Apache-2.0
"""Writes report.html and figures/ for the runs in a directory.

    scripts/report.py --workdir=runs/quickstart

Fits with the settings in workdir/fit.json where scripts/fit.py left one, and
with that script's defaults otherwise. Exits 2 where there is nothing to report.
"""

import inspect
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Fits are float64 on the host; an accelerator may be busy with training.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# pylint: disable=wrong-import-position
from absl import app
from absl import flags

from tfjax import scaling
from tfjax.scaling import report

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of run directories", required=True)


def main(arguments: list[str]) -> int:
  if len(arguments) > 1:
    return _refuse(f"unknown argument {arguments[1]!r}")
  workdir = pathlib.Path(_WORKDIR.value)
  record, settings = workdir / "fit.json", None
  try:
    if record.is_file():
      settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
      inspect.signature(scaling.fit).bind(None, **settings)
  except (KeyError, TypeError, json.JSONDecodeError) as error:
    return _refuse(f"{record} is not a fit's record ({error!r}); "
                   "delete it, or run scripts/fit.py again")
  try:
    path = report.write(workdir, settings)
  except (FileNotFoundError, ValueError) as error:
    return _refuse(str(error))
  print(f"report: {path}")
  return 0


def _refuse(problem: str) -> int:
  print(f"no report: {problem}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  app.run(main)
