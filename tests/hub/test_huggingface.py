# SPDX-License-Identifier: Apache-2.0
"""Directories in and out, and every reason to refuse one."""

import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tfjax import config as config_lib
from tfjax import hub
from tfjax.hub import huggingface
from tfjax.hub import model_types
from tfjax.hub import settings as settings_lib
from tfjax.models import families
from tfjax.models import inputs as inputs_lib
from tfjax.models import transformer
from tfjax.train import sharding

# Of each family a small model that transformers has too.
FAMILIES = {
    # A window that excludes nothing.
    "gpt": {}, "gpt2": {}, "gpt3": dict(window=16), "bert": {}, "roberta": {},
    "distilbert": {}, "t5": dict(head_dim=5), "t5v1_1": {}, "bart": {},
    "llama": {}, "modernbert": {}}


def make(family: str, **fields: Any) -> config_lib.ModelConfig:
  return config_lib.complete_model(config_lib.ModelConfig(
      family=family, **dict(
          dict(d_model=24, num_layers=3, num_heads=4, vocab_size=40,
               context_length=16), **FAMILIES[family] | fields)))


@functools.lru_cache(maxsize=None)
def weights(config: config_lib.ModelConfig) -> dict:
  random = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: random.standard_normal(x.shape, np.float32),
      nn.meta.unbox(transformer.abstract_parameters(
          transformer.create(config))))


def equal(a: dict, b: dict) -> bool:
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      np.array_equal(x, y) for x, y in zip(
          jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
  """A GPT-2 to break."""
  return written(tmp_path / "model", "gpt2")


def written(path: pathlib.Path, family: str, **fields: Any) -> pathlib.Path:
  path.mkdir()
  for name, content in files(make(family, **fields)).items():
    (path / name).write_bytes(content)
  return path


@functools.lru_cache(maxsize=None)
def files(config: config_lib.ModelConfig) -> dict[str, bytes]:
  """What a directory holds, saved once."""
  with tempfile.TemporaryDirectory() as directory:
    hub.save(config, weights(config), directory)
    return {path.name: path.read_bytes()
            for path in pathlib.Path(directory).iterdir()}


def change(directory: pathlib.Path, settings: dict[str, Any] | None = None,
           tensors: dict[str, Any] | None = None) -> None:
  """Sets keys and tensors; None removes one."""
  def apply(values, changes):
    return {name: value for name, value in {**values, **changes}.items()
            if value is not None}
  path = directory / "config.json"
  path.write_text(json.dumps(apply(
      json.loads(path.read_text()), settings or {})))
  path = directory / "model.safetensors"
  safetensors_numpy.save_file(
      apply(safetensors_numpy.load_file(path), tensors or {}), path)


# --- Both ways ---------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_scanned_or_not(
    family: str, tmp_path: pathlib.Path) -> None:
  config = make(family)
  params = weights(config)
  hub.save(config, params, tmp_path / "a")
  found, loaded = hub.load(tmp_path / "a")
  assert equal(loaded, params)
  ignored = dict(family=None, global_every=None, window=None,
                 query_groups=None)
  assert dataclasses.replace(found, **ignored) == dataclasses.replace(
      config, **ignored)
  scanned, stacked = hub.load(tmp_path / "a", scan_layers=True)
  assert scanned.scan_layers
  assert equal(stacked, transformer.stack_layers(params, config))
  hub.save(scanned, stacked, tmp_path / "b", max_shard_bytes=10_000)
  assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 1
  assert equal(hub.load(tmp_path / "b")[1], params)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_model_parametrized_by_its_width_is_saved_as_a_standard_one(
    family: str, tmp_path: pathlib.Path) -> None:
  config = make(family, parametrization="mup", base_d_model=6,
                base_head_dim=3)
  hub.save(config, weights(config), tmp_path / "model")
  loaded, params = hub.load(tmp_path / "model")
  assert loaded.parametrization == "standard"
  inputs = inputs_lib.Inputs(jnp.arange(8)[None])
  ours, theirs, unfolded = (
      transformer.create(one).apply({"params": values}, inputs)
      for one, values in ((config, weights(config)), (loaded, params),
                          (loaded, weights(config))))
  np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
  assert np.abs(unfolded - ours).max() > 0.1


def test_shards_are_loaded_each_by_itself(tmp_path: pathlib.Path) -> None:
  """Cut along every dimension in turn, heads' widths and layers too."""
  config = make("modernbert", d_model=16, num_heads=2, num_layers=9,
                vocab_size=40, d_ff=24)
  hub.save(config, weights(config), tmp_path / "model")
  config = dataclasses.replace(config, scan_layers=True)
  whole = transformer.stack_layers(weights(config=dataclasses.replace(
      config, scan_layers=False)), config)
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
  for axes in (("a", None, "b"), ("b", "a"), (None, "b", "a"),
               (None, None, "a", "b")):
    def cut(boxed, axes=axes):
      def one(x):
        spec = [a if a and n % mesh.shape[a] == 0 else None
                for a, n in zip(axes, x.shape)]
        return NamedSharding(mesh, P(*spec))
      return jax.tree.map(one, nn.meta.unbox(boxed))
    _, params = hub.load(tmp_path / "model", scan_layers=True, shardings=cut)
    assert equal(params, whole)
    query = params["encoder"]["blocks"]["block"]["attention"]["query"]
    assert len({str(s.index) for s in query["kernel"].addressable_shards}) > 1


def test_the_rules_of_training_place_parameters(
    directory: pathlib.Path) -> None:
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2, 1, 1),
              sharding.MESH_AXES)
  _, params = hub.load(directory, shardings=functools.partial(
      sharding.parameter_shardings, mesh=mesh))
  assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(params))
  assert equal(params, weights(make("gpt2")))


def test_types(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
  config, params = hub.load(directory)
  for dtype in (jnp.bfloat16, np.float16):
    path = tmp_path / np.dtype(dtype).name
    hub.save(config, params, path, dtype=dtype)
    assert json.loads((path / "config.json").read_text())["dtype"] == (
        np.dtype(dtype).name)
    rounded = jax.tree.map(lambda x, d=dtype: x.astype(d), params)
    _, loaded = hub.load(path)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(loaded))
    assert equal(loaded, jax.tree.map(
        lambda x: x.astype(jnp.float32), rounded))
    assert equal(hub.load(path, dtype=dtype)[1], rounded)


def test_tokenizer_files_and_token_ids_come_along(
    tmp_path: pathlib.Path) -> None:
  (tmp_path / "tokenizer.json").write_text("{}")
  (tmp_path / "other.txt").write_text("")
  config = make("gpt2")
  hub.save(config, weights(config), tmp_path / "model", tokenizer=tmp_path,
           token_ids=dict(eos_token_id=3))
  assert (tmp_path / "model" / "tokenizer.json").is_file()
  assert not (tmp_path / "model" / "other.txt").exists()
  settings = huggingface.read_settings(tmp_path / "model")
  assert settings["eos_token_id"] == 3
  assert settings["bos_token_id"] is None


# --- Names -------------------------------------------------------------------


def test_names_without_the_prefix_of_the_body(directory: pathlib.Path) -> None:
  path = directory / "model.safetensors"
  tensors = safetensors_numpy.load_file(path)
  safetensors_numpy.save_file(
      {name.removeprefix("transformer."): x for name, x in tensors.items()},
      path)
  assert equal(hub.load(directory)[1], weights(make("gpt2")))


def test_old_names_of_norms(tmp_path: pathlib.Path) -> None:
  directory = written(tmp_path / "model", "bert")
  path = directory / "model.safetensors"
  tensors = safetensors_numpy.load_file(path)
  safetensors_numpy.save_file({
      name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
          "LayerNorm.bias", "LayerNorm.beta"): x
      for name, x in tensors.items()}, path)
  assert equal(hub.load(directory)[1], weights(make("bert")))


def test_buffers_and_equal_copies_are_no_problem(
    directory: pathlib.Path) -> None:
  embedding = safetensors_numpy.load_file(
      directory / "model.safetensors")["transformer.wte.weight"]
  change(directory, tensors={
      "transformer.h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32),
      "lm_head.weight": embedding})
  assert equal(hub.load(directory)[1], weights(make("gpt2")))


def test_parts_of_other_heads_are_left_out_with_a_warning(
    tmp_path: pathlib.Path) -> None:
  directory = written(tmp_path / "model", "bert")
  change(directory, dict(architectures=["BertForPreTraining"]), {
      "cls.seq_relationship.weight": np.zeros((2, 24), np.float32)})
  with pytest.warns(UserWarning, match="cls.seq_relationship.weight"):
    assert equal(hub.load(directory)[1], weights(make("bert")))


def test_t5s_tensors_tell_whether_its_head_is_tied(
    tmp_path: pathlib.Path) -> None:
  directory = written(tmp_path / "model", "t5")
  assert hub.read_config(directory).tie_embedding
  shared = safetensors_numpy.load_file(
      directory / "model.safetensors")["shared.weight"]
  change(directory, tensors={"lm_head.weight": shared})
  assert hub.read_config(directory).tie_embedding
  change(directory, tensors={"lm_head.weight": shared + 1})
  config, params = hub.load(directory)
  assert not config.tie_embedding
  assert np.array_equal(params["untied_head"]["embedding"], shared + 1)


def test_barts_buffer_is_a_bias_where_it_is_not_zero(
    tmp_path: pathlib.Path) -> None:
  directory = written(tmp_path / "model", "bart")
  bias = np.zeros((1, 40), np.float32)
  change(directory, tensors={"final_logits_bias": bias})
  assert not hub.read_config(directory).head_bias
  bias[0, 7] = 2
  change(directory, tensors={"final_logits_bias": bias})
  config, params = hub.load(directory)
  assert config.head_bias
  assert np.array_equal(params["head_bias"]["bias"], bias[0])


# --- Settings ----------------------------------------------------------------


def test_keys_before_release_5(tmp_path: pathlib.Path) -> None:
  directory = written(tmp_path / "llama", "llama", rotary_base=500.0)
  new = hub.read_config(directory)
  change(directory, dict(rope_parameters=None, rope_theta=500.0, dtype=None,
                         torch_dtype="float32", head_dim=None))
  settings = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(
      settings | dict(rope_scaling=None)))
  assert hub.read_config(directory) == new
  assert new.rotary_base == 500.0

  directory = written(tmp_path / "modernbert", "modernbert", num_layers=5,
                      global_every=2, rotary_base_local=77.0)
  new = hub.read_config(directory)
  change(directory, dict(
      layer_types=None, rope_parameters=None, global_attn_every_n_layers=2,
      global_rope_theta=160000.0, local_rope_theta=77.0))
  assert hub.read_config(directory) == new
  assert new.rotary_base_local == 77.0

  directory = written(tmp_path / "t5", "t5v1_1")
  new = hub.read_config(directory)
  change(directory, dict(is_gated_act=None, dense_act_fn=None,
                         scale_decoder_outputs=None))
  assert hub.read_config(directory) == new


# Family -> changes of a directory that is fine, and what is then said.
REFUSED = [
    ("gpt2", dict(model_type="mamba"), "model_type is 'mamba'"),
    ("gpt2", dict(architectures=["GPT2ForSequenceClassification"]),
     "one of GPT2LMHeadModel, GPT2Model"),
    ("gpt2", dict(architectures=None), "architectures are None"),
    ("gpt2", dict(architectures=5), "architectures are 5"),
    ("gpt2", dict(model_type=["gpt2"]), r"model_type is \['gpt2'\]"),
    ("gpt2", dict(n_head=0), "n_head is 0; it must be at least 1"),
    ("gpt2", dict(vocab_size=-1), "vocab_size is -1; it must be at least 2"),
    ("llama", dict(num_key_value_heads=0), "num_key_value_heads is 0"),
    ("llama", dict(rope_parameters=[1]), "rope_parameters is .*must be dict"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True),
     "scale_attn_by_inverse_layer_idx is True; only False"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
    ("gpt2", dict(activation_function="mish"), "activation_function is 'mish'"),
    ("gpt2", dict(n_layer="3"), "n_layer is '3'; it must be int"),
    ("gpt2", dict(n_head=5), "5 does not divide model.d_model 24"),
    ("gpt2", dict(new_option=1), "unknown key.*new_option=1"),
    ("gpt2", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("gpt2", dict(pruned_heads={"0": [1]}), "pruned_heads"),
    ("gpt", dict(afn="gelu_new"), "afn is 'gelu_new'"),
    ("bert", dict(position_embedding_type="relative_key"),
     "position_embedding_type"),
    ("bert", dict(is_decoder=True), "is_decoder"),
    ("roberta", dict(hidden_act="relu"), "RoBERTa's head has 'gelu'"),
    ("roberta", dict(pad_token_id="1"), "pad_token_id is '1'"),
    ("t5", dict(feed_forward_proj="gated-gelu"), "contradicts"),
    ("t5", dict(feed_forward_proj=5), "feed_forward_proj is 5; it must be"),
    ("bart", dict(normalize_before=True), "normalize_before"),
    ("bart", dict(decoder_ffn_dim=7),
     "encoder_ffn_dim and decoder_ffn_dim differ"),
    ("llama", dict(rope_parameters=dict(rope_type="llama3", factor=8.0)),
     "rope_parameters is .*llama3"),
    ("llama", dict(rope_scaling=dict(type="linear", factor=2.0)),
     "rope_scaling is"),
    ("llama", dict(attention_bias=True),
     "attention_bias and mlp_bias differ"),
    ("modernbert", dict(layer_types=["sliding_attention"] * 2 +
                        ["full_attention"]), "layer_types are"),
    ("modernbert", dict(layer_types=["full_attention"]),
     "layer_types are of 1 layers, but num_hidden_layers is 3"),
    ("modernbert", dict(classifier_activation="relu"),
     "hidden_activation and classifier_activation differ"),
    ("modernbert", dict(norm_bias=True), "norm_bias and attention_bias"),
]


@pytest.mark.parametrize(
    "family, settings, words", REFUSED,
    ids=[f"{family}-{'-'.join(keys)}" for family, keys, _ in REFUSED])
def test_settings_that_are_refused(
    family: str, settings: dict[str, Any], words: str,
    tmp_path: pathlib.Path) -> None:
  directory = written(tmp_path / "model", family)
  change(directory, settings)
  with pytest.raises(hub.HubError, match=words) as raised:
    hub.load(directory)
  assert str(directory) in str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_a_key_is_read_or_refused(family: str) -> None:
  settings = settings_lib.write(make(family), {})
  stored = {"t5": dict(tie_embedding=True), "bart": dict(head_bias=False)}.get(
      settings["model_type"], {})
  keys = [key.name for key in model_types.MODEL_TYPES[
      settings["model_type"]].keys]
  for name in {*settings, *keys, "rope_parameters", "rope_scaling",
               "layer_types", "feed_forward_proj"}:
    for value in (None, True, 0, -1, 1.5, "x", [], [1], {}, {"x": [1]},
                  float("nan"), {"full_attention": 5}, {"rope_theta": "x"}):
      try:
        settings_lib.read(settings | {name: value}, stored)
      except hub.HubError as error:
        assert str(error)


# --- Tensors -----------------------------------------------------------------

BROKEN = [
    ({"transformer.h.1.ln_1.bias": None},
     r"1 tensor\(s\) are missing: transformer.h.1.ln_1.bias"),
    ({"transformer.h.3.ln_1.bias": np.zeros(24, np.float32)},
     "no place in a gpt2 model: transformer.h.3.ln_1.bias"),
    ({"transformer.wte.weight": np.zeros((41, 24), np.float32)},
     r"transformer.wte.weight has the shape \(41, 24\).* \(40, 24\)"),
    ({"transformer.wte.weight": np.zeros((40, 24), np.int32)},
     "stored as I32"),
    ({"lm_head.weight": np.zeros((40, 24), np.float32)},
     "lm_head.weight and transformer.wte.weight differ"),
    ({"wte.weight": np.zeros((40, 24), np.float32)}, "are the same tensor"),
]


@pytest.mark.parametrize("tensors, words", BROKEN)
def test_tensors_that_are_refused(
    tensors: dict[str, Any], words: str, directory: pathlib.Path) -> None:
  change(directory, tensors=tensors)
  with pytest.raises(hub.HubError, match=words):
    hub.load(directory)


def test_directories_that_are_none(directory: pathlib.Path,
                                   tmp_path: pathlib.Path) -> None:
  with pytest.raises(hub.HubError, match="cannot be read"):
    hub.load(tmp_path / "nowhere")
  (directory / "model.safetensors").write_bytes(b"what is this")
  with pytest.raises(hub.HubError, match="model.safetensors"):
    hub.load(directory)
  (directory / "model.safetensors").unlink()
  with pytest.raises(hub.HubError, match="neither model.safetensors nor"):
    hub.load(directory)
  (directory / "model.safetensors.index.json").write_text(
      '{"weight_map": {"a": "gone.safetensors"}}')
  with pytest.raises(hub.HubError, match="gone.safetensors, not there"):
    hub.load(directory)
  (directory / "config.json").write_text("{")
  with pytest.raises(hub.HubError, match="not JSON"):
    hub.load(directory)


def test_a_pickle_is_read_only_when_asked(directory: pathlib.Path) -> None:
  torch = pytest.importorskip("torch")
  tensors = safetensors_numpy.load_file(directory / "model.safetensors")
  (directory / "model.safetensors").unlink()
  path = directory / "pytorch_model.bin"
  torch.save({name: torch.tensor(x) for name, x in tensors.items()}, path)
  with pytest.raises(hub.HubError, match="allow_pickle"):
    hub.load(directory)
  _, params = hub.load(directory, allow_pickle=True)
  assert equal(params, weights(make("gpt2")))
  # What would run code is refused by torch itself.
  torch.save({"x": pathlib.PurePath("x")}, path)
  with pytest.raises(hub.HubError, match="pytorch_model.bin"):
    hub.load(directory, allow_pickle=True)


# --- Saving ------------------------------------------------------------------

UNSAID = [
    ("transformer", {}, "no model of the family 'transformer'"),
    ("gpt3", dict(window=15), r"model.window=\[0, 15, 0\]"),
    ("bert", dict(window=29), r"model.window=\[29, 29, 29\]"),
    # Rotary positions go on beyond context_length.
    ("llama", dict(window=16), r"model.window=\[16, 16, 16\]"),
    ("gpt2", dict(positions="rotary"), "model.positions='rotary'"),
    ("gpt2", dict(norm="rms_norm"), "model.norm='rms_norm'"),
    ("gpt", dict(d_ff=50), "model.d_ff=50 .* is 96"),
    ("gpt", dict(activation="gelu"), "'gelu' cannot be said in afn"),
    ("bert", dict(pooler=True), "model.pooler=True"),
    ("bert", dict(head_transform=False), "model.head_bias=True"),
    ("t5v1_1", dict(activation="gelu"), "dense_act_fn"),
    ("llama", dict(tie_embedding=True, scale_head=True), "model.scale_head"),
    ("distilbert", dict(norm_epsilon=1e-5), "model.norm_epsilon=1e-05"),
]


@pytest.mark.parametrize(
    "family, fields, words", UNSAID,
    ids=[f"{f}-{'-'.join(fields)}" for f, fields, _ in UNSAID])
def test_models_that_transformers_does_not_have(
    family: str, fields: dict[str, Any], words: str,
    tmp_path: pathlib.Path) -> None:
  config = config_lib.complete_model(config_lib.ModelConfig(
      family=family, **dict(dict(
          d_model=24, num_layers=3, num_heads=4, vocab_size=40,
          context_length=16), **fields)))
  with pytest.raises(hub.HubError, match=words):
    hub.save(config, {}, tmp_path / "model")
  assert not (tmp_path / "model").exists()


def test_saving_refuses_other_parameters_and_other_models(
    directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
  config = make("gpt2")
  with pytest.raises(hub.HubError, match="model.safetensors; choose another"):
    hub.save(config, weights(config), directory)
  with pytest.raises(hub.HubError, match=r"token_embedding.*\(40, 24\), not"):
    hub.save(make("gpt2", vocab_size=41), weights(config), tmp_path / "a")
  with pytest.raises(hub.HubError, match="not those of the config"):
    hub.save(make("gpt2", num_layers=2), weights(config), tmp_path / "a")
  config = make("roberta")
  with pytest.raises(hub.HubError, match="pad_token_id is 0, but .* have 1"):
    hub.save(config, weights(config), tmp_path / "a",
             token_ids=dict(pad_token_id=0))


def test_weights_that_a_type_cannot_hold(tmp_path: pathlib.Path) -> None:
  config = make("gpt2")
  params = jax.tree.map(np.copy, weights(config))
  table = params["decoder"]["position_embedding"]["embedding"]
  table[3, 5] = 65504  # float16's largest
  hub.save(config, params, tmp_path / "a", dtype=np.float16)
  table[3, 5] = 65520
  with pytest.raises(hub.HubError, match="wpe.weight holds 65520, which flo"):
    hub.save(config, params, tmp_path / "b", dtype=np.float16)
  assert not (tmp_path / "b").exists()
  hub.save(config, params, tmp_path / "b", dtype=jnp.bfloat16)
  # What was not finite before is as it was.
  table[3, 5] = -np.inf
  hub.save(config, params, tmp_path / "c", dtype=np.float16)
  _, loaded = hub.load(tmp_path / "c")
  assert loaded["decoder"]["position_embedding"]["embedding"][
      3, 5] == -np.inf


# --- Inputs ------------------------------------------------------------------


def test_masks_become_segments_and_positions() -> None:
  tokens = np.arange(8).reshape(2, 4)
  mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
  inputs = hub.inputs(make("gpt2"), tokens, mask)
  assert inputs.segments is mask
  # The places of tokens among tokens; padding has any.
  np.testing.assert_array_equal(
      inputs.positions[mask == 1], [0, 1, 0, 1, 2])
  assert hub.inputs(make("bert"), tokens, mask).positions is None
  assert hub.inputs(make("roberta"), tokens, mask).positions is not None
  inputs = hub.inputs(make("t5"), tokens, mask, decoder_input_ids=tokens + 1)
  assert inputs.source.tokens is tokens and inputs.source.segments is mask
  assert inputs.tokens[0, 0] == 1 and inputs.segments is None


def test_families_here_are_all_that_there_are() -> None:
  assert set(FAMILIES) == set(families.FAMILIES) - {"transformer"}
