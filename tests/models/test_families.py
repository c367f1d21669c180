# SPDX-License-Identifier: Apache-2.0
"""The presets: published sizes, what makes each family itself, the ladder."""

import dataclasses
import functools
import types
from typing import Any

import pytest

from tfjax import config as config_lib
from tfjax.models import families
from tfjax.models import transformer

PUBLISHED = [(family, size) for family in families.FAMILIES
             for size in families.FAMILIES[family].sizes]


def published(family: str, size: str) -> config_lib.ModelConfig:
  # Scanned, as its shapes are made in a moment however deep.
  return config_lib.complete_model(config_lib.ModelConfig(
      **families.published(family, size), scan_layers=True))


def total(family: str, size: str) -> int:
  return transformer.count_parameters(published(family, size)).total


# --- Sizes -------------------------------------------------------------------

# Of the released checkpoints with their language modelling heads; what tied
# weights share counts once.
TOTALS = {
    ("gpt", "base"): 116_534_784,
    ("gpt2", "small"): 124_439_808,
    ("gpt2", "medium"): 354_823_168,
    ("gpt2", "large"): 774_030_080,
    ("gpt2", "xl"): 1_557_611_200,
    ("bert", "base"): 109_514_298,
    ("bert", "large"): 335_174_458,
    ("roberta", "base"): 124_697_433,
    ("roberta", "large"): 355_412_057,
    ("distilbert", "base"): 66_985_530,
    ("t5", "small"): 60_506_624,
    ("t5", "base"): 222_903_552,
    ("t5", "large"): 737_668_096,
    ("t5", "3b"): 2_851_598_336,
    ("t5", "11b"): 11_307_321_344,
    ("t5v1_1", "small"): 76_961_152,
    ("t5v1_1", "base"): 247_577_856,
    ("t5v1_1", "large"): 783_150_080,
    ("t5v1_1", "xl"): 2_849_757_184,
    ("t5v1_1", "xxl"): 11_135_332_352,
    ("bart", "base"): 139_420_416,
    ("bart", "large"): 406_291_456,
    ("llama", "7b"): 6_738_415_616,
    ("llama", "13b"): 13_015_864_320,
    ("llama", "70b"): 68_976_648_192,
    ("llama", "8b"): 8_030_261_248,
    ("modernbert", "base"): 149_655_232,
    ("modernbert", "large"): 395_881_664,
}


@pytest.mark.parametrize("family, size", TOTALS)
def test_sizes_have_as_many_parameters_as_were_released(
    family: str, size: str) -> None:
  assert total(family, size) == TOTALS[family, size]


# The same from another implementation's own arguments.
def _gpt2(d_model: int, layers: int, heads: int, **more: int) -> tuple:
  return "GPT2LMHeadModel", dict(
      n_embd=d_model, n_layer=layers, n_head=heads) | more


def _bert(name: str, d_model: int, layers: int, heads: int,
          **more: int) -> tuple:
  return f"{name}ForMaskedLM", dict(
      hidden_size=d_model, num_hidden_layers=layers, num_attention_heads=heads,
      intermediate_size=4 * d_model) | more


def _t5(d_model: int, layers: int, heads: int, width: int, d_ff: int,
        gated: bool = False) -> tuple:
  return "T5ForConditionalGeneration", dict(
      d_model=d_model, num_layers=layers, num_heads=heads, d_kv=width,
      d_ff=d_ff, feed_forward_proj="gated-gelu" if gated else "relu")


def _bart(d_model: int, layers: int, heads: int) -> tuple:
  return "BartForConditionalGeneration", dict(d_model=d_model) | {
      f"{stack}_{key}": value for stack in ("encoder", "decoder")
      for key, value in dict(layers=layers, attention_heads=heads,
                             ffn_dim=4 * d_model).items()}


def _llama(d_model: int, layers: int, heads: int, kv_heads: int, d_ff: int,
           vocab_size: int = 32000) -> tuple:
  return "LlamaForCausalLM", dict(
      hidden_size=d_model, num_hidden_layers=layers, num_attention_heads=heads,
      num_key_value_heads=kv_heads, intermediate_size=d_ff,
      vocab_size=vocab_size)


_ROBERTA = dict(vocab_size=50265, max_position_embeddings=514,
                type_vocab_size=1)
THEIRS = {
    ("gpt", "base"): ("OpenAIGPTLMHeadModel", {}),
    ("gpt2", "small"): ("GPT2LMHeadModel", {}),
    ("gpt2", "medium"): _gpt2(1024, 24, 16),
    ("gpt2", "large"): _gpt2(1280, 36, 20),
    ("gpt2", "xl"): _gpt2(1600, 48, 25),
    ("gpt3", "xl"): _gpt2(2048, 24, 16, n_positions=2048),
    ("gpt3", "175b"): _gpt2(12288, 96, 96, n_positions=2048),
    ("bert", "tiny"): _bert("Bert", 128, 2, 2),
    ("bert", "mini"): _bert("Bert", 256, 4, 4),
    ("bert", "small"): _bert("Bert", 512, 4, 8),
    ("bert", "medium"): _bert("Bert", 512, 8, 8),
    ("bert", "base"): ("BertForMaskedLM", {}),
    ("bert", "large"): _bert("Bert", 1024, 24, 16),
    ("roberta", "base"): _bert("Roberta", 768, 12, 12, **_ROBERTA),
    ("roberta", "large"): _bert("Roberta", 1024, 24, 16, **_ROBERTA),
    ("distilbert", "base"): ("DistilBertForMaskedLM", {}),
    ("t5", "small"): ("T5ForConditionalGeneration", {}),
    ("t5", "base"): _t5(768, 12, 12, 64, 3072),
    ("t5", "large"): _t5(1024, 24, 16, 64, 4096),
    ("t5", "3b"): _t5(1024, 24, 32, 128, 16384),
    ("t5", "11b"): _t5(1024, 24, 128, 128, 65536),
    ("t5v1_1", "small"): _t5(512, 8, 6, 64, 1024, gated=True),
    ("t5v1_1", "base"): _t5(768, 12, 12, 64, 2048, gated=True),
    ("t5v1_1", "large"): _t5(1024, 24, 16, 64, 2816, gated=True),
    ("t5v1_1", "xl"): _t5(2048, 24, 32, 64, 5120, gated=True),
    ("t5v1_1", "xxl"): _t5(4096, 24, 64, 64, 10240, gated=True),
    ("bart", "base"): _bart(768, 6, 12),
    ("bart", "large"): ("BartForConditionalGeneration", {}),
    ("llama", "7b"): _llama(4096, 32, 32, 32, 11008),
    ("llama", "13b"): _llama(5120, 40, 40, 40, 13824),
    ("llama", "70b"): _llama(8192, 80, 64, 8, 28672),
    ("llama", "8b"): _llama(4096, 32, 32, 8, 14336, 128256),
    ("modernbert", "base"): ("ModernBertForMaskedLM", {}),
    ("modernbert", "large"): ("ModernBertForMaskedLM", dict(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
        intermediate_size=2624)),
}


@functools.cache
def hub() -> types.ModuleType:
  pytest.importorskip("torch")
  return pytest.importorskip("transformers")


def theirs(family: str, size: str) -> Any:
  """Their configuration of a size."""
  name, fields = THEIRS[family, size]
  return getattr(hub(), name).config_class(**fields)


@pytest.mark.parametrize("family, size", THEIRS)
def test_sizes_have_as_many_parameters_as_transformers_makes(
    family: str, size: str) -> None:
  torch = pytest.importorskip("torch")
  with torch.device("meta"):  # shapes only
    model = getattr(hub(), THEIRS[family, size][0])(theirs(family, size))
  count = model.num_parameters()
  if family == "t5v1_1":
    # The heads released are untied; transformers ties T5's whatever it is told.
    assert model.lm_head.weight is model.shared.weight
    count += model.lm_head.weight.numel()
  assert total(family, size) == count


# Brown et al. 2020, Table 2.1, as printed.
TABLE_2_1 = {"small": 125e6, "medium": 350e6, "large": 760e6, "xl": 1.3e9,
             "2.7b": 2.7e9, "6.7b": 6.7e9, "13b": 13.0e9, "175b": 175.0e9}


def test_gpt3_has_the_eight_sizes_of_its_table() -> None:
  assert set(families.FAMILIES["gpt3"].sizes) == set(TABLE_2_1)
  for size, expected in TABLE_2_1.items():
    # 356M is printed as 350M, and 2.65B as 2.7B.
    assert total("gpt3", size) == pytest.approx(expected, rel=0.02), size


def test_the_first_transformer_has_the_sizes_of_its_table() -> None:
  """Vaswani et al. 2017, Table 3: 65M and 213M. Its vocabulary is told as
  "about 37000", and a released one was smaller: hence the tolerance."""
  assert total("transformer", "base") == pytest.approx(65e6, rel=0.04)
  assert total("transformer", "big") == pytest.approx(213e6, rel=0.01)


def test_every_published_size_is_tested() -> None:
  elsewhere = {(family, size) for family, size in PUBLISHED
               if family in ("gpt3", "transformer")}
  assert set(THEIRS) | elsewhere == set(PUBLISHED)


# --- What makes a family itself ----------------------------------------------

# What each paper chose, in fields that tell it from the others.
ITSELF = {
    "transformer": dict(
        architecture="encoder_decoder", norm_position="post",
        positions="sinusoidal", activation="relu", scale_embedding=True,
        tie_embedding=True, use_bias=True, norm="layer_norm"),
    "gpt": dict(architecture="decoder", norm_position="post",
                positions="learned", activation="gelu_tanh"),
    "gpt2": dict(architecture="decoder", norm_position="pre",
                 positions="learned", activation="gelu_tanh", window=0,
                 tie_embedding=True, use_bias=True),
    "gpt3": dict(architecture="decoder", norm_position="pre", window=256,
                 global_every=2),
    "bert": dict(architecture="encoder", norm_position="post",
                 num_token_types=2, embedding_norm=True, activation="gelu",
                 head_transform=True, head_bias=True, position_offset=0),
    "roberta": dict(architecture="encoder", norm_position="post",
                    num_token_types=1, position_offset=2),
    "distilbert": dict(architecture="encoder", norm_position="post",
                       num_token_types=0),
    "t5": dict(architecture="encoder_decoder", norm_position="pre",
               positions="relative", norm="rms_norm", use_bias=False,
               activation="relu", gated=False, tie_embedding=True,
               scale_head=True, scale_scores=False),
    "t5v1_1": dict(architecture="encoder_decoder", positions="relative",
                   norm="rms_norm", use_bias=False, activation="gelu_tanh",
                   gated=True, tie_embedding=False, scale_head=False,
                   scale_scores=False),
    "bart": dict(architecture="encoder_decoder", norm_position="post",
                 positions="learned", position_offset=2, embedding_norm=True,
                 activation="gelu", scale_embedding=False, use_bias=True),
    "llama": dict(architecture="decoder", norm_position="pre",
                  positions="rotary", norm="rms_norm", use_bias=False,
                  activation="silu", gated=True, tie_embedding=False,
                  query_groups=4),
    "modernbert": dict(architecture="encoder", norm_position="pre",
                       positions="rotary", use_bias=False, activation="gelu",
                       gated=True, window=128, global_every=3,
                       first_norm=False, rotary_base=160000.0,
                       rotary_base_local=10000.0),
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_is_its_choice_of_fields(family: str) -> None:
  model = config_lib.complete_model(config_lib.ModelConfig(
      family=family, size="98k"))
  assert {name: getattr(model, name) for name in ITSELF[family]
          } == ITSELF[family]
  others = [fields for name, fields in ITSELF.items() if name != family]
  assert ITSELF[family] not in others


# field of ours -> attribute of theirs, which all of these state.
STATED = {
    "gpt2": dict(norm_epsilon="layer_norm_epsilon", vocab_size="vocab_size",
                 context_length="n_positions", init_std="initializer_range",
                 tie_embedding="tie_word_embeddings"),
    "gpt": dict(norm_epsilon="layer_norm_epsilon", vocab_size="vocab_size",
                context_length="n_positions"),
    "bert": dict(norm_epsilon="layer_norm_eps", vocab_size="vocab_size",
                 context_length="max_position_embeddings",
                 num_token_types="type_vocab_size", activation="hidden_act"),
    "distilbert": dict(vocab_size="vocab_size", activation="activation",
                       context_length="max_position_embeddings"),
    "t5": dict(norm_epsilon="layer_norm_epsilon", vocab_size="vocab_size",
               relative_buckets="relative_attention_num_buckets",
               relative_distance="relative_attention_max_distance",
               activation="feed_forward_proj"),
    "bart": dict(vocab_size="vocab_size", activation="activation_function",
                 context_length="max_position_embeddings",
                 scale_embedding="scale_embedding"),
    "modernbert": dict(
        norm_epsilon="norm_eps", vocab_size="vocab_size",
        context_length="max_position_embeddings", window="local_attention",
        activation="hidden_activation", use_bias="attention_bias"),
}


@pytest.mark.parametrize("family", STATED)
def test_a_familys_numbers_are_those_of_the_reference(family: str) -> None:
  size = {"gpt2": "small", "t5": "small", "bart": "large"}.get(family, "base")
  ours, other = published(family, size), theirs(family, size)
  assert {name: getattr(ours, name) for name in STATED[family]} == {
      name: getattr(other, key) for name, key in STATED[family].items()}


def test_layers_with_a_window_are_those_of_the_papers() -> None:
  model = published("modernbert", "base")
  assert transformer.local_layers(model) == [
      kind == "sliding_attention"
      for kind in theirs("modernbert", "base").layer_types]
  bases = theirs("modernbert", "base").rope_parameters
  assert bases["full_attention"]["rope_theta"] == model.rotary_base
  assert bases["sliding_attention"]["rope_theta"] == model.rotary_base_local
  assert transformer.local_layers(published("gpt3", "small")) == [
      False, True] * 6
  assert not any(transformer.local_layers(published("gpt2", "small")))
  every = dataclasses.replace(model, global_every=0)
  assert all(transformer.local_layers(every))


def test_distilbert_is_half_of_bert() -> None:
  half, whole = published("distilbert", "base"), published("bert", "base")
  assert dataclasses.replace(
      half, family="bert", num_layers=12, num_encoder_layers=12,
      num_token_types=2) == whole


# --- The ladder, and all of it together --------------------------------------


@pytest.mark.parametrize("name", families.LADDER)
def test_the_ladders_names_are_the_parameters_of_its_blocks(name: str) -> None:
  d_model, num_layers, _ = families.LADDER[name]
  exact = 12 * num_layers * d_model ** 2
  scale = {"k": 1e3, "M": 1e6, "B": 1e9}[name[-1]]
  assert abs(float(name[:-1]) - exact / scale) <= 0.5 * (
      0.1 if "." in name else 1.0)


def test_the_ladder_goes_up() -> None:
  blocks = [layers * d_model ** 2
            for d_model, layers, _ in families.LADDER.values()]
  assert blocks == sorted(set(blocks))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_has_every_size_of_the_ladder(family: str) -> None:
  for name, (d_model, num_layers, num_heads) in families.LADDER.items():
    model = config_lib.complete_model(config_lib.ModelConfig(
        family=family, size=name))
    assert (model.d_model, model.num_layers, model.num_heads) == (
        d_model, num_layers, num_heads)
    assert model.head_dim * num_heads == d_model
    assert model.num_encoder_layers == num_layers
  smallest = config_lib.complete_model(config_lib.ModelConfig(
      family=family, size="3k", vocab_size=10, context_length=4))
  assert transformer.count_parameters(smallest).non_embedding > 3000


def test_presets_name_fields_and_valid_values() -> None:
  """A misspelt field or value of a preset would go unseen until it is used."""
  fields = {entry.name: entry
            for entry in dataclasses.fields(config_lib.ModelConfig)}
  shape = {"d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim",
           "d_ff", "num_encoder_layers", "size", "vocab_size",
           "base_d_model", "base_head_dim", "base_num_layers"}
  open_fields = {name for name, entry in fields.items()
                 if entry.default is None} - shape
  for family, preset in families.FAMILIES.items():
    assert set(preset.fields) == open_fields, family
    for values in (preset.fields, *preset.sizes.values()):
      for name, value in values.items():
        check = fields[name].metadata["check"]
        assert value is None or check is None or check(value) is None, (
            f"{family}: {name}={value!r}")
