# SPDX-License-Identifier: Apache-2.0
"""Writes report.html and figures/ for the runs in a directory.

    scripts/report.py --workdir=runs/quickstart [--serve [--port=N]]

Fits with the settings in workdir/fit.json where scripts/fit.py left one, and
with that script's defaults otherwise. Exits 2 where there is nothing to report.

With --serve it shows a sweep while it runs, on a page that brings itself up to
date, for browsers on this machine alone; the report is made once all runs have
ended. To look at it from elsewhere: ssh -L 8000:localhost:8000, and
--port=8000. Ctrl-C ends it, and changes nothing for the sweep.
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
from tfjax.sweep import live

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of run directories", required=True)
_SERVE = flags.DEFINE_bool(
    "serve", False, "show the sweep while it runs, on 127.0.0.1")
_PORT = flags.DEFINE_integer(
    "port", None, "of --serve; 0 or unset: any that is free")


def main(arguments: list[str]) -> int:
  if len(arguments) > 1:
    return _refuse(f"unknown argument {arguments[1]!r}")
  workdir = pathlib.Path(_WORKDIR.value)
  if _SERVE.value:
    return _serve(workdir)
  if _PORT.value is not None:
    return _refuse(f"--port={_PORT.value} is for --serve; give both")
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


def _serve(workdir: pathlib.Path) -> int:
  make_report = [sys.executable, os.path.abspath(__file__),
                 f"--workdir={workdir}"]
  try:
    live.serve(workdir, _PORT.value or 0, make_report, ready=lambda url: print(
        f"live report of {workdir}: {url}  (Ctrl-C ends it)", flush=True))
  except live.ServeError as error:
    return _refuse(str(error))
  return 0


def _refuse(problem: str) -> int:
  print(f"no report: {problem}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  app.run(main)
