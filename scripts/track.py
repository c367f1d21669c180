# SPDX-License-Identifier: Apache-2.0
"""wandb and TensorBoard, rebuilt from the records; dashboards as code.

    scripts/track.py sync WORKDIR [--run=ID ...] [--mode=online|offline]
    scripts/track.py dashboard WORKDIR [--out=FILE.json | --save]

`sync` brings every run of a sweep (or those of --run) in wandb to hold what
its records hold, any number of times, and uploads the sweep's report and
figures where scripts/report.py has written them. Offline it writes each run's
directory anew, to be sent with `wandb sync`.

`dashboard` builds the sweep's workspace and report in wandb: --save puts them
there, --out writes what would be put there.

Exits with 0 when all is done, 1 when something is not, 2 when nothing can be.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# pylint: disable=wrong-import-position
from tfjax.train.mirrors import sync

_OK, _FAILED, _REFUSED = 0, 1, 2


def main(arguments: list[str]) -> int:
  given = _parser().parse_args(arguments)
  try:
    return given.function(given)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return _REFUSED


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  commands = parser.add_subparsers(required=True, metavar="COMMAND")

  one = commands.add_parser("sync", help="rebuild runs from their records")
  one.add_argument("workdir", type=pathlib.Path)
  one.add_argument("--run", action="append", default=[], metavar="ID",
                   help="only this run; may be given several times")
  one.add_argument("--mode", choices=("auto", "online", "offline"),
                   default="auto", help="auto: as the run's config says, "
                   "where that is not `disabled`")
  one.set_defaults(function=_sync)

  one = commands.add_parser("dashboard", help="the sweep's page in wandb")
  one.add_argument("workdir", type=pathlib.Path)
  what = one.add_mutually_exclusive_group()
  what.add_argument("--out", type=pathlib.Path, metavar="FILE.json",
                    help="write the specification there; unset: print it")
  what.add_argument("--save", action="store_true",
                    help="save it in wandb, which needs a key")
  one.set_defaults(function=_dashboard)
  return parser


def _sync(given: argparse.Namespace) -> int:
  code = _OK
  for run_dir in sync.runs(given.workdir, given.run):
    done = sync.run(run_dir, given.mode)
    print(f"{done.run_id}: {done.num_rows} rows"
          + (f" in {', '.join(done.where)}" if done.where else ""), flush=True)
    for problem in done.problems:
      code = _FAILED
      print(f"{done.run_id}: {problem}", file=sys.stderr)
  if given.run:
    return code
  try:
    where = sync.report(given.workdir, given.mode)
  except Exception as error:  # pylint: disable=broad-exception-caught
    print(f"the report is not in wandb: {error!r}", file=sys.stderr)
    return _FAILED
  print(f"report: {where}" if where else
        "no report.html yet; scripts/report.py writes it")
  return code


def _dashboard(given: argparse.Namespace) -> int:
  # pylint: disable-next=import-outside-toplevel
  from tfjax.sweep import dashboard
  board = dashboard.of_workdir(given.workdir)
  if given.save:
    try:
      for name, url in dashboard.save(board).items():
        print(f"{name}: {url}")
    except dashboard.SaveError as error:
      print(f"error: {error}", file=sys.stderr)
      return _FAILED
    return _OK
  text = json.dumps(dashboard.specification(board), indent=1) + "\n"
  if given.out is None:
    print(text, end="")
  else:
    given.out.write_text(text, encoding="utf-8")
    print(f"written: {given.out}")
  return _OK


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
