# SPDX-License-Identifier: Apache-2.0
"""The loss curves of runs that are being written, read a piece at a time.

A `Follower` keeps its place in one metrics.jsonl and reads what was added
since; `thin` makes a curve small enough for a page. Whole files are read by
`tfjax.train.records`, where a run stands is the ledger's to know.
"""

import array
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

MOST_POINTS = 300  # of a curve that is sent to a page
KINDS = ("train", "evaluation")
# Bytes before the place in a file that must be as they were: a run that
# resumes writes its file anew, and may get the old one's inode.
_SEAM_BYTES = 64


class Follower:
  """The curves of one metrics.jsonl, as far as it has been read.

  A file that was replaced or cut is read from its begin again. What follows
  the last newline is half a row, and is left for the next time.

  Attributes:
    version: grows with every change of the curves.
    last: the last row of training.
    damaged: lines that are no rows, and are left out.
    behind: whether there was more than could be read.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.version = 0
    self._path = pathlib.Path(path)
    self._forget()

  def _forget(self) -> None:
    self.last: dict[str, Any] = {}
    self.damaged = 0
    self.behind = False
    self._file: tuple[int, int] | None = None  # device and inode
    self._size = self._place = 0
    self._seam = b""
    self._steps = {kind: array.array("d") for kind in KINDS}
    self._losses = {kind: array.array("d") for kind in KINDS}
    self._per_step: dict[str, float] = {}

  def read(self, most_bytes: int) -> int:
    """Reads on, `most_bytes` at most; returns how many it has read."""
    try:
      found = os.stat(self._path)
      if (found.st_dev, found.st_ino) == self._file and (
          found.st_size == self._size and not self.behind):
        return 0
      return self._read(most_bytes)
    except (FileNotFoundError, NotADirectoryError):
      self.behind = False
      if self._file is not None:
        self._forget()
        self.version += 1
      return 0

  def _read(self, most_bytes: int) -> int:
    with open(self._path, "rb") as file:
      found = os.fstat(file.fileno())
      identity = (found.st_dev, found.st_ino)
      file.seek(max(0, self._place - len(self._seam)))
      if identity != self._file or file.read(len(self._seam)) != self._seam:
        self._forget()
        self._file = identity
        self.version += 1
        file.seek(0)
      data = file.read(most_bytes)
    whole = data.rfind(b"\n") + 1
    if whole == 0 and len(data) == most_bytes:
      whole = len(data)  # No row is so long: skipped, or it would stay here.
    self._size = found.st_size
    self.behind = self._place + len(data) < found.st_size
    if whole:
      self._take(data[:whole])
      self._place += whole
      self._seam = (self._seam + data[:whole])[-_SEAM_BYTES:]
      self.version += 1
    return len(data)

  def _take(self, data: bytes) -> None:
    for line in data.split(b"\n"):
      if not line:
        continue
      try:
        row = json.loads(line)
        kind, step, loss = row["kind"], row["step"], row.get("loss")
        if kind not in KINDS:
          continue
        if kind == "train":
          self.last = row
        if loss is not None and math.isfinite(loss) and step > 0:
          self._per_step = {name: row[name] / step
                            for name in ("tokens", "flops")}
          self._steps[kind].append(step)
          self._losses[kind].append(loss)
      except (ValueError, KeyError, TypeError, AttributeError):
        self.damaged += 1

  def curves(self) -> dict[str, Any]:
    """For JSON: `train` and `evaluation`, each [steps, losses] of at most
    `MOST_POINTS` points, and `per_step`, what a step has of tokens and FLOPs.
    """
    result: dict[str, Any] = dict(per_step=self._per_step)
    for kind in KINDS:
      steps, losses = np.array(self._steps[kind]), np.array(self._losses[kind])
      kept = thin(steps, losses, MOST_POINTS)
      result[kind] = [[int(step) for step in steps[kept]],
                      [float(f"{loss:.5g}") for loss in losses[kept]]]
    return result


def thin(x: np.ndarray, y: np.ndarray, most: int) -> np.ndarray:
  """Indices of at most `most` points that a curve looks the same by.

  Of every stretch of x its lowest and highest points stay, so that no spike
  is lost, and so do both ends. Stretches are even on a linear axis and even
  on a log axis, both, as a reader may choose either.

  Args:
    x: positive and ascending.
    most: 6 at least.
  """
  if len(x) <= most:
    return np.arange(len(x))
  # Two sets of n stretches have 2n - 1 edges within: two points of each
  # stretch, and the ends.
  number = (most - 2) // 4
  edges = np.unique(np.concatenate(
      [np.linspace(x[0], x[-1], number + 1)[1:-1],
       np.geomspace(x[0], x[-1], number + 1)[1:-1]]))
  stretch = np.searchsorted(edges, x, side="right")
  order = np.lexsort((y, stretch))
  starts = np.flatnonzero(np.r_[True, np.diff(stretch[order]) > 0])
  ends = np.r_[starts[1:], len(x)] - 1
  return np.unique(np.r_[0, order[starts], order[ends], len(x) - 1])
