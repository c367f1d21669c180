# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back: byte, trained BPE and Unigram, or from a directory.

All are Hugging Face `tokenizers` pipelines saved as tokenizer.json with the
separator named in tokenizer_config.json. Byte, BPE and Unigram work on the
bytes of the text and give any text back exactly. The separator is a token of
its own that no text encodes to, not even its own name.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import tokenizers as hf
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

from tfjax import config as config_lib
from tfjax.data import corpora

SEPARATOR = "<|separator|>"
MASK = "[MASK]"
SENTINEL = "<extra_id_{}>"
NUM_BYTES = 256
# What of a directory a tokenizer depends on.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Trainers rescan a word for every merge in it: a text without white space must
# not be one word.
_TRAINING_PIECE_CHARACTERS = 1 << 10
# In this order: a token that ends a document is the better separator.
_SEPARATOR_ROLES = ("eos_token", "bos_token", "sep_token", "cls_token")
# What else a directory may name a token for.
_ROLES = ("mask_token", "pad_token", "unk_token")
# SentencePiece's spelling of a byte that no piece holds.
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
  """A tokenizer with a separator; `load`, `byte_level` and `train` make one."""

  def __init__(self, pipeline: hf.Tokenizer, separator: str,
               roles: Mapping[str, str] | None = None):
    # The separator's name in a text is text.
    pipeline.encode_special_tokens = True
    pipeline.no_truncation()
    pipeline.no_padding()
    self._pipeline = pipeline
    self._separator = separator
    self._roles = dict(roles or {})
    self._vocabulary = pipeline.get_vocab(with_added_tokens=True)
    self._special = {
        i for i, token in pipeline.get_added_tokens_decoder().items()
        if token.special}
    self._plain_bytes = (
        self._vocabulary == _byte_vocabulary() | {separator: NUM_BYTES})

  @property
  def vocab_size(self) -> int:
    """One more than the largest token id."""
    return max(self._vocabulary.values()) + 1

  @property
  def separator_id(self) -> int:
    return self._vocabulary[self._separator]

  @property
  def mask_id(self) -> int | None:
    return self._role("mask_token")

  @property
  def pad_id(self) -> int | None:
    return self._role("pad_token")

  @property
  def sentinel_ids(self) -> list[int]:
    """T5's <extra_id_0>, <extra_id_1>, ..., where the vocabulary has them."""
    found = []
    while (name := SENTINEL.format(len(found))) in self._vocabulary:
      found.append(self._vocabulary[name])
    return found

  @property
  def special_ids(self) -> set[int]:
    """Tokens that stand for no text, and ids that no token has."""
    gaps = set(range(self.vocab_size)) - set(self._vocabulary.values())
    return self._special | gaps | {self.separator_id}

  @property
  def is_exact(self) -> bool:
    """Whether `texts` of a text's tokens join to its very bytes."""
    settings = json.loads(self._pipeline.to_str())
    splits = _parts(settings["pre_tokenizer"])
    return (
        settings["normalizer"] is None and "ByteLevel" in splits and
        not splits["ByteLevel"]["add_prefix_space"] and
        "ByteLevel" in _parts(settings["decoder"]))

  def texts(self) -> list[bytes] | None:
    """The text that each id stands for, with the white space before it.

    Special tokens have none, b"". None: the pipeline is of no known kind
    (ByteLevel, Metaspace, WordPiece), so that there is no telling.
    """
    settings = json.loads(self._pipeline.to_str())
    decoder = _parts(settings["decoder"])
    if "ByteLevel" in decoder:
      byte_of = _byte_vocabulary()
      spell = lambda piece: bytes(byte_of[letter] for letter in piece)
    elif "WordPiece" in decoder:
      prefix = decoder["WordPiece"]["prefix"]
      spell = lambda piece: (
          piece[len(prefix):] if piece.startswith(prefix) else f" {piece}"
      ).encode()
    elif "Metaspace" in decoder or "Replace" in decoder:
      spell = _spelt_with_metaspace
    else:
      return None
    found = [b""] * self.vocab_size
    special = self.special_ids
    added = self._pipeline.get_added_tokens_decoder()
    for piece, identity in self._vocabulary.items():
      if identity not in special:
        found[identity] = (piece.encode() if identity in added
                           else spell(piece))
    return found

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The token ids of each text, without separators."""
    if self._plain_bytes:  # The same ids, a hundred times faster.
      return [np.frombuffer(text.encode(), np.uint8) for text in texts]
    encodings = self._pipeline.encode_batch_fast(
        list(texts), add_special_tokens=False)
    found = [np.asarray(encoding.ids, np.uint32) for encoding in encodings]
    unknown = self._role("unk_token")
    if unknown is not None and self.separator_id in self._special:
      # Some models (T5's Unigram) hold special tokens as pieces of text too.
      for ids in found:
        ids[ids == self.separator_id] = unknown
    return found

  def extended(self, mask: int | None, sentinels: Sequence[int], *,
               separator_first: bool) -> "Tokenizer":
    """With an objective's tokens, for use outside of training.

    The mask goes by its own name, or else MASK; sentinels by SENTINEL. Their
    names, and that of the separator, are these tokens in a text that the
    saved pipeline encodes, and it adds the separator at the start or the end.
    `encode_batch` does neither.

    Raises:
      DataError: the pipeline has such a name with another id, or gives one.
    """
    roles, wanted = dict(self._roles), {}
    if mask is not None:
      if mask != self.mask_id:
        roles["mask_token"] = MASK
      wanted[roles["mask_token"]] = mask
    wanted |= {SENTINEL.format(i): token for i, token in enumerate(sentinels)}
    pipeline = self.pipeline()
    pipeline.add_special_tokens(sorted(wanted, key=wanted.get))
    for name, identity in wanted.items():
      if pipeline.token_to_id(name) != identity:
        raise corpora.DataError(
            f"the tokenizer has no room for {name!r} as token {identity}: its "
            "ids have gaps, or the name is another token's")
    template = ["separator", "$A"] if separator_first else ["$A", "separator"]
    pipeline.post_processor = processors.TemplateProcessing(
        single=template, pair=[*template, *(
            part.replace("$A", "$B") for part in template)],
        # By another name: the separator's own may hold the template's signs.
        special_tokens=[{"id": "separator", "ids": [self.separator_id],
                         "tokens": [self._separator]}])
    return Tokenizer(pipeline, self._separator, roles)

  def pipeline(self) -> hf.Tokenizer:
    """A copy of the pipeline that `save` writes, as others use it: names of
    special tokens are these tokens."""
    return hf.Tokenizer.from_str(self._pipeline.to_str())

  def decode(self, ids: Iterable[int]) -> str:
    """The text of the ids; separators are left out."""
    return self._pipeline.decode(
        [int(i) for i in ids if i != self.separator_id],
        skip_special_tokens=False)

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes what `load` and Hugging Face's AutoTokenizer read."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._pipeline.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": self._separator, "eos_token": self._separator,
                **self._roles}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8")

  def _role(self, name: str) -> int | None:
    return self._vocabulary.get(self._roles.get(name))


def byte_level() -> Tokenizer:
  """Token i is byte i; 256 is the separator."""
  return _with_separator(_pipeline(models.BPE(_byte_vocabulary(), [])))


def train(config: config_lib.TokenizerConfig,
          texts: Iterable[str]) -> Tokenizer:
  """A BPE or Unigram vocabulary of config.vocab_size from texts.

  Reads at most config.training_bytes of the texts, from their start.

  Raises:
    ConfigError: the texts do not yield so large a vocabulary.
  """
  alphabet = sorted(_byte_vocabulary())
  common = dict(vocab_size=config.vocab_size - 1, initial_alphabet=alphabet,
                special_tokens=[], show_progress=False)
  if config.kind == "bpe":
    pipeline = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(**common)
  else:
    pipeline = _pipeline(models.Unigram())
    trainer = trainers.UnigramTrainer(**common)
  pipeline.train_from_iterator(_beginning(texts, config.training_bytes),
                               trainer)
  if pipeline.get_vocab_size() != config.vocab_size - 1:
    raise config_lib.ConfigError(
        "data.tokenizer.vocab_size", f"{config.vocab_size} is more than the "
        f"training split yields, which is {pipeline.get_vocab_size() + 1} "
        f"tokens with {config.kind}, separator included; set that or less, or "
        "use more text")
  if config.kind == "unigram":
    pipeline.model = _reproducible(pipeline)
  missing = set(alphabet) - set(pipeline.get_vocab())
  if missing:
    raise config_lib.ConfigError(
        "data.tokenizer.vocab_size", f"{config.vocab_size} leaves no room for "
        f"{len(missing)} of the {NUM_BYTES} bytes; use a larger one")
  return _with_separator(pipeline)


def vocab_size(config: config_lib.TokenizerConfig) -> int:
  """The vocab_size of the tokenizer that a store of this config will have."""
  if config.kind == "byte":
    return NUM_BYTES + 1
  if config.kind == "directory":
    return from_directory(config).vocab_size
  return config.vocab_size


def from_directory(config: config_lib.TokenizerConfig) -> Tokenizer:
  """The tokenizer of kind='directory'; its problems are the config's."""
  try:
    return load(os.path.expanduser(config.path))
  except corpora.DataError as error:
    raise config_lib.ConfigError("data.tokenizer.path", str(error)) from error


def load(directory: str | os.PathLike[str]) -> Tokenizer:
  """Reads tokenizer.json, and which token separates documents.

  Raises:
    DataError: there is no tokenizer.json, it cannot be read, or no token is
      named that can separate documents.
  """
  directory = pathlib.Path(directory)
  path = directory / "tokenizer.json"
  if not path.is_file():
    raise corpora.DataError(
        f"{directory} holds no tokenizer.json; name a directory that holds "
        "one, as tokenizer.save_pretrained of a fast Hugging Face tokenizer "
        "writes it")
  try:
    pipeline = hf.Tokenizer.from_file(str(path))
  # The library raises plain Exception.
  except Exception as error:
    raise corpora.DataError(f"{path}: not a tokenizer ({error})") from error
  names = named_tokens(directory)
  separator = _separator(directory, names)
  identity = pipeline.token_to_id(separator)
  if identity is None:
    raise corpora.DataError(
        f"{directory}: the separator {separator!r} is not in the vocabulary "
        "of tokenizer.json")
  tokenizer = Tokenizer(pipeline, separator, {
      role: names[role] for role in _ROLES
      if pipeline.token_to_id(names.get(role, "")) is not None})
  if identity in tokenizer.encode_batch([separator])[0]:
    raise corpora.DataError(
        f"{directory}: text can hold {separator!r}, the token that should "
        "separate documents; make it a special added token")
  return tokenizer


# --- Details -----------------------------------------------------------------


def _byte_vocabulary() -> dict[str, int]:
  """The printable character that stands for each byte -> the byte."""
  # Bytes that are printable in Latin-1 stand for themselves, the others for
  # the characters from 256 on, in order.
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  vocabulary, spare = {}, NUM_BYTES
  for byte in range(NUM_BYTES):
    vocabulary[chr(byte if byte in printable else spare)] = byte
    spare += byte not in printable
  return vocabulary


def _pipeline(model: models.Model) -> hf.Tokenizer:
  pipeline = hf.Tokenizer(model)
  pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  pipeline.decoder = decoders.ByteLevel()
  return pipeline


def _with_separator(pipeline: hf.Tokenizer) -> Tokenizer:
  # Added after training, so that the model itself does not know it.
  pipeline.add_special_tokens([SEPARATOR])
  return Tokenizer(pipeline, SEPARATOR)


def _reproducible(pipeline: hf.Tokenizer) -> models.Model:
  """The trained Unigram without what varies from training to training.

  Its trainer goes through randomly seeded hash tables. That moves the last
  digits of scores, the order of pieces of equal score, and which byte that no
  text held gets which score: steps of 1e-4 from the lowest one.
  """
  scores = dict(json.loads(pipeline.to_str())["model"]["vocab"])
  lowest = min(scores.values())
  for byte in _byte_vocabulary():
    if byte in scores and scores[byte] < lowest + NUM_BYTES * 1e-4:
      scores[byte] = lowest
  rounded = [(piece, round(score, 6)) for piece, score in scores.items()]
  return models.Unigram(sorted(rounded, key=lambda p: (-p[1], p[0])))


def _beginning(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
  for text in texts:
    for piece in corpora.pieces((text,), _TRAINING_PIECE_CHARACTERS):
      data = piece.encode()[:num_bytes]
      num_bytes -= len(data)
      # A character that the limit cuts is left out.
      yield data.decode(errors="ignore")
      if num_bytes <= 0:
        return


def _parts(component: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
  """The settings of a pipeline's component, or of those in a sequence."""
  if component is None:
    return {}
  for members in ("pretokenizers", "decoders"):
    if members in component:
      return {part["type"]: part for part in component[members]}
  return {component["type"]: component}


def _spelt_with_metaspace(piece: str) -> bytes:
  if _BYTE_PIECE.fullmatch(piece):
    return bytes([int(piece[3:5], 16)])
  return piece.replace("\u2581", " ").encode()


def named_tokens(directory: pathlib.Path) -> dict[str, str]:
  """Role -> token, of tokenizer_config.json before special_tokens_map.json.

  Raises:
    DataError: one of them is not JSON.
  """
  names: dict[str, str] = {}
  for name in FILES[1:]:
    path = directory / name
    if not path.is_file():
      continue
    try:
      settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise corpora.DataError(f"{path}: not JSON ({error})") from error
    for role in (*_SEPARATOR_ROLES, *_ROLES):
      token = settings.get(role) if isinstance(settings, dict) else None
      token = token.get("content") if isinstance(token, dict) else token
      if isinstance(token, str) and token:
        names.setdefault(role, token)
  return names


def _separator(directory: pathlib.Path, names: Mapping[str, str]) -> str:
  for role in _SEPARATOR_ROLES:
    if role in names:
      return names[role]
  raise corpora.DataError(
      f"{directory}: neither tokenizer_config.json nor special_tokens_map.json "
      f"names a token to separate documents; set one of "
      f"{', '.join(_SEPARATOR_ROLES)} there")
