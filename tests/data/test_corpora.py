# SPDX-License-Identifier: Apache-2.0
"""Corpora: real text in order, bounded pieces, and clear errors."""

import collections
import dataclasses
import gzip
import json
import pathlib
import re

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from tfjax import config as config_lib
from tfjax.data import corpora
from tfjax.data import synthetic


def files(*names: object, **fields: object) -> config_lib.DataConfig:
  return config_lib.DataConfig(
      corpus="files", files=tuple(map(str, names)), **fields)


def read(config: config_lib.DataConfig) -> list[tuple[str, str]]:
  """(id, text) of whole documents."""
  found: dict[str, str] = {}
  for doc_id, text, _ in corpora.documents(config):
    found[doc_id] = found.get(doc_id, "") + text
  return list(found.items())


def test_sotu_is_the_speeches_without_the_audience() -> None:
  speeches = read(config_lib.DataConfig(corpus="sotu"))
  assert len(speeches) == 249
  assert sum(len(text) for _, text in speeches) > 12_000_000
  assert speeches[0][0] == "1790-Washington-1"
  assert speeches[0][1].startswith("Fellow-Citizens of the Senate")
  for doc_id, text in speeches:
    assert not re.search(r"^Audience members?\b", text, re.M), doc_id
    assert not re.match(r"\[[^\]]*\]\s*\n|Jump to|\s", text), doc_id
    assert "\n\n\n" not in text
  assert dict(speeches)["2026-Trump-1"].count("The President. Thank you.") > 0


def test_stdlib_is_source_without_tests_and_packages() -> None:
  skipped: collections.Counter[str] = collections.Counter()
  config = config_lib.DataConfig(corpus="stdlib")
  ids = [d.doc_id for d in corpora.documents(config, skipped)]
  assert "json/decoder.py" in ids and "argparse.py" in ids
  assert ids == [d.doc_id for d in corpora.documents(config)]
  assert not [i for i in ids if re.search(
      r"(^|/)(tests?|idle_test|site-packages)/", i)]
  text = dict(read(config))["json/decoder.py"]
  assert text == pathlib.Path(json.decoder.__file__).read_text("utf-8")


def test_stdlib_skips_and_counts_other_encodings(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  (tmp_path / "a.py").write_bytes("# caf\xe9\n".encode("latin-1"))
  (tmp_path / "b.py").write_text("x = 1\n")
  (tmp_path / "c.py").write_text("")
  monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: str(tmp_path))
  skipped: collections.Counter[str] = collections.Counter()
  found = list(corpora.documents(config_lib.DataConfig(corpus="stdlib"),
                                 skipped))
  assert found == [corpora.Document("b.py", "x = 1\n")]
  assert skipped == {"not_utf8_files": 1, "empty_documents": 1}


def test_text_units(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "a.txt"
  path.write_bytes("\ufeffone\r\ntwo\r\n \r\n\r\nthree\r\n".encode())
  assert read(files(path)) == [("a.txt", "one\ntwo\n \n\nthree\n")]
  assert read(files(path, text_unit="paragraph")) == [
      ("a.txt:1", "one\ntwo"), ("a.txt:2", "three\n")]
  assert read(files(path, text_unit="line")) == [
      ("a.txt:1", "one"), ("a.txt:2", "two"), ("a.txt:5", "three")]


def test_patterns_are_sorted_and_each_file_is_read_once(
    tmp_path: pathlib.Path) -> None:
  for name in ("b.txt", "a.txt", "c.md"):
    (tmp_path / name).write_text(name)
  found = read(files(tmp_path / "*.md", tmp_path / "*", tmp_path / "a.txt"))
  assert [text for _, text in found] == ["c.md", "a.txt", "b.txt"]


def test_ids_do_not_depend_on_where_the_files_are(
    tmp_path: pathlib.Path) -> None:
  for root in ("one", "two/three"):
    for name in ("a/x.txt", "b/x.txt"):
      (tmp_path / root / name).parent.mkdir(parents=True)
      (tmp_path / root / name).write_text(f"text of {name}")
  found = read(files(tmp_path / "one/**/*.txt"))
  assert [doc_id for doc_id, _ in found] == ["a/x.txt", "b/x.txt"]
  assert found == read(files(tmp_path / "two/three/*/*"))


def test_no_match_names_the_pattern(tmp_path: pathlib.Path) -> None:
  pattern = f"{tmp_path}/*.nothing"
  with pytest.raises(config_lib.ConfigError, match=re.escape(pattern)) as info:
    read(files(pattern))
  assert info.value.key == "data.files"
  with pytest.raises(config_lib.ConfigError, match="is a directory"):
    read(files(tmp_path))


@pytest.mark.parametrize("offset", [3, 262_143, 262_144, 300_001])
def test_invalid_utf8_names_the_file_and_byte(
    tmp_path: pathlib.Path, offset: int) -> None:
  path = tmp_path / "bad.txt"
  # Two-byte characters, so that one lies across the reader's blocks.
  good = ("a" * (offset % 2) + "é" * (offset // 2)).encode()
  assert len(good) == offset
  path.write_bytes(good + b"\xff" + b"more")
  with pytest.raises(corpora.DataError, match=rf"bad.txt.*byte {offset} "):
    read(files(path))


def test_text_cut_within_a_character_is_an_error(
    tmp_path: pathlib.Path) -> None:
  path = tmp_path / "cut.txt"
  path.write_bytes("abcé".encode()[:-1])
  with pytest.raises(corpora.DataError, match="byte 3 "):
    read(files(path))


def test_empty_files_are_counted(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.txt").write_text("")
  (tmp_path / "b.txt").write_text(" \n\n\t\n")
  (tmp_path / "c.txt").write_text("text")
  skipped: collections.Counter[str] = collections.Counter()
  found = list(corpora.documents(files(tmp_path / "*"), skipped))
  assert [d.text for d in found] == ["text"]
  assert skipped == {"empty_files": 2}


@pytest.mark.parametrize("text", [
    "x" * 3_000_000, "word " * 500_000, "line\n" * 500_000,
    "para\n\n" * 400_000, "\n" * 1_000_000 + "x", "é\n \n" * 300_000])
def test_pieces_are_bounded_and_join_to_the_text(text: str) -> None:
  for chunk in (len(text), 100_003):
    found = list(corpora.pieces(
        text[i:i + chunk] for i in range(0, len(text), chunk)))
    assert "".join(found) == text
    assert max(map(len, found)) <= corpora.PIECE_CHARACTERS
    assert len(found) <= len(text) // corpora.PIECE_CHARACTERS + 3


def test_pieces_end_at_paragraphs_else_lines_else_words() -> None:
  cut = lambda text: list(corpora.pieces((text,), 12))
  assert cut("aaa\n\nbbb\nccc ddd") == ["aaa\n\n", "bbb\nccc ddd"]
  assert cut("aaa bbb\nccc ddd") == ["aaa bbb\n", "ccc ddd"]
  assert cut("aaa bbb ccc ddd") == ["aaa bbb", " ccc ddd"]
  assert cut("aaabbbcccdddeee") == ["aaabbbcccddd", "eee"]
  # Never between the line ends that make a blank line.
  assert cut("aaabbbcccdd\n\neee") == ["aaabbbcccdd", "\n\neee"]


def test_jsonl(tmp_path: pathlib.Path) -> None:
  rows = ('{"text": "one", "n": 1}\n\n{"text": null}\n'
          '{"text": "tw\\u00f6"}\n').encode()
  (tmp_path / "a.jsonl").write_bytes(rows)
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows))
  skipped: collections.Counter[str] = collections.Counter()
  found = list(corpora.documents(files(tmp_path / "*"), skipped))
  assert [d.text for d in found] == ["one", "twö"] * 2
  assert found[1].doc_id == "a.jsonl:4"
  assert skipped == {"empty_documents": 2}


@pytest.mark.parametrize("rows, error, message", [
    (b'{"text": "a"}\n{"text": ', corpora.DataError, r"a.jsonl:2: not JSON"),
    (b'{"text": "a"}\n["a"]\n', corpora.DataError, r"a.jsonl:2: .*object"),
    (b'{"text": "\xff"}\n', corpora.DataError, r"a.jsonl:1: not UTF-8"),
    (b'{"text": "\\ud800"}\n', corpora.DataError, r"a.jsonl:1: .*surrogate"),
    (b'{"body": "a", "n": 1}\n', config_lib.ConfigError,
     r"data.text_field.*a.jsonl:1 .*'body', 'n'"),
    (b'{"text": 7}\n', config_lib.ConfigError, r"must hold text.*int 7"),
])
def test_bad_jsonl_names_the_line(
    tmp_path: pathlib.Path, rows: bytes, error: type, message: str) -> None:
  (tmp_path / "a.jsonl").write_bytes(rows)
  with pytest.raises(error, match=message):
    read(files(tmp_path / "a.jsonl"))


def test_cut_gzip(tmp_path: pathlib.Path) -> None:
  data = gzip.compress(b"".join(
      b'{"text": "%d"}\n' % (i * 7919 ** 3) for i in range(5000)))
  (tmp_path / "a.jsonl.gz").write_bytes(data[:len(data) // 2])
  with pytest.raises(corpora.DataError, match=r"a.jsonl.gz:\d+: .*cut short"):
    read(files(tmp_path / "a.jsonl.gz"))


def test_parquet(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "a.parquet"
  texts = [f"row {i}" for i in range(300)]
  parquet.write_table(pa.table({"body": texts, "n": list(range(300))}), path,
                      row_group_size=100)
  found = read(files(path, text_field="body"))
  assert [text for _, text in found] == texts
  assert found[-1][0] == "a.parquet:300"
  with pytest.raises(config_lib.ConfigError, match="it has 'body', 'n'"):
    read(files(path))
  with pytest.raises(config_lib.ConfigError, match="must hold text"):
    read(files(path, text_field="n"))
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(corpora.DataError, match="a.parquet.*Parquet"):
    read(files(path, text_field="body"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "hub"])
def test_pairs_come_whole_from_two_columns(
    tmp_path: pathlib.Path, offline: None, kind: str) -> None:
  long = "word " * corpora.PIECE_CHARACTERS
  rows = [{"en": "one", "de": "eins", "n": 1}, {"en": " ", "de": "zwei"},
          {"en": "three", "de": ""}, {"en": long, "de": "fünf"}]
  (tmp_path / "set").mkdir()
  path = tmp_path / "set" / f"train.{kind}"
  lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
  if kind == "parquet":
    parquet.write_table(pa.Table.from_pylist(rows), path)
  elif kind == "jsonl.gz":
    path.write_bytes(gzip.compress(lines))
  else:
    path = path.with_suffix(".jsonl")
    path.write_bytes(lines)
  fields = {"text_field": "en", "target_field": "de"}
  config = files(path, **fields) if kind != "hub" else config_lib.DataConfig(
      corpus="hub", hub_name=str(path.parent), **fields)
  skipped: collections.Counter[str] = collections.Counter()
  found = list(corpora.documents(config, skipped))
  assert [(d.text, d.target) for d in found] == [
      ("one", "eins"), (long, "fünf")]
  assert skipped == {"pairs_with_an_empty_side": 2}
  assert corpora.fingerprint(config) != corpora.fingerprint(
      dataclasses.replace(config, target_field="n"))
  with pytest.raises(config_lib.ConfigError, match="'en', 'de'") as info:
    read(dataclasses.replace(config, target_field="fr"))
  assert info.value.key == "data.target_field"


def test_pairs_are_columns(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.txt").write_text("text")
  for config, found in (
      (config_lib.DataConfig(target_field="de"), "the corpus is 'sotu'"),
      (files(tmp_path / "a.txt", target_field="de"), "a.txt is a text file")):
    with pytest.raises(config_lib.ConfigError, match=found) as info:
      read(config)
    assert info.value.key == "data.target_field"


@pytest.fixture
def offline(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  datasets = pytest.importorskip("datasets")
  constants = pytest.importorskip("huggingface_hub").constants
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE",
                      tmp_path / "hub-cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_reads_a_local_data_set(
    tmp_path: pathlib.Path, offline: None, streaming: bool) -> None:
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "train.jsonl").write_text(
      "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)))
  config = config_lib.DataConfig(
      corpus="hub", hub_name=str(tmp_path / "set"), hub_streaming=streaming,
      hub_max_documents=5)
  assert [text for _, text in read(config)] == [f"row {i}" for i in range(5)]
  before = corpora.fingerprint(config)
  assert before != corpora.fingerprint(
      dataclasses.replace(config, hub_max_documents=6))
  with pytest.raises(config_lib.ConfigError, match="it has 'text'"):
    read(dataclasses.replace(config, text_field="body"))


def test_hub_that_cannot_be_reached(offline: None) -> None:
  config = config_lib.DataConfig(corpus="hub", hub_name="nobody/no-such-set")
  with pytest.raises(config_lib.ConfigError,
                     match="nobody/no-such-set.*'sotu'") as info:
    read(config)
  assert info.value.key == "data.hub_name"


def test_fingerprint_follows_the_files(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "a.txt"
  path.write_text("abc")
  before = corpora.fingerprint(files(path))
  assert before == corpora.fingerprint(files(path))
  path.write_text("abcd")
  assert before != corpora.fingerprint(files(path))
  assert (corpora.fingerprint(files(path)) !=
          corpora.fingerprint(files(path, text_unit="line")))


# --- The synthetic source ----------------------------------------------------


def source(**fields: object) -> synthetic.MarkovSource:
  return synthetic.MarkovSource(config_lib.SyntheticConfig(**fields))


def test_entropy_rate_by_hand() -> None:
  # Two symbols that stay with probability 3/4 and 2/3. Stationary: 4/7, 3/7.
  markov = source(order=1, num_symbols=2)
  markov.conditional_KS = np.array([[3 / 4, 1 / 4], [1 / 3, 2 / 3]])
  np.testing.assert_allclose(markov.stationary_K, [4 / 7, 3 / 7], rtol=1e-10)
  by_hand = (4 / 7 * (3 / 4 * np.log(4 / 3) + 1 / 4 * np.log(4)) +
             3 / 7 * (1 / 3 * np.log(3) + 2 / 3 * np.log(3 / 2)))
  assert markov.entropy_rate == pytest.approx(by_hand, rel=1e-10)


def test_stationary_distribution_is_a_fixed_point_at_higher_order() -> None:
  markov = source(order=3, num_symbols=5)
  transition_KK = np.zeros((125, 125))
  for state in range(125):
    for symbol in range(5):
      transition_KK[state, state % 25 * 5 + symbol] = (
          markov.conditional_KS[state, symbol])
  pi_K = markov.stationary_K
  np.testing.assert_allclose(pi_K @ transition_KK, pi_K, atol=1e-12)
  assert pi_K.sum() == pytest.approx(1)


@pytest.mark.parametrize("order, num_symbols", [(1, 4), (2, 16), (3, 3)])
def test_the_true_model_loses_the_entropy_rate(
    order: int, num_symbols: int) -> None:
  markov = source(order=order, num_symbols=num_symbols, num_bytes=400_000,
                  document_bytes=2_000)
  losses = []
  for text in markov.documents():
    symbol_L = np.frombuffer(text.encode(), np.uint8).astype(int) - ord("a")
    assert 0 <= symbol_L.min() and symbol_L.max() < num_symbols
    state_L = sum(symbol_L[place:len(symbol_L) - order + place] *
                  num_symbols ** (order - 1 - place) for place in range(order))
    losses.append(
        -np.log(markov.conditional_KS[state_L, symbol_L[order:]]).mean())
  # Documents are independent, so their spread gives the standard error.
  error = np.std(losses, ddof=1) / np.sqrt(len(losses))
  assert len(losses) == 200 and error < 0.01 * markov.entropy_rate
  assert abs(np.mean(losses) - markov.entropy_rate) < 4 * error


def test_documents_start_from_the_stationary_distribution() -> None:
  markov = source(order=2, num_symbols=3, num_bytes=80_000, document_bytes=2)
  found = collections.Counter(markov.documents())
  letters = "abc"
  frequency_K = np.array([found[x + y] / 40_000
                          for x in letters for y in letters])
  error_K = np.sqrt(markov.stationary_K * (1 - markov.stationary_K) / 40_000)
  assert (np.abs(frequency_K - markov.stationary_K) < 4.5 * error_K).all()


def test_synthetic_documents() -> None:
  config = config_lib.DataConfig(
      corpus="synthetic", synthetic=config_lib.SyntheticConfig(
          num_bytes=10_500, document_bytes=1_000))
  found = read(config)
  assert [len(text) for _, text in found] == [1_000] * 10 + [500]
  assert found == read(config)
  assert len({text for _, text in found}) == 11
  # A longer corpus begins with the shorter one.
  longer = read(dataclasses.replace(config, synthetic=dataclasses.replace(
      config.synthetic, num_bytes=20_000)))
  assert longer[:10] == found[:10]
  assert longer[0] != read(dataclasses.replace(
      config, synthetic=dataclasses.replace(config.synthetic, seed=1)))[0]


def test_too_large_a_source_names_the_key() -> None:
  with pytest.raises(config_lib.ConfigError, match="order 3 or fewer") as info:
    source(order=6, num_symbols=26)
  assert info.value.key == "data.synthetic.order"
