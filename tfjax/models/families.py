# SPDX-License-Identifier: Apache-2.0
"""The families: what makes each itself, as values of `ModelConfig` fields,
its published sizes, and one ladder of sizes for all.

Plain data below `tfjax.config`, which fills unset fields from here; it imports
nothing of tfjax. There is no code for any one family: all are built by
`tfjax.models.transformer` from these values.
"""

import dataclasses
from typing import Any, Mapping

# The ladder: one dial, a name, gives width, depth and heads. Names are the
# parameters of a decoder's blocks, 12 layers width^2, rounded. From "85M" on
# the shapes are those of GPT-2 (Radford et al. 2019, Table 2) and GPT-3 (Brown
# et al. 2020, Table 2.1). An encoder-decoder gets as many layers in each of
# its stacks.
# name: (d_model, num_layers, num_heads)
LADDER = {
    "3k": (16, 1, 1),
    "6k": (16, 2, 1),
    "14k": (24, 2, 1),
    "25k": (32, 2, 2),
    "55k": (48, 2, 3),
    "98k": (64, 2, 4),
    "147k": (64, 3, 4),
    "197k": (64, 4, 4),
    "332k": (96, 3, 6),
    "786k": (128, 4, 4),
    "1.8M": (192, 4, 6),
    "4.7M": (256, 6, 8),
    "14M": (384, 8, 6),
    "25M": (512, 8, 8),
    "85M": (768, 12, 12),
    "302M": (1024, 24, 16),
    "708M": (1280, 36, 20),
    "1.5B": (1600, 48, 25),
    "2.5B": (2560, 32, 32),
    "6.4B": (4096, 32, 32),
    "12.6B": (5120, 40, 40),
    "174B": (12288, 96, 96),
}

# What a family may leave unsaid.
_COMMON = dict(
    position_offset=0, num_token_types=0, embedding_norm=False,
    scale_embedding=False, first_norm=True, window=0, global_every=0,
    rotary_base=10000.0, rotary_base_local=None, relative_buckets=32,
    relative_distance=128, scale_scores=True, query_groups=1, gated=False,
    tie_embedding=True, scale_head=False, head_transform=False,
    head_bias=False, pooler=False, initializer="normal")


@dataclasses.dataclass(frozen=True)
class Family:
  """A named preset.

  Attributes:
    source: the paper.
    fields: values of `ModelConfig` fields that are not set otherwise.
    sizes: published size -> values of the fields that give its shape, with
      vocab_size or context_length where they differ from the family's.
    vocab_size, context_length: as published; a run takes its own.
  """

  source: str
  fields: Mapping[str, Any]
  sizes: Mapping[str, Mapping[str, Any]]
  vocab_size: int
  context_length: int


def _shape(d_model: int, num_layers: int, num_heads: int,
           **others: Any) -> dict[str, Any]:
  return dict(d_model=d_model, num_layers=num_layers, num_heads=num_heads,
              **others)


_GPT2 = _COMMON | dict(
    architecture="decoder", positions="learned", norm="layer_norm",
    norm_position="pre", norm_epsilon=1e-5, activation="gelu_tanh",
    use_bias=True)
_BERT = _COMMON | dict(
    architecture="encoder", positions="learned", num_token_types=2,
    embedding_norm=True, norm="layer_norm", norm_position="post",
    norm_epsilon=1e-12, activation="gelu", use_bias=True,
    head_transform=True, head_bias=True)
_T5 = _COMMON | dict(
    architecture="encoder_decoder", positions="relative", norm="rms_norm",
    norm_position="pre", norm_epsilon=1e-6, activation="relu", use_bias=False,
    scale_scores=False, scale_head=True, initializer="fan_in")

FAMILIES = {
    "transformer": Family(
        "Vaswani et al. 2017, Table 3",
        _COMMON | dict(
            architecture="encoder_decoder", positions="sinusoidal",
            scale_embedding=True, norm="layer_norm", norm_position="post",
            norm_epsilon=1e-6, activation="relu", use_bias=True,
            initializer="fan_in"),
        {"base": _shape(512, 6, 8), "big": _shape(1024, 6, 16)},
        vocab_size=37000, context_length=512),
    "gpt": Family(
        "Radford et al. 2018",
        _GPT2 | dict(norm_position="post"),
        {"base": _shape(768, 12, 12)},
        vocab_size=40478, context_length=512),
    "gpt2": Family(
        "Radford et al. 2019, Table 2", _GPT2,
        {"small": _shape(768, 12, 12), "medium": _shape(1024, 24, 16),
         "large": _shape(1280, 36, 20), "xl": _shape(1600, 48, 25)},
        vocab_size=50257, context_length=1024),
    # Table 2.1 prints 24 heads of 128 for XL, which fit neither its d_model
    # of 2048 nor its 1.3B parameters; 16 do. The paper does not say how wide
    # its bands are: 256 is the Sparse Transformer's block at that length
    # (Child et al. 2019), twice.
    "gpt3": Family(
        "Brown et al. 2020, Table 2.1",
        _GPT2 | dict(window=256, global_every=2),
        {"small": _shape(768, 12, 12), "medium": _shape(1024, 24, 16),
         "large": _shape(1536, 24, 16), "xl": _shape(2048, 24, 16),
         "2.7b": _shape(2560, 32, 32), "6.7b": _shape(4096, 32, 32),
         "13b": _shape(5140, 40, 40, head_dim=128),
         "175b": _shape(12288, 96, 96)},
        vocab_size=50257, context_length=2048),
    # The four small sizes are those of Turc et al. 2019, Table 1.
    "bert": Family(
        "Devlin et al. 2019, §3", _BERT,
        {"tiny": _shape(128, 2, 2), "mini": _shape(256, 4, 4),
         "small": _shape(512, 4, 8), "medium": _shape(512, 8, 8),
         "base": _shape(768, 12, 12), "large": _shape(1024, 24, 16)},
        vocab_size=30522, context_length=512),
    # Positions start behind that of padding, 1.
    "roberta": Family(
        "Liu et al. 2019",
        _BERT | dict(num_token_types=1, position_offset=2, norm_epsilon=1e-5),
        {"base": _shape(768, 12, 12), "large": _shape(1024, 24, 16)},
        vocab_size=50265, context_length=512),
    "distilbert": Family(
        "Sanh et al. 2019", _BERT | dict(num_token_types=0),
        {"base": _shape(768, 6, 12)},
        vocab_size=30522, context_length=512),
    "t5": Family(
        "Raffel et al. 2020, §3.7", _T5,
        {"small": _shape(512, 6, 8), "base": _shape(768, 12, 12),
         "large": _shape(1024, 24, 16),
         "3b": _shape(1024, 24, 32, head_dim=128, d_ff=16384),
         "11b": _shape(1024, 24, 128, head_dim=128, d_ff=65536)},
        vocab_size=32128, context_length=512),
    "t5v1_1": Family(
        "Shazeer 2020; released with Raffel et al. 2020 as T5.1.1",
        _T5 | dict(activation="gelu_tanh", gated=True, tie_embedding=False,
                   scale_head=False),
        {"small": _shape(512, 8, 6, head_dim=64, d_ff=1024),
         "base": _shape(768, 12, 12, d_ff=2048),
         "large": _shape(1024, 24, 16, d_ff=2816),
         "xl": _shape(2048, 24, 32, d_ff=5120),
         "xxl": _shape(4096, 24, 64, d_ff=10240)},
        vocab_size=32128, context_length=512),
    "bart": Family(
        "Lewis et al. 2020, §2",
        _COMMON | dict(
            architecture="encoder_decoder", positions="learned",
            position_offset=2, embedding_norm=True, norm="layer_norm",
            norm_position="post", norm_epsilon=1e-5, activation="gelu",
            use_bias=True),
        {"base": _shape(768, 6, 12), "large": _shape(1024, 12, 16)},
        vocab_size=50265, context_length=1024),
    # A quarter as many heads of keys and values where a size does not say.
    "llama": Family(
        "Touvron et al. 2023a, 2023b (7b to 70b); Grattafiori et al. 2024 (8b)",
        _COMMON | dict(
            architecture="decoder", positions="rotary", norm="rms_norm",
            norm_position="pre", norm_epsilon=1e-5, activation="silu",
            gated=True, use_bias=False, tie_embedding=False, query_groups=4),
        {"7b": _shape(4096, 32, 32, num_kv_heads=32, d_ff=11008),
         "13b": _shape(5120, 40, 40, num_kv_heads=40, d_ff=13824),
         "70b": _shape(8192, 80, 64, num_kv_heads=8, d_ff=28672),
         "8b": _shape(4096, 32, 32, num_kv_heads=8, d_ff=14336,
                      rotary_base=500000.0, vocab_size=128256,
                      context_length=8192)},
        vocab_size=32000, context_length=4096),
    "modernbert": Family(
        "Warner et al. 2024, Table 4",
        _COMMON | dict(
            architecture="encoder", positions="rotary", embedding_norm=True,
            first_norm=False, norm="layer_norm", norm_position="pre",
            norm_epsilon=1e-5, activation="gelu", gated=True, use_bias=False,
            window=128, global_every=3, rotary_base=160000.0,
            rotary_base_local=10000.0, head_transform=True, head_bias=True),
        {"base": _shape(768, 22, 12, d_ff=1152),
         "large": _shape(1024, 28, 16, d_ff=2624)},
        vocab_size=50368, context_length=8192),
}


def shapes(family: str) -> dict[str, Mapping[str, Any]]:
  """Every size that a family has: its published ones, and the ladder."""
  ladder = {name: _shape(*shape) for name, shape in LADDER.items()}
  return ladder | {
      name: {key: value for key, value in shape.items()
             if key not in ("vocab_size", "context_length")}
      for name, shape in FAMILIES[family].sizes.items()}


def published(family: str, size: str) -> dict[str, Any]:
  """`ModelConfig` fields of a published size, its vocabulary and length too."""
  preset = FAMILIES[family]
  return dict(family=family, vocab_size=preset.vocab_size,
              context_length=preset.context_length) | preset.sizes[size]
