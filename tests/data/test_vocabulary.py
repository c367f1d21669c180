# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: which ids an objective gets, and what is known of each."""

from collections.abc import Iterable
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from tfjax import config as config_lib
from tfjax.data import corpora
from tfjax.data import tokenizers
from tfjax.data import vocabulary as vocabulary_lib

MASKED = {"model.family": "bert"}
SPANS = {"model.family": "t5", "model.context_length": 128}  # 6 spans
INFILLING = {"model.family": "bart", "objective.corruption": "infilling"}
NONE = {"model.family": "bart", "objective.corruption": "none",
        "objective.permute_sentences": True}
BYTES = tokenizers.byte_level()


def directory(path: pathlib.Path, pipeline: hf.Tokenizer,
              special: Iterable[str], **names: object) -> dict[str, Any]:
  """Saves a pipeline as Hugging Face does; config changes that name it."""
  pipeline.add_special_tokens(list(special))
  pipeline.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps(names))
  return {"data.tokenizer.kind": "directory", "data.tokenizer.path": str(path)}


def bert(path: pathlib.Path) -> dict[str, Any]:
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing",
            ".", "it"]
  pipeline = hf.Tokenizer(models.WordPiece(
      {piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
  pipeline.normalizer = normalizers.BertNormalizer()
  pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  pipeline.decoder = decoders.WordPiece()
  return directory(path, pipeline, pieces[:5], pad_token="[PAD]",
                   sep_token="[SEP]", mask_token={"content": "[MASK]"})


def t5(path: pathlib.Path, sentinels: int = 100) -> dict[str, Any]:
  """Its sentinels have falling ids, as in the published one."""
  pieces = ["<pad>", "</s>", "<unk>", "\u2581it", "\u2581", "is", "!",
            "<0x0A>"]
  pipeline = hf.Tokenizer(models.Unigram(
      [(piece, -1.0) for piece in pieces], unk_id=2))
  pipeline.pre_tokenizer = pre_tokenizers.Metaspace()
  pipeline.decoder = decoders.Metaspace()
  names = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
  return directory(path, pipeline, [*pieces[:3], *names],
                   eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def of(make_config, changes: dict[str, Any]) -> vocabulary_lib.Vocabulary:
  """Of a directory's tokenizer, and of it as a store keeps it."""
  config = make_config(changes)
  tokenizer = tokenizers.from_directory(config.data.tokenizer)
  found = vocabulary_lib.of(config, tokenizer)
  assert vocabulary_lib.size(config) == found.size
  kept = pathlib.Path(config.data.tokenizer.path) / "kept"
  tokenizer.save(kept)
  again = vocabulary_lib.of(config, tokenizers.load(kept))
  for name, value in vars(found).items():
    np.testing.assert_array_equal(value, getattr(again, name))
  return found


@pytest.mark.parametrize("changes, size, mask, sentinels", [
    ({}, 257, None, ()), (MASKED, 258, 257, ()), (INFILLING, 258, 257, ()),
    (NONE, 257, None, ()), (SPANS, 263, None, tuple(range(257, 263)))])
def test_objectives_get_what_they_need(
    make_config, changes: dict, size: int, mask: int, sentinels: tuple) -> None:
  config = make_config(changes)
  found = vocabulary_lib.of(config, BYTES)
  assert (found.size, found.mask, found.sentinels) == (size, mask, sentinels)
  assert vocabulary_lib.size(config) == size
  assert found.separator == found.pad == found.start == 256
  np.testing.assert_array_equal(
      np.flatnonzero(found.special), range(256, size))
  np.testing.assert_array_equal(
      found.token_bytes, [1] * 256 + [0] * (size - 256))
  assert {len(x) for x in (found.word_starts, found.sentence_ends)} == {size}
  starts = np.flatnonzero(found.word_starts[:256])
  assert bytes(starts.tolist()) == b"\t\n\v\f\r "
  ends = np.flatnonzero(found.sentence_ends)
  assert bytes(ends.tolist()) == b"!.?"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_bytes_of_trained_tokens_sum_to_the_text(
    make_config, kind: str) -> None:
  text = next(corpora.documents(config_lib.DataConfig())).text + " \n\té!"
  changes = {"data.tokenizer.kind": kind, "data.tokenizer.vocab_size": 280}
  config = make_config({**MASKED, **changes})
  tokenizer = tokenizers.train(config.data.tokenizer, [text])
  found = vocabulary_lib.of(config, tokenizer)
  assert (found.size, found.mask, found.separator) == (281, 280, 279)
  assert vocabulary_lib.size(config) == 281
  ids = tokenizer.encode_batch([text])[0]
  assert found.token_bytes[ids].sum() == len(text.encode()) > len(ids)
  for i in set(ids.tolist()):
    piece = tokenizer._pipeline.decode([i])
    assert found.word_starts[i] == piece[0].isspace()
    assert found.sentence_ends[i] == (piece[-1] in ".!?")


def test_a_directory_with_a_mask_token(
    make_config, tmp_path: pathlib.Path) -> None:
  found = of(make_config, {**MASKED, **bert(tmp_path)})
  assert (found.size, found.mask, found.pad, found.separator) == (9, 4, 0, 3)
  assert found.start == found.separator
  np.testing.assert_array_equal(np.flatnonzero(found.special), range(5))
  # Each piece without ## is a word: "play" and "ing" are one, "." another.
  np.testing.assert_array_equal(
      np.flatnonzero(~found.word_starts), [6])
  np.testing.assert_array_equal(np.flatnonzero(found.sentence_ends), [7])
  assert found.token_bytes is None  # white space and case are lost


def test_a_directory_with_sentinels(
    make_config, tmp_path: pathlib.Path) -> None:
  found = of(make_config, {**SPANS, **t5(tmp_path)})
  assert found.size == 108
  assert found.sentinels == (107, 106, 105, 104, 103, 102)
  assert (found.pad, found.start, found.separator) == (0, 0, 1)
  np.testing.assert_array_equal(
      np.flatnonzero(found.special), [0, 1, 2, *range(8, 108)])
  np.testing.assert_array_equal(
      np.flatnonzero(found.word_starts & ~found.special), [3, 4, 7])
  np.testing.assert_array_equal(np.flatnonzero(found.sentence_ends), [6])
  assert found.token_bytes is None and found.mask is None


def test_too_few_sentinels_are_added_to(
    make_config, tmp_path: pathlib.Path) -> None:
  found = of(make_config, {**SPANS, **t5(tmp_path, sentinels=4)})
  assert found.sentinels == (11, 10, 9, 8, 12, 13) and found.size == 14


def test_a_pipeline_of_no_known_kind(
    make_config, tmp_path: pathlib.Path) -> None:
  pipeline = hf.Tokenizer(models.WordLevel(
      {"[UNK]": 0, "</s>": 1, "hello": 2, "world": 7}, unk_token="[UNK]"))
  pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
  found = of(make_config, {**MASKED, **directory(
      tmp_path, pipeline, ["</s>"], eos_token="</s>", mask_token="[MASK]")})
  # The mask token that it names is not in the vocabulary.
  assert (found.size, found.mask) == (9, 8)
  assert found.word_starts is found.sentence_ends is found.token_bytes is None
  # Ids that no token has are never drawn.
  np.testing.assert_array_equal(
      np.flatnonzero(found.special), [1, 3, 4, 5, 6, 8])


@pytest.mark.parametrize("change", [
    {"normalizer": normalizers.NFC()},
    {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}])
def test_bytes_are_counted_only_where_text_comes_back(
    make_config, tmp_path: pathlib.Path, change: dict[str, Any]) -> None:
  pipeline = hf.Tokenizer.from_str(BYTES._pipeline.to_str())
  for name, value in change.items():
    setattr(pipeline, name, value)
  found = of(make_config, {**MASKED, **directory(
      tmp_path, pipeline, [], eos_token=tokenizers.SEPARATOR)})
  assert found.token_bytes is None and found.word_starts[ord(" ")]
