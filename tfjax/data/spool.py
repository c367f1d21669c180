# SPDX-License-Identifier: Apache-2.0
"""A store's first pass: the corpus cleaned, on disk, and who is held out.

Which documents are held out is known only when the whole corpus was seen, and
the tokenizer is trained on the others: so the text that deduplication left is
kept in a file, the spool, until the store is built.
"""

import collections
from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import pathlib
import sqlite3
import struct

from tfjax import config as config_lib
from tfjax.data import corpora

SPLITS = ("train", "validation")
FILE = "spool"
_SEEN_FILE = "seen.sqlite"

# (stage, bytes of text done, bytes in all or None when that is unknown)
Progress = Callable[[str, int, int | None], None]

_RECORD = struct.Struct("<QI")  # hash of the document's id; bytes of the piece
_SQLITE_CACHE_KIB = 16_384


@dataclasses.dataclass(frozen=True)
class Spool:
  """Cleaned pieces of documents on disk, and which of them are held out."""

  path: pathlib.Path
  num_documents: int
  num_bytes: int
  held_out_below: int  # documents whose hash is less are held out

  def split(self, document_hash: int) -> str:
    return SPLITS[document_hash < self.held_out_below]

  def records(self) -> Iterator[tuple[int, str]]:
    """(hash of the document's id, piece of its text), in order; of a pair the
    source, then the target."""
    with open(self.path, "rb") as file:
      while header := file.read(_RECORD.size):
        document_hash, size = _RECORD.unpack(header)
        yield document_hash, file.read(size).decode()


class _Seen:
  """Every paragraph or pair so far, as digests in a table on disk."""

  def __init__(self, directory: pathlib.Path):
    self._connection = sqlite3.connect(
        directory / _SEEN_FILE, isolation_level=None)
    for statement in ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF",
                      f"PRAGMA cache_size = -{_SQLITE_CACHE_KIB}",
                      "CREATE TABLE seen (digest BLOB PRIMARY KEY) "
                      "WITHOUT ROWID", "BEGIN"):
      self._connection.execute(statement)
    self._doc_id: str | None = None
    self._digest = hashlib.blake2b(digest_size=16)
    self._kept = True
    self.dropped = 0

  def unseen(self, document: corpora.Document) -> str:
    """The piece's text without the paragraphs that occurred before."""
    if document.doc_id != self._doc_id:
      self._doc_id = document.doc_id
      self._digest = hashlib.blake2b(digest_size=16)
      self._kept = True
    text, kept, start = document.text, [], 0
    blank = [match.span() for match in corpora.BLANK_LINES.finditer(text)]
    for end, after in (*blank, (len(text), len(text))):
      if end > start:
        # A paragraph in several pieces is known by its text up to here.
        self._digest.update(text[start:end].encode())
        self._kept = self._is_new(self._digest.digest())
      if self._kept:
        kept.append(text[start:after])
      if after > end:
        self._digest = hashlib.blake2b(digest_size=16)
      start = after
    return "".join(kept)

  def is_new_pair(self, pair: corpora.Document) -> bool:
    digest = hashlib.blake2b(digest_size=16)
    for text in (pair.text, pair.target):
      # Of one length, so that where the source ends makes a difference.
      digest.update(hashlib.blake2b(text.encode()).digest())
    return self._is_new(digest.digest())

  def _is_new(self, digest: bytes) -> bool:
    new = self._connection.execute(
        "INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1
    self.dropped += not new
    return new

  def close(self) -> None:
    self._connection.close()


def _clean(config: config_lib.DataConfig, working: pathlib.Path,
           skipped: collections.Counter[str]) -> Iterator[corpora.Document]:
  """The corpus without repeated paragraphs or pairs, and empty pieces."""
  documents = corpora.documents(config, skipped)
  # Without repeats, synthetic text would no longer follow its source.
  if not config.deduplicate or config.corpus == "synthetic":
    yield from documents
    return
  seen = _Seen(working)
  try:
    for document in documents:
      if document.target is not None:
        if seen.is_new_pair(document):
          yield document
      elif text := seen.unseen(document):
        yield corpora.Document(document.doc_id, text)
  finally:
    kind = "pairs" if config.target_field else "paragraphs"
    skipped[f"duplicate_{kind}"] = seen.dropped
    seen.close()


def fill(config: config_lib.DataConfig, working: pathlib.Path,
         skipped: collections.Counter[str], progress: Progress) -> Spool:
  """Cleans the corpus into a spool in `working`; counts what it left out.

  Raises:
    ConfigError, DataError: fewer than two documents are left.
  """
  path = working / FILE
  hashes_below = num_documents = num_bytes = 0
  threshold = int(config.validation_fraction * 2 ** 64)
  lowest, highest, last = 2 ** 64, -1, None
  with open(path, "wb") as file:
    for doc_id, text, target in _clean(config, working, skipped):
      if doc_id != last:
        if not text.strip():
          continue  # Nothing but white space so far.
        document_hash = int.from_bytes(hashlib.blake2b(
            f"{config.split_seed} {doc_id}".encode("utf-8", "surrogatepass"),
            digest_size=8).digest(), "little")
        last = doc_id
        num_documents += 1
        hashes_below += document_hash < threshold
        lowest = min(lowest, document_hash)
        highest = max(highest, document_hash)
      for part in (text,) if target is None else (text, target):
        data = part.encode()
        file.write(_RECORD.pack(document_hash, len(data)))
        file.write(data)
        num_bytes += len(data)
      progress("reading", num_bytes, None)
  (working / _SEEN_FILE).unlink(missing_ok=True)
  if lowest >= highest:
    raise _too_few_documents(config, num_documents, skipped)
  if hashes_below == 0:
    threshold = lowest + 1
  elif hashes_below == num_documents:
    threshold = highest
  return Spool(path, num_documents, num_bytes, threshold)


def _too_few_documents(config: config_lib.DataConfig, num_documents: int,
                       skipped: collections.Counter[str]) -> ValueError:
  if num_documents == 0:
    left_out = ", ".join(f"{v} {k.replace('_', ' ')}"
                         for k, v in sorted(skipped.items()) if v)
    return corpora.DataError(
        f"the corpus {config.corpus!r} holds no text"
        f"{f' (left out: {left_out})' if left_out else ''}; nothing to train "
        "on")
  key, remedy = {
      "files": ("text_unit", "name more files, or set it to 'paragraph' or "
                "'line' to make documents of a file's parts"),
      "synthetic": ("synthetic.document_bytes", "set it to half of "
                    "data.synthetic.num_bytes or less"),
      "hub": ("hub_max_documents", "use more than one row"),
  }.get(config.corpus, ("corpus", "choose another"))
  return config_lib.ConfigError(
      f"data.{key}", "the corpus is a single document, so none can be held "
      f"out for validation; {remedy}")
