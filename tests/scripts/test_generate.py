# SPDX-License-Identifier: Apache-2.0
"""scripts/generate.py on runs of ours and on a Hugging Face directory."""

import importlib.util
import io
import json
import pathlib
import sys
from typing import Any

from absl import flags
from absl.testing import flagsaver
from flax import linen as nn
import jax
import numpy as np
import pytest
import tokenizers as hf

from tfjax import config as config_lib
from tfjax import hub
from tfjax import train
from tfjax.hub import runs
from tfjax.models import transformer

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location(
      "generate_script", ROOT / "scripts" / "generate.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # where its dataclass looks for itself
  spec.loader.exec_module(module)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["generate.py", "--model=unset"])
  return module


@pytest.fixture(scope="module")
def run_dir(make_config, tmp_path_factory):
  """Family -> the directory of a short run."""
  workdir = tmp_path_factory.mktemp("runs")

  def train_one(family: str) -> pathlib.Path:
    record = train.run(make_config({"model.family": family}), workdir)
    return workdir / record.run_id
  return train_one


def call(script, capsys: pytest.CaptureFixture, model: pathlib.Path,
         *prompts: str, **options: Any) -> dict[str, Any]:
  capsys.readouterr()
  with flagsaver.flagsaver(model=str(model), prompt=list(prompts), json=True,
                           **options):
    assert script.main(["generate.py"]) == 0
  return json.loads(capsys.readouterr().out)


def test_a_decoders_run_continues_prompts(script, run_dir, capsys,
                                          monkeypatch) -> None:
  model = run_dir("llama")
  made = call(script, capsys, model, "ab", "abcdefg", max_new_tokens=5)
  assert [r["prompt"] for r in made["results"]] == ["ab", "abcdefg"]
  for result in made["results"]:
    assert bytes(t for t in result["tokens"] if t < 256).decode(
        errors="replace") == result["text"]
    assert 1 <= len(result["tokens"]) <= 5 and result["score"] < 0
  # Bytes, and a separator before each.
  assert made["prefill_tokens"] == 3 + 8
  assert made["decode_tokens"] == sum(
      len(r["tokens"]) - 1 for r in made["results"])
  assert made["decode_tokens_per_second"] == pytest.approx(
      made["decode_tokens"] / made["decode_seconds"])
  assert made["compile_seconds"] > made["decode_seconds"]
  monkeypatch.setattr("sys.stdin", io.StringIO("ab\nabcdefg\n"))
  again = call(script, capsys, model, max_new_tokens=5)
  assert again["results"] == made["results"]
  with flagsaver.flagsaver(model=str(model), prompt=["ab"], max_new_tokens=5):
    assert script.main(["generate.py"]) == 0
  shown = capsys.readouterr().out
  assert shown.startswith("> ab\n") and "tokens/s; compiled" in shown


def test_an_encoder_decoders_run_knows_its_sentinels(script, run_dir,
                                                     capsys) -> None:
  model = script._from_run(run_dir("t5"))
  assert model.encode("ab<extra_id_0>c") == [97, 98, 257, 99, 256]
  assert model.decode([257, 97, 256]) == "<extra_id_0>a"
  made = call(script, capsys, run_dir("t5"), "ab<extra_id_0>c",
              max_new_tokens=4, num_beams=2)
  assert made["prefill_tokens"] == 5
  assert 1 <= len(made["results"][0]["tokens"]) <= 4


def test_an_encoders_run_fills_masks(script, run_dir, capsys) -> None:
  made = call(script, capsys, run_dir("bert"), "a[MASK]c[MASK]", top_k=3)
  masks = made["results"][0]["masks"]
  assert [mask["position"] for mask in masks] == [2, 4]  # behind a separator
  for mask in masks:
    p = [answer["probability"] for answer in mask["answers"]]
    assert len(p) == 3 and p == sorted(p, reverse=True) and 0 < sum(p) < 1


PROMPTS = {
    "llama": (["ab", "", "caf\u00e9 [MASK]"], dict(max_new_tokens=6)),
    "bert": (["a[MASK]c[MASK]", "[MASK]"], {}),
    "t5": (["ab<extra_id_0>c", "", "ab"], dict(max_new_tokens=6, num_beams=2)),
}


@pytest.mark.parametrize("family", PROMPTS)
def test_an_exported_run_answers_as_the_run(script, run_dir, tmp_path, capsys,
                                            family: str) -> None:
  run, target = run_dir(family), tmp_path / "model"
  runs.load(run).save(target)
  prompts, options = PROMPTS[family]
  one, other = script._from_run(run), script._from_hub(target)
  for prompt in prompts:
    assert one.encode(prompt) == other.encode(prompt)
  everything = range(one.config.vocab_size)
  assert one.decode(everything) == other.decode(everything)
  assert (one.stops, one.pad, one.mask) == (other.stops, other.pad, other.mask)
  assert call(script, capsys, run, *prompts, **options)["results"] == (
      call(script, capsys, target, *prompts, **options)["results"])


def test_a_hugging_face_directory(script, tmp_path, capsys) -> None:
  words = ["<s>", "</s>", "<pad>", *"abcdefgh"]
  pipeline = hf.Tokenizer(hf.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token="<pad>"))
  pipeline.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  pipeline.add_special_tokens(words[:3])
  pipeline.post_processor = hf.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 0)])
  (tmp_path / "text").mkdir()
  pipeline.save(str(tmp_path / "text" / "tokenizer.json"))
  config = config_lib.complete_model(config_lib.ModelConfig(
      family="gpt2", size="3k", context_length=16, vocab_size=len(words)))
  random = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: random.standard_normal(x.shape).astype(np.float32),
      nn.meta.unbox(transformer.abstract_parameters(
          transformer.create(config))))
  hub.save(config, params, tmp_path / "model", tokenizer=tmp_path / "text",
           token_ids=dict(eos_token_id=1, pad_token_id=2))
  model = script._from_hub(tmp_path / "model")
  assert model.encode("a c h") == [0, 3, 5, 10]
  assert (model.stops, model.pad, model.mask) == ((1,), 2, None)
  made = call(script, capsys, tmp_path / "model", "a b", max_new_tokens=4,
              temperature=1.0, seed=3)
  assert made["prefill_tokens"] == 3
  # Lists of stop tokens, as newer directories have them.
  (tmp_path / "model" / "generation_config.json").write_text(
      json.dumps(dict(eos_token_id=[1, 4], pad_token_id=None)))
  model = script._from_hub(tmp_path / "model")
  assert (model.stops, model.pad) == ((1, 4), 2)
  # Whether the token is named or numbered, and where.
  assert model.mask is None and model.decode([0, 3, 5, 1]) == "<s> a c"
  (tmp_path / "model" / "special_tokens_map.json").write_text(
      json.dumps(dict(mask_token=dict(content="b"), bos_token="<s>")))
  model = script._from_hub(tmp_path / "model")
  assert model.mask == 4 and model.decode([0, 3, 5, 1]) == "a c"
  path = tmp_path / "model" / "config.json"
  settings = json.loads(path.read_text())
  path.write_text(json.dumps(settings | dict(mask_token_id=7)))
  assert script._from_hub(tmp_path / "model").mask == 7
  path = tmp_path / "model" / "generation_config.json"
  for content, words in (("{", "generation_config.json is not JSON"),
                         ('{"eos_token_id": "x"}', "eos_token_id is ['x']")):
    path.write_text(content)
    with flagsaver.flagsaver(model=str(tmp_path / "model"), prompt=["a"]):
      assert script.main(["generate.py"]) == 2
    assert words in capsys.readouterr().err


def test_what_cannot_be_used_is_refused(script, run_dir, tmp_path,
                                        capsys) -> None:
  def refusal(model, *prompts, **options):
    with flagsaver.flagsaver(model=str(model), prompt=list(prompts), **options):
      assert script.main(["generate.py"]) == 2
    return capsys.readouterr().err
  assert "config.json cannot be read" in refusal(tmp_path, "a")
  assert "error: top_k: is for sampling" in refusal(
      run_dir("llama"), "a", top_k=3)
  assert "prompt 1: has no mask" in refusal(run_dir("bert"), "[MASK]", "a")
