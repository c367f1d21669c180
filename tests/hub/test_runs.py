# SPDX-License-Identifier: Apache-2.0
"""Runs of every family become directories that others read."""

import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any, Callable
import warnings

from flax import linen as nn
import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import hub
from tfjax import train
from tfjax.cost import budget
from tfjax.data import store as store_lib
from tfjax.data import tokenizers
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.hub import runs
from tfjax.models import families
from tfjax.models import transformer

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
MakeConfig = Callable[..., config_lib.ExperimentConfig]


def untrained(config: config_lib.ExperimentConfig) -> runs.Run:
  tokenizer = tokenizers.byte_level()
  vocabulary = vocabulary_lib.of(config, tokenizer)
  config = budget.with_vocabulary(config, vocabulary.size)
  random = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: random.standard_normal(x.shape, np.float32),
      nn.meta.unbox(transformer.abstract_parameters(
          transformer.create(config.model))))
  return runs.Run(config, 0, params, vocabulary, tokenizer,
                  runs.unfinished(config, "a-run"))


@pytest.mark.parametrize(
    "family", sorted(set(families.FAMILIES) - {"transformer"}))
def test_a_run_of_any_family_is_exported(
    family: str, make_config: MakeConfig, tmp_path: pathlib.Path) -> None:
  changes: dict[str, Any] = {"model.family": family}
  if family == "bart":
    changes["objective.corruption"] = "infilling"
  run = untrained(make_config(changes))
  with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    run.save(tmp_path / "model")
  # RoBERTa's positions take token 1 for padding; here it is a byte.
  assert [str(w.message).split(" for padding")[0] for w in warned] == (
      ["transformers takes token 1"] if family == "roberta" else [])
  config, params = hub.load(tmp_path / "model")
  assert jax.tree.all(jax.tree.map(np.array_equal, params, run.params))

  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
  assert len(theirs) == config.vocab_size == run.vocabulary.size
  assert theirs.mask_token_id == run.vocabulary.mask
  ours = run.prompt_tokenizer().pipeline()
  for text in ("", "ab", "a[MASK]b<extra_id_0>c"):
    assert theirs(text)["input_ids"] == ours.encode(text).ids
  if run.vocabulary.sentinels:
    assert theirs("<extra_id_0>")["input_ids"] == [257, 256]


def test_a_family_that_transformers_lacks_is_refused(
    make_config: MakeConfig, tmp_path: pathlib.Path) -> None:
  run = untrained(make_config({"model.family": "transformer"}))
  with pytest.raises(hub.HubError, match="no model of the family"):
    run.save(tmp_path / "model")
  assert not (tmp_path / "model").exists()


def test_a_run_keeps_the_tokens_that_it_was_trained_on(
    make_config: MakeConfig, tmp_path: pathlib.Path) -> None:
  words = np.random.default_rng(0).choice(
      ["apple", "pear", "plum", "fig", "quince"], 4000)
  def write(text: str, seconds: int = 1) -> None:
    for i in range(16):
      path = tmp_path / f"{i:02}.txt"
      path.write_text(text[500 * i:500 * (i + 1)])
      os.utime(path, (seconds, seconds))  # of which a corpus's identity is
  write(" ".join(words))
  config = make_config({
      "data.corpus": "files", "data.files": (f"{tmp_path}/*.txt",),
      "data.tokenizer.kind": "bpe",
      "data.tokenizer.vocab_size": 262, "data.validation_fraction": 0.3,
      "data.cache_dir": str(tmp_path / "stores"), "duration.steps": 1})
  record = train.run(config, tmp_path / "runs")
  directory = tmp_path / "runs" / record.run_id
  before = runs.load(directory).tokenizer.texts()
  write(" ".join(words).upper(), 2)
  assert runs.load(directory).tokenizer.texts() == before
  store = tmp_path / "stores" / record.token_store
  # Another store is never taken for it.
  assert store_lib.build(config.data).tokenizer().texts() != before
  shutil.rmtree(store)
  with pytest.raises(hub.HubError, match="the corpus has changed since"):
    runs.load(directory)
  write(" ".join(words))
  assert runs.load(directory).tokenizer.texts() == before


def test_a_model_card_comes_with_an_export(
    make_config: MakeConfig, tmp_path: pathlib.Path) -> None:
  record = train.run(make_config({"cost.region": "FRA"}), tmp_path / "runs")
  directory = tmp_path / "runs" / record.run_id
  result = directory / "result.json"

  def card(name: str) -> str:
    runs.load(directory).save(tmp_path / name)
    return (tmp_path / name / "README.md").read_text(encoding="utf-8")

  text = card("model")
  for line in (f"# {record.run_id}", "| Status | complete |",
               f"| Loss on held-out text | {record.loss:.6g} nats a token |",
               "| Weights of step | 6 |", "| Region | FRA |"):
    assert f"{line}\n" in text
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "README.md").write_text("mine")
  assert card("own") == "mine"
  written = result.read_text(encoding="utf-8")
  result.write_text(written[:100])
  assert "| Status | unknown (" in card("damaged")
  result.write_text(written.replace('"seed": 0', '"seed": -1'))
  with pytest.raises(hub.HubError, match="seed: -1 is negative"):
    card("absurd")
  assert not (tmp_path / "absurd").exists()
  result.unlink()
  text = card("unfinished")
  assert "**The run is not complete but unfinished**" in text
  assert f"| Parameters | {record.params_total:,} |\n" in text
  assert "| Loss on held-out text | unknown |" in text


def test_a_converted_model_keeps_its_card(
    make_config: MakeConfig, tmp_path: pathlib.Path) -> None:
  untrained(make_config()).save(tmp_path / "a")
  (tmp_path / "a" / "README.md").write_text("theirs")
  done = subprocess.run(
      [sys.executable, SCRIPTS / "convert.py", f"--source={tmp_path}/a",
       f"--target={tmp_path}/b"], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "b" / "README.md").read_text() == "theirs"


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_training_on_an_exported_tokenizer_is_as_before(
    family: str, make_config: MakeConfig, tmp_path: pathlib.Path) -> None:
  config = make_config({"model.family": family})
  run = untrained(config)
  run.save(tmp_path / "model")
  again = make_config({
      "model.family": family, "data.tokenizer.kind": "directory",
      "data.tokenizer.path": str(tmp_path / "model")})
  one, other = (store_lib.build(c.data) for c in (config, again))
  np.testing.assert_array_equal(one.train, other.train)
  found = vocabulary_lib.of(again, other.tokenizer())
  for name, wanted in vars(run.vocabulary).items():
    np.testing.assert_array_equal(getattr(found, name), wanted, name)
