# SPDX-License-Identifier: Apache-2.0
"""transformers' models and ours agree, and weights survive both ways."""

import os
import pathlib
from typing import Any

import numpy as np
import pytest

# Before transformers is imported: nothing is to be fetched.
os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# pylint: disable=wrong-import-position
import jax
from safetensors import numpy as safetensors_numpy

from tfjax import hub
from tfjax.hub import huggingface
from tfjax.hub import parity
from tfjax.models import families
from tfjax.models import transformer

IDS = [f"{case.family}: {case.name}" for case in parity.CASES]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
  parity.quiet()


def stored(directory: pathlib.Path) -> dict[str, np.ndarray]:
  tensors: dict[str, np.ndarray] = {}
  for path in sorted(directory.glob("*.safetensors")):
    tensors.update(safetensors_numpy.load_file(path))
  return tensors


def token_ids(directory: pathlib.Path) -> dict[str, Any]:
  return {name: value
          for name, value in huggingface.read_settings(directory).items()
          if name.endswith("_token_id")}


@pytest.mark.parametrize("case", parity.CASES, ids=IDS)
def test_states_logits_and_gradients_agree_and_weights_come_back(
    case: parity.Case, tmp_path: pathlib.Path) -> None:
  model = parity.reference(case)
  error = parity.compare(case, model, tmp_path / "theirs")
  assert error.within_limits(), error

  config, params = hub.load(tmp_path / "theirs", scan_layers=case.scan_layers)
  hub.save(config, params, tmp_path / "ours",
           token_ids=token_ids(tmp_path / "theirs"), max_shard_bytes=30_000)
  before, after = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
  # A head's bias that is zero is none of ours.
  absent = {name for name in set(before) - set(after)
            if not before[name].any()}
  assert absent <= {"final_logits_bias"}
  assert set(before) - absent == set(after)
  assert all(np.array_equal(before[name], after[name]) for name in after)

  again, report = type(model).from_pretrained(
      tmp_path / "ours", output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"]
  assert not report["mismatched_keys"]
  wanted, found = model.state_dict(), again.state_dict()
  assert set(wanted) == set(found)
  assert all(torch.equal(wanted[name], found[name]) for name in wanted)
  # All that was written says what the first config says or leaves open.
  first, second = model.config.to_dict(), again.config.to_dict()
  for name in huggingface.read_settings(tmp_path / "ours"):
    if name != "dtype":
      assert first.get(name) in (None, second[name]), name


def test_every_family_that_transformers_has_has_two_cases() -> None:
  count = {family: 0 for family in families.FAMILIES}
  for case in parity.CASES:
    count[case.family] += 1
  assert {name for name, cases in count.items() if cases < 2} == {
      "transformer", "gpt3"}


def test_a_bare_model_and_its_pooler(tmp_path: pathlib.Path) -> None:
  torch.manual_seed(0)
  model = transformers.BertModel(transformers.BertConfig(
      vocab_size=50, hidden_size=24, num_hidden_layers=2,
      num_attention_heads=3, intermediate_size=40, type_vocab_size=2,
      max_position_embeddings=16, attn_implementation="eager")).eval()
  model.save_pretrained(tmp_path / "theirs")
  config, params = hub.load(tmp_path / "theirs")
  assert (config.pooler, config.tie_embedding, config.head_transform,
          config.head_bias) == (True, True, False, False)
  tokens = np.random.default_rng(0).integers(1, 50, (2, 9))
  mask = (np.arange(9) < [[9], [5]]).astype(np.int32)
  with torch.no_grad():
    wanted = model(torch.tensor(tokens), torch.tensor(mask)).pooler_output
  ours = transformer.create(config)
  inputs = hub.inputs(config, tokens.astype(np.int32), mask)

  @jax.jit
  def pooled(params):
    hidden_BTD = ours.apply({"params": params}, inputs, method="hidden")
    return ours.apply({"params": params}, hidden_BTD, method="pooled")
  np.testing.assert_allclose(pooled(params), wanted.numpy(), atol=1e-5)
  hub.save(config, params, tmp_path / "ours")
  again, report = transformers.BertModel.from_pretrained(
      tmp_path / "ours", output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"]
  assert all(torch.equal(x, again.state_dict()[name])
             for name, x in model.state_dict().items())
  assert set(stored(tmp_path / "ours")) == set(stored(tmp_path / "theirs"))
