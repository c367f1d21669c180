# SPDX-License-Identifier: Apache-2.0
"""What is in wandb's offline files: for tests that read them back."""

import json
import pathlib
import struct
from typing import Any, Iterator

from wandb.proto import wandb_internal_pb2

_HEADER, _BLOCK = 7, 32 * 1024  # bytes; LevelDB's log format
_WHOLE, _LAST = 1, 4  # kinds of a chunk that ends a record


def read(path: pathlib.Path) -> Iterator[wandb_internal_pb2.Record]:
  """The records of a .wandb file."""
  data, at, parts = path.read_bytes(), _HEADER, []
  while at + _HEADER <= len(data):
    left = _BLOCK - at % _BLOCK
    if left < _HEADER:
      at += left
      continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    parts.append(data[at + _HEADER:at + _HEADER + length])
    at += _HEADER + length
    if kind in (_WHOLE, _LAST):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(b"".join(parts))
      parts = []
      yield record


class Offline:
  """The one offline run below a directory.

  Attributes:
    run: wandb's message about it.
    config, summary: nested, as they were last.
    history: a dict a row, without wandb's own columns.
    metrics: defined metrics, by name or pattern: their x-axis, or "".
    exit_code: None where the run was not finished.
  """

  def __init__(self, directory: pathlib.Path, run_id: str):
    (path,) = directory.glob(f"wandb/offline-run-*-{run_id}/*.wandb")
    self.config: dict[str, Any] = {}
    self.summary: dict[str, Any] = {}
    self.history: list[dict[str, Any]] = []
    self.metrics: dict[str, str] = {}
    self.artifacts: dict[str, set[str]] = {}
    self.exit_code: int | None = None
    for record in read(path):
      kind = record.WhichOneof("record_type")
      if kind == "run":
        self.run = record.run
        _update(self.config, record.run.config.update)
      elif kind == "config":
        _update(self.config, record.config.update)
      elif kind == "summary":
        _update(self.summary, record.summary.update)
      elif kind == "history":
        row: dict[str, Any] = {}
        _update(row, record.history.item)
        self.history.append({name: value for name, value in row.items()
                             if not name.startswith("_")})
      elif kind == "metric":
        metric = record.metric
        self.metrics[metric.name or metric.glob_name] = metric.step_metric
      elif kind == "artifact":
        self.artifacts[record.artifact.name] = {
            entry.path for entry in record.artifact.manifest.contents}
      elif kind == "exit":
        self.exit_code = record.exit.exit_code


def _update(target: dict[str, Any], items: Any) -> None:
  for item in items:
    *path, last = item.nested_key or [item.key]
    inner = target
    for name in path:
      inner = inner.setdefault(name, {})
    inner[last] = json.loads(item.value_json)
