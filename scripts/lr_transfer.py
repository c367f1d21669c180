# SPDX-License-Identifier: Apache-2.0
"""Draws loss against learning rate, a line a width, of the runs in a directory.

    scripts/lr_transfer.py --workdir=runs/lr_transfer [--output=DIRECTORY]

Writes lr_transfer.png, losses.csv (every run) and minima.csv (the best of each
width) into --output, or else into the workdir, and prints the minima. Exits 2
where there is nothing to show.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# pylint: disable=wrong-import-position
from absl import app
from absl import flags
import matplotlib

from tfjax import commandline
from tfjax import scaling
from tfjax.scaling.figures import canvas
from tfjax.scaling.figures import lr_transfer

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the sweep", required=True)
_OUTPUT = flags.DEFINE_string(
    "output", None, "directory to write to; unset: the workdir")


def main(arguments: list[str]) -> int:
  if len(arguments) > 1:
    return commandline.refuse(f"unknown argument {arguments[1]!r}")
  output = pathlib.Path(_OUTPUT.value or _WORKDIR.value)
  try:
    table = lr_transfer.losses(scaling.load(_WORKDIR.value))
  except (FileNotFoundError, ValueError) as error:
    return commandline.refuse(error)
  best = lr_transfer.minima(table)
  output.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(canvas.STYLE):
    picture = lr_transfer.picture(table)
    picture.figure.savefig(output / "lr_transfer.png")
  table.to_csv(output / "losses.csv", index=False, float_format="%.6g")
  best.to_csv(output / "minima.csv", index=False, float_format="%.6g")
  print(best.to_string(index=False))
  print(picture.caption)
  return 0


if __name__ == "__main__":
  app.run(main)
