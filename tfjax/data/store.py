# SPDX-License-Identifier: Apache-2.0
"""Token stores: a corpus, cleaned, split and tokenised once, memory-mapped.

A store is a directory: train.bin and validation.bin (little-endian token ids),
tokenizer/, and manifest.json. Each split is one stream, every document in it
preceded by the separator; a pair is two such documents, the source and the
target. The directory's name holds a hash of everything that
shaped the tokens, and it gets that name only when it is complete.

A store is built in two passes of bounded memory. The first cleans the corpus
into a spool file; only then is it known which documents are held out. The
second trains the tokenizer on the training split and encodes both.
"""

import collections
from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import socket
from typing import Any

import filelock
import numpy as np
import tokenizers as hf

from tfjax import config as config_lib
from tfjax.data import corpora
from tfjax.data import spool as spool_lib
from tfjax.data import synthetic
from tfjax.data import tokenizers

FORMAT = "tfjax token store"
FORMAT_VERSION = 2

_BATCH_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """A finished store. Bytes are of UTF-8 text; tokens include separators."""

  path: pathlib.Path
  corpus: str
  dtype: str
  vocab_size: int
  separator_id: int
  pairs: bool  # sources and targets in turn
  train_tokens: int
  validation_tokens: int
  train_bytes: int
  validation_bytes: int
  num_documents: int  # of both splits; a pair is one
  num_validation_documents: int
  # Nats a token under the true source, for synthetic text in bytes; else None.
  # This is the rate of an endless document. In the stream a separator costs
  # little (its place is a matter of counting) and the first `order` symbols
  # after one cost more, so that with documents of n bytes the least loss
  # differs from it by O(order / n) nats.
  entropy_rate: float | None
  # What was left out: empty and undecodable files, duplicate paragraphs or
  # pairs, pairs with an empty side.
  skipped: dict[str, int]

  @property
  def bytes_per_token(self) -> float:
    """Of the training split; the separators count as tokens of no bytes."""
    return self.train_bytes / self.train_tokens

  @property
  def validation_bytes_per_text_token(self) -> float:
    """Of the held-out split, separators not counted."""
    separators = self.num_validation_documents * (2 if self.pairs else 1)
    return self.validation_bytes / (self.validation_tokens - separators)

  @functools.cached_property
  def train(self) -> np.memmap:
    return np.memmap(self.path / "train.bin", self.dtype, "r")

  @functools.cached_property
  def validation(self) -> np.memmap:
    return np.memmap(self.path / "validation.bin", self.dtype, "r")

  def tokenizer(self) -> tokenizers.Tokenizer:
    return tokenizers.load(self.path / "tokenizer")


def build(config: config_lib.DataConfig, *,
          on_progress: spool_lib.Progress | None = None) -> TokenStore:
  """Opens the store of this config under cache_dir; builds it if need be.

  Processes that want the same store wait for the one that builds it.

  Raises:
    ConfigError: a key asks for what is not there or cannot be.
    DataError: the corpus or the store on disk holds unusable content.
  """
  progress = on_progress or (lambda stage, done, total: None)
  key = _key(config)
  cache = pathlib.Path(config.cache_dir).expanduser()
  path = cache / _name(config, key)
  if path.exists():
    return open_store(path)
  lock = _locked(cache, path.name, progress)
  try:
    if path.exists():
      return open_store(path)
    _remove_abandoned(cache)
    working = cache / f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
      _write(config, key, working, progress)
      _move(working, path)
    finally:
      shutil.rmtree(working, ignore_errors=True)
  finally:
    lock.release()
  return open_store(path)


def open_store(path: str | os.PathLike[str]) -> TokenStore:
  """Opens a finished store.

  Raises:
    DataError: there is none, or it is unfinished, foreign, of another format
      version, or its files do not agree with its manifest.
  """
  path = pathlib.Path(path)
  again = f"delete {path} and build it again"
  if not path.is_dir():
    raise corpora.DataError(f"{path}: no token store there")
  if not (path / "manifest.json").is_file():
    if (path / spool_lib.FILE).exists() or (path / "train.bin").exists():
      raise corpora.DataError(
          f"{path}: an unfinished token store, its build was stopped; {again}")
    raise corpora.DataError(
        f"{path}: not a token store, it has no manifest.json")
  try:
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
  except ValueError as error:
    raise corpora.DataError(
        f"{path}: manifest.json is damaged ({error}); {again}") from error
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    raise corpora.DataError(
        f"{path}: not a token store; manifest.json is of something else")
  if manifest.get("format_version") != FORMAT_VERSION:
    raise corpora.DataError(
        f"{path}: of format version {manifest.get('format_version')}, but "
        f"this code reads version {FORMAT_VERSION}; {again}")
  names = {f.name for f in dataclasses.fields(TokenStore)} - {"path"}
  if missing := sorted(names - set(manifest)):
    raise corpora.DataError(f"{path}: manifest.json is damaged, it lacks "
                            f"{', '.join(missing)}; {again}")
  store = TokenStore(path=path, **{name: manifest[name] for name in names})
  for split in spool_lib.SPLITS:
    file = path / f"{split}.bin"
    expected = (getattr(store, f"{split}_tokens") *
                np.dtype(store.dtype).itemsize)
    found = file.stat().st_size if file.exists() else None
    if found != expected:
      raise corpora.DataError(
          f"{file}: {'missing' if found is None else f'{found:,} bytes'}, but "
          f"the manifest says {expected:,} bytes; {again}")
  return store


# --- Identity and place ------------------------------------------------------


def name(config: config_lib.DataConfig) -> str:
  """Of the store's directory, for the corpus as it is now.

  Raises:
    ConfigError, DataError: as `build`, of a corpus that is not there.
  """
  return _name(config, _key(config))


def _name(config: config_lib.DataConfig, key: str) -> str:
  return f"{config.corpus}-{config.tokenizer.kind}-{key}"


def _key(config: config_lib.DataConfig) -> str:
  """16 hexadecimal digits of everything that shapes the tokens."""
  tokenizer = config.tokenizer
  shape: dict[str, Any] = {"kind": tokenizer.kind}
  if tokenizer.kind == "directory":
    # Also says early whether it can be used.
    tokenizers.from_directory(tokenizer)
    directory = pathlib.Path(tokenizer.path).expanduser()
    for name in tokenizers.FILES:
      if (directory / name).is_file():
        shape[name] = hashlib.sha256(
            (directory / name).read_bytes()).hexdigest()
  elif tokenizer.kind != "byte":
    shape |= {"vocab_size": tokenizer.vocab_size,
              "training_bytes": tokenizer.training_bytes}
  text = json.dumps({
      "format_version": FORMAT_VERSION,
      "corpus": corpora.fingerprint(config),
      "tokenizer": shape,
      "tokenizers": hf.__version__,
      "validation_fraction": config.validation_fraction,
      "split_seed": config.split_seed,
      "deduplicate": config.deduplicate,
  }, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _locked(cache: pathlib.Path, name: str,
            progress: spool_lib.Progress) -> filelock.BaseFileLock:
  try:
    cache.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(cache / f".{name}.lock")
    try:
      lock.acquire(timeout=0)
    except filelock.Timeout:
      progress("waiting for another process to build it", 0, None)
      lock.acquire()
  except OSError as error:
    raise config_lib.ConfigError(
        "data.cache_dir", f"cannot be written ({error}); name a directory "
        "that can") from error
  return lock


def _remove_abandoned(cache: pathlib.Path) -> None:
  """Deletes working directories of processes of this host that are gone."""
  for working in cache.glob(".*.tmp"):
    owner, _, pid = working.name.removesuffix(".tmp").rpartition(".")
    if owner.endswith(f".{socket.gethostname()}") and pid.isdigit():
      try:
        os.kill(int(pid), 0)
      except ProcessLookupError:
        shutil.rmtree(working, ignore_errors=True)
      except PermissionError:
        pass  # Alive, and another user's.


def _move(working: pathlib.Path, path: pathlib.Path) -> None:
  for file in working.rglob("*"):
    if file.is_file():
      with open(file, "rb") as opened:
        os.fsync(opened.fileno())
  try:
    working.rename(path)
  except OSError:
    # Where locks do not reach (some network file systems) another process may
    # have been faster; its store is as good.
    if not (path / "manifest.json").is_file():
      raise


# --- Second pass: tokens -----------------------------------------------------


def _write(config: config_lib.DataConfig, key: str, working: pathlib.Path,
           progress: spool_lib.Progress) -> None:
  """Builds the whole store in `working`, the manifest last."""
  shutil.rmtree(working, ignore_errors=True)
  working.mkdir()
  skipped: collections.Counter[str] = collections.Counter()
  spool = spool_lib.fill(config, working, skipped, progress)
  if _key(config) != key:
    raise corpora.DataError(
        f"the corpus {config.corpus!r} or the tokenizer changed while it was "
        "being read; start again when its files are at rest")
  tokenizer = _tokenizer(config.tokenizer, spool, progress)
  tokenizer.save(working / "tokenizer")
  dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
  pairs = bool(config.target_field)
  counts = _encode(spool, tokenizer, dtype, pairs, working, progress)
  spool.path.unlink()
  entropy_rate = None
  if config.corpus == "synthetic" and config.tokenizer.kind == "byte":
    entropy_rate = synthetic.MarkovSource(config.synthetic).entropy_rate
  manifest = {
      "format": FORMAT, "format_version": FORMAT_VERSION, "key": key,
      "corpus": config.corpus, "fingerprint": corpora.fingerprint(config),
      "validation_fraction": config.validation_fraction,
      "split_seed": config.split_seed, "deduplicate": config.deduplicate,
      "tokenizer": dataclasses.asdict(config.tokenizer),
      "tokenizers": hf.__version__, "dtype": dtype,
      "vocab_size": tokenizer.vocab_size,
      "separator_id": tokenizer.separator_id, "pairs": pairs,
      "train_tokens": counts["train_tokens"],
      "validation_tokens": counts["validation_tokens"],
      "train_bytes": counts["train_bytes"],
      "validation_bytes": counts["validation_bytes"],
      "num_documents": spool.num_documents,
      "num_validation_documents": counts["validation_documents"],
      "entropy_rate": entropy_rate, "skipped": dict(skipped)}
  (working / "manifest.json").write_text(
      json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _tokenizer(config: config_lib.TokenizerConfig, spool: spool_lib.Spool,
               progress: spool_lib.Progress) -> tokenizers.Tokenizer:
  if config.kind == "byte":
    return tokenizers.byte_level()
  if config.kind == "directory":
    return tokenizers.from_directory(config)
  progress("training the tokenizer", 0, None)
  return tokenizers.train(config, (
      text for document, text in spool.records()
      if spool.split(document) == "train"))


def _encode(spool: spool_lib.Spool, tokenizer: tokenizers.Tokenizer, dtype: str,
            pairs: bool, working: pathlib.Path,
            progress: spool_lib.Progress) -> collections.Counter[str]:
  """Writes both splits; counts their tokens, bytes and documents."""
  counts: collections.Counter[str] = collections.Counter()
  separator = np.asarray([tokenizer.separator_id], dtype)
  last: int | None = None
  done = 0
  with contextlib.ExitStack() as stack:
    files = {split: stack.enter_context(open(working / f"{split}.bin", "wb"))
             for split in spool_lib.SPLITS}
    for batch in _batches(spool.records()):
      ids = tokenizer.encode_batch([text for _, text in batch])
      for (document, text), piece in zip(batch, ids, strict=True):
        split = spool.split(document)
        new = document != last
        if new or pairs:
          files[split].write(separator.tobytes())
          counts[f"{split}_documents"] += new
          counts[f"{split}_tokens"] += 1
          last = document
        files[split].write(piece.astype(dtype).tobytes())
        size = len(text.encode())
        counts[f"{split}_tokens"] += len(piece)
        counts[f"{split}_bytes"] += size
        done += size
      progress("tokenising", done, spool.num_bytes)
  return counts


def _batches(records: Iterable[tuple[int, str]]
             ) -> Iterator[list[tuple[int, str]]]:
  batch, size = [], 0
  for record in records:
    batch.append(record)
    size += len(record[1])
    if size >= _BATCH_CHARACTERS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch
