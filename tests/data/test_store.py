# SPDX-License-Identifier: Apache-2.0
"""Token stores: content, identity, deduplication, and builds that die."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.data import corpora
from tfjax.data import store as store_lib
from tfjax.data import synthetic

BYTES = config_lib.TokenizerConfig(kind="byte")


def config(directory: pathlib.Path, **fields: object) -> config_lib.DataConfig:
  """Text files of a directory, in bytes; stores go next to it."""
  return config_lib.DataConfig(**{
      "corpus": "files", "files": (str(directory / "*"),), "tokenizer": BYTES,
      "cache_dir": str(directory.parent / "cache"), **fields})


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> pathlib.Path:
  """Twenty small documents."""
  directory = tmp_path / "corpus"
  directory.mkdir()
  for index in range(20):
    (directory / f"{index:02}.txt").write_text(
        f"Document {index} é.\n\nIts second paragraph, {index ** 3}.\n")
  return directory


def documents(store: store_lib.TokenStore, split: str) -> list[str]:
  tokenizer = store.tokenizer()
  tokens = np.asarray(getattr(store, split))
  assert tokens[0] == store.separator_id
  starts = np.flatnonzero(tokens == store.separator_id)
  return [tokenizer.decode(part) for part in np.split(tokens, starts[1:])]


def test_a_store_holds_every_document_once(corpus: pathlib.Path) -> None:
  store = store_lib.build(config(corpus, validation_fraction=0.3))
  train, validation = documents(store, "train"), documents(store, "validation")
  texts = [p.read_text() for p in sorted(corpus.iterdir())]
  assert sorted(train + validation) == sorted(texts)
  assert [t for t in texts if t in train] == train  # in order
  assert 1 < len(validation) < 15
  assert (store.num_documents, store.num_validation_documents) == (
      20, len(validation))
  assert store.train_tokens == sum(len(t.encode()) + 1 for t in train)
  assert store.bytes_per_token == (
      sum(len(t.encode()) for t in train) / store.train_tokens)
  assert store.validation_bytes_per_text_token == 1.0  # separators apart
  assert (store.vocab_size, store.separator_id) == (257, 256)
  assert store.corpus == "files" and store.entropy_rate is None
  assert store.train.dtype == np.uint16
  with pytest.raises(ValueError, match="read-only"):
    store.train[0] = 1


def test_trained_tokenizers_see_the_training_split_only(
    corpus: pathlib.Path) -> None:
  bpe = config_lib.TokenizerConfig(kind="bpe", vocab_size=280)
  data = config(corpus, tokenizer=bpe, validation_fraction=0.3)
  before = store_lib.build(data)
  held_out = documents(before, "validation")[0]
  path = next(p for p in corpus.iterdir() if p.read_text() == held_out)
  path.write_text("zqzqzq " * 500)
  after = store_lib.build(data)
  assert before.path != after.path
  assert ((before.path / "tokenizer/tokenizer.json").read_text() ==
          (after.path / "tokenizer/tokenizer.json").read_text())
  np.testing.assert_array_equal(before.train, after.train)
  assert "zqzqzq" in "".join(documents(after, "validation"))


def test_large_vocabularies_take_four_bytes(
    corpus: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(
      store_lib.tokenizers.Tokenizer, "vocab_size", (1 << 16) + 1)
  wide = store_lib.build(config(corpus))
  assert wide.train.dtype == np.uint32
  assert len(wide.train) == wide.train_tokens
  assert wide.train.max() == 256


def test_sotu_is_built_once(tmp_path: pathlib.Path) -> None:
  data = config_lib.DataConfig(tokenizer=BYTES, cache_dir=str(tmp_path))
  stages: collections.Counter[str] = collections.Counter()
  store = store_lib.build(
      data, on_progress=lambda stage, done, total: stages.update([stage]))
  assert set(stages) == {"reading", "tokenising"}
  assert store.num_documents == 249
  assert store.train_bytes + store.validation_bytes > 11_000_000
  assert store.skipped["duplicate_paragraphs"] > 100
  seen = stages.copy()
  again = store_lib.build(dataclasses.replace(
      data, unique_tokens=5, shuffle_seed=7, max_epochs=3.0),
      on_progress=lambda stage, done, total: stages.update([stage]))
  assert again == store and stages == seen


@pytest.mark.parametrize("change", [
    {"split_seed": 1}, {"validation_fraction": 0.1}, {"deduplicate": False},
    {"text_unit": "line"}, {"tokenizer": config_lib.TokenizerConfig(
        kind="bpe", vocab_size=260)}])
def test_what_shapes_tokens_is_in_the_key(
    corpus: pathlib.Path, change: dict[str, object]) -> None:
  data = config(corpus)
  assert (store_lib.build(data).path !=
          store_lib.build(dataclasses.replace(data, **change)).path)


def test_a_changed_tokenizer_directory_is_another_store(
    corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
  store = store_lib.build(config(corpus))
  directory = tmp_path / "tokenizer"
  shutil.copytree(store.path / "tokenizer", directory)
  data = config(corpus, tokenizer=config_lib.TokenizerConfig(
      kind="directory", path=str(directory)))
  before = store_lib.build(data)
  np.testing.assert_array_equal(before.train, store.train)
  path = directory / "tokenizer.json"
  path.write_text(path.read_text() + " ")
  assert store_lib.build(data).path != before.path


def test_held_out_documents_do_not_depend_on_the_others(
    corpus: pathlib.Path) -> None:
  data = config(corpus, validation_fraction=0.3)
  before = documents(store_lib.build(data), "validation")
  (corpus / "99.txt").write_text("A new document.")
  after = documents(store_lib.build(data), "validation")
  assert [t for t in after if t != "A new document."] == before
  other = documents(store_lib.build(
      dataclasses.replace(data, split_seed=1)), "validation")
  assert other != after


def test_each_split_gets_a_document(corpus: pathlib.Path) -> None:
  for path in sorted(corpus.iterdir())[2:]:
    path.unlink()
  for seed in range(8):  # None, one or both may fall below one half.
    for fraction in (1e-6, 0.5):
      store = store_lib.build(config(
          corpus, split_seed=seed, validation_fraction=fraction))
      assert (store.num_documents, store.num_validation_documents) == (2, 1)


def test_entropy_rate_is_kept_for_synthetic_bytes(
    tmp_path: pathlib.Path) -> None:
  data = config_lib.DataConfig(
      corpus="synthetic", tokenizer=BYTES, cache_dir=str(tmp_path),
      # Documents so short that many are equal: none may be dropped.
      synthetic=config_lib.SyntheticConfig(
          num_symbols=3, num_bytes=30_000, document_bytes=6))
  store = store_lib.build(data)
  source = synthetic.MarkovSource(data.synthetic)
  assert store.entropy_rate == source.entropy_rate
  assert store.num_documents == 5_000
  bpe = store_lib.build(dataclasses.replace(
      data, tokenizer=config_lib.TokenizerConfig(kind="bpe", vocab_size=260)))
  assert bpe.entropy_rate is None


# --- Deduplication and long text ---------------------------------------------


def test_paragraphs_occur_once(tmp_path: pathlib.Path) -> None:
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  (corpus / "a.txt").write_text("one\n\ntwo\n \n\none\n\nthree")
  (corpus / "b.txt").write_text("three\n\nfour\n\ntwo\n")
  (corpus / "c.txt").write_text("one\n\nthree")
  store = store_lib.build(config(corpus))
  found = documents(store, "train") + documents(store, "validation")
  # "two\n" at the end of a file is not the paragraph "two".
  assert sorted(found) == ["four\n\ntwo\n", "one\n\ntwo\n \n\nthree"]
  assert store.skipped == {"duplicate_paragraphs": 4}
  kept = store_lib.build(config(corpus, deduplicate=False))
  assert kept.num_documents == 3


def test_pairs_are_held_out_whole_and_occur_once(
    tmp_path: pathlib.Path) -> None:
  rows = [{"text": f"source {i}", "target": f"target {i}"} for i in range(30)]
  repeated = [rows[3], {"text": "source 3", "target": "another"},
              {"text": "source 4target", "target": " 4"},
              {"text": "source 5", "target": None}]
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows + repeated))
  data = config_lib.DataConfig(
      corpus="files", files=(str(path),), target_field="target",
      tokenizer=BYTES, cache_dir=str(tmp_path / "cache"),
      validation_fraction=0.3)
  store = store_lib.build(data)
  assert store.pairs and store.skipped == {
      "duplicate_pairs": 1, "pairs_with_an_empty_side": 1}
  assert store.num_documents == 32
  found = {}
  for split in ("train", "validation"):
    texts = documents(store, split)
    found[split] = list(zip(texts[::2], texts[1::2], strict=True))
    assert found[split] and texts[0].startswith("source")
    assert getattr(store, f"{split}_tokens") == sum(
        len(text) + 1 for text in texts)
  assert sorted(found["train"] + found["validation"]) == sorted(
      (row["text"], row["target"]) for row in rows + repeated[1:3])
  assert store.num_validation_documents == len(found["validation"]) < 20
  plain = store_lib.build(dataclasses.replace(
      data, target_field="", deduplicate=False))
  assert not plain.pairs and plain.path != store.path
  assert store_lib.build(dataclasses.replace(
      data, deduplicate=False)).num_documents == 33


def test_paragraphs_longer_than_a_piece(tmp_path: pathlib.Path) -> None:
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  # Every piece of it is equal, but it is one paragraph that occurs first here.
  long = "abcd" * 300_000
  (corpus / "a.txt").write_text(f"start\n\n{long}\n\nend of a")
  (corpus / "b.txt").write_text(f"other start\n\n{long}\n\nend of b")
  store = store_lib.build(config(corpus))
  found = documents(store, "train") + documents(store, "validation")
  assert sorted(found) == [
      "other start\n\nend of b", f"start\n\n{long}\n\nend of a"]


def test_one_gigantic_line(tmp_path: pathlib.Path) -> None:
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  random = np.random.default_rng(0)
  line = bytes(random.integers(97, 123, 5_000_000, np.uint8)).decode()
  (corpus / "a.txt").write_text(line)
  (corpus / "b.txt").write_text("a small document")
  store = store_lib.build(config(corpus, text_unit="line"))
  # All pieces of it are one document, on one side of the split.
  assert store.num_documents == 2
  assert line in documents(store, "train") + documents(store, "validation")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(tmp_path: pathlib.Path) -> None:
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  random = np.random.default_rng(0)
  with open(corpus / "a.txt", "wb") as file:
    for _ in range(60):
      letters = random.integers(97, 123, 1_000_000, np.uint8)
      letters[::7] = ord(" ")
      letters[::500] = letters[1::500] = ord("\n")
      file.write(letters.tobytes())
  (corpus / "b.txt").write_text("short")
  program = f"""
from tfjax import config
from tfjax.data import store
def memory(key):
  # getrusage would start from the peak of the process that started this one.
  lines = open("/proc/self/status").read().splitlines()
  return next(int(l.split()[1]) for l in lines if l.startswith(key)) // 1024
before = memory("VmRSS:")
built = store.build(config.DataConfig(
    corpus="files", files=({str(corpus / "*")!r},),
    tokenizer=config.TokenizerConfig(kind="byte"),
    cache_dir={str(tmp_path / "cache")!r}))
print(built.train_tokens + built.validation_tokens, memory("VmHWM:") - before)
"""
  out = subprocess.run([sys.executable, "-c", program], check=True,
                       capture_output=True, text=True).stdout
  tokens, growth_mib = map(int, out.split())
  assert tokens == 60_000_000 + 5 + 2
  assert growth_mib < 40  # less than the corpus, its digests or its tokens


# --- Builds that die, and others at the same time ----------------------------

BUILDER = """
import sys
from tfjax import config
from tfjax.data import store
def progress(stage, done, total):
  print(stage, flush=True)
  if stage == sys.argv[3]:
    sys.stdin.readline()
built = store.build(config.DataConfig(
    corpus="files", files=(sys.argv[1],), cache_dir=sys.argv[2],
    tokenizer=config.TokenizerConfig(kind="byte")), on_progress=progress)
print("built", built.path, flush=True)
"""


def builder(data: config_lib.DataConfig, pause_at: str) -> subprocess.Popen:
  """A process that builds the store and waits in a stage for a line."""
  return subprocess.Popen(
      [sys.executable, "-c", BUILDER, data.files[0], data.cache_dir, pause_at],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", ["reading", "tokenising"])
def test_a_killed_build_is_not_taken_for_finished(
    corpus: pathlib.Path, stage: str) -> None:
  data = config(corpus)
  cache = pathlib.Path(data.cache_dir)
  process = builder(data, pause_at=stage)
  while process.stdout.readline().strip() != stage:
    assert process.poll() is None
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  process.stdin.close()
  left = [p for p in cache.iterdir() if p.is_dir()]
  assert len(left) == 1 and left[0].name.endswith(f".{process.pid}.tmp")
  with pytest.raises(corpora.DataError, match="unfinished.*delete"):
    store_lib.open_store(left[0])
  store = store_lib.build(data)
  assert store.num_documents == 20
  assert [p for p in cache.iterdir() if p.is_dir()] == [store.path]


def test_a_second_builder_waits_and_reuses(corpus: pathlib.Path) -> None:
  data = config(corpus)
  first = builder(data, pause_at="tokenising")
  while first.stdout.readline().strip() != "tokenising":
    assert first.poll() is None
  second = builder(data, pause_at="never")
  assert second.stdout.readline().startswith("waiting")
  first_said = first.communicate("\n", timeout=60)[0].splitlines()
  second_said = second.communicate(timeout=60)[0].splitlines()
  assert first.returncode == second.returncode == 0
  assert second_said == [first_said[-1]]  # built nothing, opened the same
  assert second_said[0] == f"built {store_lib.build(data).path}"


def test_another_that_was_faster_is_used(
    corpus: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Where locks do not reach, the store may appear during a build."""
  data = config(corpus)
  write = store_lib._write
  def overtaken(config, key, working, progress):
    write(config, key, working, progress)
    name = f"{config.corpus}-{config.tokenizer.kind}-{key}"
    shutil.copytree(working, working.parent / name)
  monkeypatch.setattr(store_lib, "_write", overtaken)
  store = store_lib.build(data)
  assert [p for p in store.path.parent.iterdir() if p.is_dir()] == [store.path]


def test_a_failed_build_leaves_nothing(corpus: pathlib.Path) -> None:
  (corpus / "zz.txt").write_bytes(b"\xff")
  data = config(corpus)
  with pytest.raises(corpora.DataError, match="zz.txt"):
    store_lib.build(data)
  assert not [p for p in pathlib.Path(data.cache_dir).iterdir() if p.is_dir()]


def test_a_corpus_that_changes_during_a_build(corpus: pathlib.Path) -> None:
  def progress(stage: str, done: int, total: int | None) -> None:
    (corpus / "00.txt").write_text(f"changed {done}")
  with pytest.raises(corpora.DataError, match="changed while"):
    store_lib.build(config(corpus), on_progress=progress)


# --- What open_store refuses -------------------------------------------------


def edit_manifest(path: pathlib.Path, **changes: object) -> None:
  manifest = json.loads((path / "manifest.json").read_text())
  manifest |= changes
  (path / "manifest.json").write_text(json.dumps(
      {k: v for k, v in manifest.items() if v != "absent"}))


DAMAGE = {
    "no token store there": shutil.rmtree,
    "unfinished": lambda path: (path / "manifest.json").unlink(),
    "not a token store": lambda path: edit_manifest(path, format="other"),
    "of something else": lambda path: (
        path / "manifest.json").write_text("[1]"),
    "manifest.json is damaged": lambda path: (
        path / "manifest.json").write_text('{"format":'),
    "format version 0, but": lambda path: edit_manifest(
        path, format_version=0),
    "lacks train_tokens": lambda path: edit_manifest(
        path, train_tokens="absent"),
    "train.bin: .* bytes, but": lambda path: os.truncate(
        path / "train.bin", 11),
    "validation.bin: missing": lambda path: (
        path / "validation.bin").unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_stores_are_refused(
    corpus: pathlib.Path, message: str) -> None:
  data = config(corpus)
  path = store_lib.build(data).path
  DAMAGE[message](path)
  with pytest.raises(corpora.DataError, match=message) as info:
    store_lib.open_store(path)
  assert str(path) in str(info.value)
  if path.exists():  # Nothing is deleted or rebuilt behind one's back.
    with pytest.raises(corpora.DataError, match=message):
      store_lib.build(data)


def test_a_foreign_directory_is_refused(tmp_path: pathlib.Path) -> None:
  (tmp_path / "something.txt").write_text("")
  with pytest.raises(corpora.DataError, match="not a token store"):
    store_lib.open_store(tmp_path)


# --- Corpora that cannot be split --------------------------------------------


def test_a_single_document_says_what_to_do(tmp_path: pathlib.Path) -> None:
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  (corpus / "a.txt").write_text("one\n\ntwo\n\nthree")
  with pytest.raises(config_lib.ConfigError, match="'paragraph'") as info:
    store_lib.build(config(corpus))
  assert info.value.key == "data.text_unit"
  store = store_lib.build(config(corpus, text_unit="paragraph"))
  assert store.num_documents == 3


def test_a_corpus_without_text(tmp_path: pathlib.Path) -> None:
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  (corpus / "a.txt").write_text("")
  (corpus / "b.txt").write_text("\n\n")
  with pytest.raises(corpora.DataError, match="no text.*2 empty files"):
    store_lib.build(config(corpus))


def test_skipped_files_are_in_the_manifest(corpus: pathlib.Path) -> None:
  (corpus / "empty.txt").write_text("")
  store = store_lib.build(config(corpus))
  assert store.skipped["empty_files"] == 1
  assert store_lib.open_store(store.path).skipped == store.skipped


def test_too_little_text_for_the_vocabulary(corpus: pathlib.Path) -> None:
  with pytest.raises(config_lib.ConfigError, match=r"yields, which is \d+"):
    store_lib.build(config(corpus, tokenizer=config_lib.TokenizerConfig(
        kind="bpe", vocab_size=5000)))


def test_a_cache_that_cannot_be_written(corpus: pathlib.Path) -> None:
  blocked = corpus.parent / "file"
  blocked.write_text("")
  with pytest.raises(config_lib.ConfigError, match=re.escape(str(blocked))
                     ) as info:
    store_lib.build(config(corpus, cache_dir=str(blocked / "cache")))
  assert info.value.key == "data.cache_dir"
