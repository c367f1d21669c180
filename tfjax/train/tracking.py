# SPDX-License-Identifier: Apache-2.0
"""That a run has mirrors, in wandb and TensorBoard, and never notices them.

They are kept by a process of its own (`tfjax.train.mirrors.follow`), which
reads the run's rows from its files. Training tells that process, through a
pipe that it never waits for, when a run begins and when it ends. When wandb
raises, hangs or is slow, only the mirror is behind; `scripts/track.py sync`
rebuilds it at any time.
"""

import importlib.util
import json
import logging
import os
import pathlib
import select
import subprocess
import sys
import time
from typing import Any, Mapping

import tfjax
from tfjax import config as config_lib
from tfjax.train.mirrors import columns
from tfjax.train.mirrors import follow

_LOG = logging.getLogger("tfjax")
# Of the time that a process has trained, the share that it waits at the ends
# of its runs for their mirrors, and how long at most. The mirrors do not need
# it, but a container is ended with its first process.
_WAIT_SHARE = 0.01
_WAIT_SECONDS = 20.0


def check(tracking: config_lib.TrackingConfig) -> None:
  """Raises a ConfigError where what was asked for is not installed."""
  if tracking.tensorboard and not importlib.util.find_spec("tensorboardX"):
    raise config_lib.ConfigError(
        "tracking.tensorboard", "needs tensorboardX, which is not installed: "
        "pip install 'tfjax[tensorboard]', or leave it False")


class Mirror:
  """The mirrors of one run, at the process that trains it.

  Args:
    derived: numbers of the run's plan (`columns.plan_of`).
  """

  def __init__(self, config: config_lib.ExperimentConfig,
               run_dir: pathlib.Path, sweep: str | None,
               derived: Mapping[str, Any] | None = None):
    check(config.tracking)
    self._run = str(run_dir.absolute())
    self._process: _Process | None = None
    if config.tracking.wandb == "disabled" and not config.tracking.tensorboard:
      return
    try:
      (run_dir / columns.NOTE).write_text(json.dumps(
          dict(sweep=sweep, derived=dict(derived or {}))), encoding="utf-8")
      self._process = _process(run_dir)
    except OSError as error:  # a full disk, too many processes
      _LOG.warning("%s has no mirrors: %s", run_dir.name, error)
      return
    self._process.tell("begin", self._run)

  def close(self) -> None:
    """The run writes no more rows; its result may follow."""
    if self._process is not None:
      self._process.tell("end", self._run)

  def finish(self) -> None:
    """The run's result is written; waits a little for its mirrors."""
    if self._process is None:
      return
    answer = self._process.wait(self._run)
    name = pathlib.Path(self._run).name
    for problem in (answer or {}).get("problems", []):
      _LOG.warning("%s: its mirror is not whole: %s; scripts/track.py sync "
                   "rebuilds it", name, problem)
    if answer is None and not self._process.is_alive():
      _LOG.warning("%s: the process of its mirrors has ended, see %s; "
                   "scripts/track.py sync rebuilds them", name, follow.LOG)


def amended(config: config_lib.ExperimentConfig, run_dir: pathlib.Path) -> None:
  """The result of a run that has ended was changed, by whoever has not
  trained it: its mirror in wandb follows."""
  # TensorBoard files hold no result.
  if config.tracking.wandb == "disabled":
    return
  try:
    process = _process(run_dir)
  except OSError as error:
    _LOG.warning("%s: its mirror does not follow: %s", run_dir.name, error)
    return
  for event in ("begin", "end"):
    process.tell(event, str(run_dir.absolute()))


class _Process:
  """The process that keeps the mirrors of all runs of this one."""

  def __init__(self, log: pathlib.Path):
    root = str(pathlib.Path(tfjax.__file__).absolute().parents[1])
    known = os.environ.get("PYTHONPATH")
    with open(log, "ab") as file:
      self._process = subprocess.Popen(
          # -P: modules in the current directory shadow nothing.
          [sys.executable, "-P", "-m", follow.__name__],
          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
          env={**os.environ, "PYTHONPATH": os.pathsep.join(
              [root, known] if known else [root])},
          # Out of reach of what ends this one and all of its group.
          start_new_session=True)
    os.set_blocking(self._process.stdin.fileno(), False)
    os.set_blocking(self._process.stdout.fileno(), False)
    self._begun = time.monotonic()
    self._waited = 0.0
    self._answers: dict[str, dict[str, Any]] = {}
    self._partial = b""

  def is_alive(self) -> bool:
    return self._process.poll() is None

  def tell(self, event: str, run: str) -> None:
    """Never waits: what a full pipe does not take is left to `sync`."""
    self._answers.pop(run, None)
    line = json.dumps(dict(event=event, run=run)).encode() + b"\n"
    try:
      os.write(self._process.stdin.fileno(), line)
    except OSError as error:
      _LOG.warning("%s: its mirrors do not follow (%s); scripts/track.py sync "
                   "rebuilds them", pathlib.Path(run).name, error)

  def wait(self, run: str, seconds: float | None = None
           ) -> dict[str, Any] | None:
    """The answer for a run that has ended, if it comes in time."""
    begin = time.monotonic()
    if seconds is None:
      seconds = min(_WAIT_SECONDS,
                    _WAIT_SHARE * (begin - self._begun) - self._waited)
    output = self._process.stdout
    while run not in self._answers:
      left = begin + seconds - time.monotonic()
      if not select.select([output], [], [], max(0.0, left))[0]:
        break
      data = os.read(output.fileno(), 1 << 16)
      if not data:  # it has ended
        break
      *lines, self._partial = (self._partial + data).split(b"\n")
      for answer in map(json.loads, lines):
        self._answers[answer["run"]] = answer
    self._waited += time.monotonic() - begin
    return self._answers.get(run)


_current: _Process | None = None


def _process(run_dir: pathlib.Path) -> _Process:
  """The one there is, or a new one."""
  global _current  # pylint: disable=global-statement
  if _current is None or not _current.is_alive():
    _current = _Process(run_dir / follow.LOG)
  return _current
