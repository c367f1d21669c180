# SPDX-License-Identifier: Apache-2.0
"""A wandb that misbehaves, for a process that finds it on its path.

`install` writes this file as wandb.py into a directory. TFJAX_TEST_WANDB says
what it does: WHERE:HOW, such as `log:hang`. What it was asked goes, a line a
call, to the file TFJAX_TEST_CALLS.
"""

import os
import pathlib
import time
import types
from typing import Any


def install(directory: pathlib.Path, where: str, how: str) -> dict[str, str]:
  """What to put into the environment of a process that is to find it."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "wandb.py").write_text(
      pathlib.Path(__file__).read_text("utf-8"), encoding="utf-8")
  return dict(PYTHONPATH=str(directory), TFJAX_TEST_WANDB=f"{where}:{how}",
              TFJAX_TEST_CALLS=str(directory / "calls"))


def calls(directory: pathlib.Path) -> list[str]:
  path = directory / "calls"
  return path.read_text("utf-8").split("\n") if path.exists() else []


def _do(name: str) -> None:
  with open(os.environ["TFJAX_TEST_CALLS"], "a", encoding="utf-8") as file:
    file.write(f"{name}\n")
  where, how = os.environ["TFJAX_TEST_WANDB"].split(":")
  if where == name and how == "hang":
    time.sleep(300)
  elif where == name:
    raise RuntimeError("no such host")


Settings = types.SimpleNamespace


class _Run:
  """As much of a run as its mirror uses."""

  starting_step = 0
  url = "http://nowhere"

  def __init__(self, directory: str):
    self.dir = f"{directory}/wandb/offline-run/files"
    self.summary: dict[str, Any] = {}
    self.config = types.SimpleNamespace(update=lambda *_, **__: _do("config"))

  def define_metric(self, *_: Any, **__: Any) -> None:
    _do("define_metric")

  def log(self, _: Any) -> None:
    _do("log")

  def finish(self, **_: Any) -> None:
    _do("finish")


def init(**arguments: Any) -> _Run:
  _do(f"init {arguments['mode']}")
  _do("init")
  return _Run(arguments["dir"])


if __name__ == "wandb":
  _do("import")
