# SPDX-License-Identifier: Apache-2.0
"""Whether the files of a checkpoint are those that were written: their sizes
and checksums, in a file beside them."""

import concurrent.futures
import json
import os
import pathlib
from typing import Any
import zlib

_MANIFEST = "manifest.json"
# Orbax writes them after the manifest: times, and that it is done. Nothing
# that is restored depends on them.
_WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK_BYTES = 4 << 20
_READERS = 4


def write(checkpoint: pathlib.Path) -> None:
  """Of all files in the directory, beside them."""
  paths = sorted(
      path.relative_to(checkpoint).as_posix()
      for path in checkpoint.rglob("*") if path.is_file())
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    found = pool.map(lambda path: _size_and_checksum(checkpoint / path), paths)
  manifest = {path: entry for path, entry in zip(paths, found)
              if path not in _WRITTEN_LATER}
  with open(checkpoint / _MANIFEST, "w", encoding="utf-8") as file:
    json.dump(manifest, file)
    file.flush()
    os.fsync(file.fileno())  # as Orbax does with its own


def damage(checkpoint: pathlib.Path) -> list[str]:
  """What is wrong with a checkpoint's files; empty where nothing is."""
  try:
    manifest = json.loads((checkpoint / _MANIFEST).read_bytes())
    entries = list(manifest.items())
  except FileNotFoundError:
    return [f"{_MANIFEST} is missing"]
  except (OSError, ValueError, AttributeError) as error:
    return [f"{_MANIFEST} cannot be read: {error}"]
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    found = pool.map(
        lambda entry: _file_damage(checkpoint / entry[0], entry[1]), entries)
  return [f"{path} {problem}" for (path, _), problem in zip(entries, found)
          if problem]


def _file_damage(path: pathlib.Path, expected: Any) -> str | None:
  """`expected` is [size, checksum], unless the manifest itself is damaged."""
  try:
    found = _size_and_checksum(path)
  except FileNotFoundError:
    return "is missing"
  except (OSError, ValueError) as error:
    return f"cannot be read: {error}"
  if found == expected:
    return None
  if isinstance(expected, list) and found[0] != expected[0]:
    return f"has {found[0]} bytes, not {expected[0]}"
  return "does not have its checksum"


def _size_and_checksum(path: pathlib.Path) -> list[int]:
  size = checksum = 0
  with open(path, "rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
  return [size, checksum]
