# SPDX-License-Identifier: Apache-2.0
"""The rows of a metrics.jsonl that is being written, as they come."""

import json
import os
import pathlib
from typing import Any, IO


class Reader:
  """Reads on from where it was; notices when the file was cut or replaced.

  Attributes:
    rows: all rows that the file holds.
  """

  def __init__(self, path: pathlib.Path):
    self.rows: list[dict[str, Any]] = []
    self._path = path
    # Held open: no file that takes its place can have its inode.
    self._file: IO[bytes] | None = None

  def poll(self) -> bool:
    """Reads what is new; says whether earlier rows may have changed.

    Raises:
      ValueError: a line is damaged. A last one that has no end yet, or that a
        kill has cut short, is left for later.
    """
    try:
      now = os.stat(self._path)
    except FileNotFoundError:
      return False
    replaced = self._file is not None and (
        not os.path.samestat(os.fstat(self._file.fileno()), now) or
        now.st_size < self._file.tell())
    if replaced:
      self._file.close()
      self.rows, self._file = [], None
    if self._file is None:
      self._file = open(self._path, "rb")
    begin = self._file.tell()
    data = self._file.read()
    whole = data[:data.rfind(b"\n") + 1]
    for line in whole.splitlines():
      row = json.loads(line)
      if not isinstance(row, dict) or not {"kind", "step"} <= row.keys():
        raise ValueError(f"{self._path} holds a line that is no row: "
                         f"{line[:80]!r}")
      self.rows.append(row)
    self._file.seek(begin + len(whole))
    return replaced
