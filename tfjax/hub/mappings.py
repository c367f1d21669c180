# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a Hugging Face model is which parameter of ours.

One row a parameter, with {} for the number of a layer; loading and saving both
go by the rows. A row counts where the model has its parameter: one table
serves models with and without biases, heads or poolers. What config.json says
is in settings.py, how tensors are read and written in huggingface.py.

Shape letters: I inputs, O outputs of a stored tensor.
"""

import dataclasses
import math
import re
from typing import Mapping

from tfjax import config as config_lib
from tfjax.hub import errors

# Where scanned layers are in a parameter's path.
_SCANNED = "/blocks/block/"


@dataclasses.dataclass(frozen=True)
class Row:
  """Where a parameter lies.

  Attributes:
    theirs: the stored tensor's name.
    ours: the parameter's path.
    layout: "matrix", [I, O]; "transposed", [O, I]; "vector", [O]; "row",
      [1, O]. I is the parameter's first dimension, O all others in one.
    part, parts: it is this one of so many equal parts of the stored outputs.
    gated: only where the feed-forward is (True) or is not (False).
    stacked: the parameter is a layer's in an array of all scanned layers.
  """

  theirs: str
  ours: str
  layout: str
  part: int = 0
  parts: int = 1
  gated: bool | None = None
  stacked: bool = False

  def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """The parameter's (inputs, outputs)."""
    inputs = 1 if self.layout in ("vector", "row") else shape[0]
    return inputs, math.prod(shape) // inputs

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor that a parameter of this shape is stored in."""
    inputs, outputs = self.matrix_shape(shape)
    outputs *= self.parts
    return {"matrix": (inputs, outputs), "transposed": (outputs, inputs),
            "vector": (outputs,), "row": (1, outputs)}[self.layout]


@dataclasses.dataclass(frozen=True)
class Tensors:
  """The tensors of a model type.

  Attributes:
    rows: the table.
    prefix: what stands before the body's names where there is a head;
      directories have it or not.
    embedding: the stored embedding of tokens.
    copies: tensors that repeat another: name -> its original. They may be
      stored, and must be equal then.
    untied_copies: whether transformers wants them where the head is not tied,
      as it then ties nothing.
    buffers: stored tensors that are no parameters, a regular expression.
    left_out: what only other heads need, likewise; leaving it is a warning.
  """

  rows: list[Row]
  prefix: str
  embedding: str
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  untied_copies: bool = True
  buffers: str = r"(?!)"
  left_out: str = r"(?!)"


# --- The tables --------------------------------------------------------------


def _table(theirs: str, ours: str) -> list[Row]:
  return [Row(f"{theirs}.weight", f"{ours}/embedding", "matrix")]


def _norm(theirs: str, ours: str) -> list[Row]:
  return [Row(f"{theirs}.weight", f"{ours}/scale", "vector"),
          Row(f"{theirs}.bias", f"{ours}/bias", "vector")]


def _dense(theirs: str, *ours: str, layout: str = "transposed",
           gated: bool | None = None) -> list[Row]:
  """torch's Linear; of several of ours each is a part of its outputs."""
  rows = []
  for part, path in enumerate(ours):
    split = dict(part=part, parts=len(ours), gated=gated)
    rows += [Row(f"{theirs}.weight", f"{path}/kernel", layout, **split),
             Row(f"{theirs}.bias", f"{path}/bias", "vector", **split)]
  return rows


def _conv(theirs: str, *ours: str) -> list[Row]:
  """GPT-2's Conv1D, whose weight is not transposed."""
  return _dense(theirs, *ours, layout="matrix")


def _attention(theirs: str, ours: str, names: str,
               output: str) -> list[Row]:
  """Projections of their own; `names` of query, key and value."""
  rows = _dense(f"{theirs}.{output}", f"{ours}/output")
  for name, part in zip(names.split(), ("query", "key", "value")):
    rows += _dense(f"{theirs}.{name}", f"{ours}/{part}")
  return rows


def _qkv(ours: str) -> list[str]:
  return [f"{ours}/{name}" for name in ("query", "key", "value")]


def _gpt(tokens: str, positions: str) -> list[Row]:
  theirs, ours = "transformer.h.{}", "decoder/block_{}"
  return [
      *_table(f"transformer.{tokens}", "token_embedding"),
      *_table(f"transformer.{positions}", "decoder/position_embedding"),
      *_norm(f"{theirs}.ln_1", f"{ours}/attention_norm"),
      *_conv(f"{theirs}.attn.c_attn", *_qkv(f"{ours}/attention")),
      *_conv(f"{theirs}.attn.c_proj", f"{ours}/attention/output"),
      *_norm(f"{theirs}.ln_2", f"{ours}/feed_forward_norm"),
      *_conv(f"{theirs}.mlp.c_fc", f"{ours}/feed_forward/up"),
      *_conv(f"{theirs}.mlp.c_proj", f"{ours}/feed_forward/down"),
      *_norm("transformer.ln_f", "decoder/final_norm"),
      *_table("lm_head", "untied_head"),
  ]


def _bert(prefix: str) -> list[Row]:
  """What BERT and RoBERTa share: all but the head."""
  theirs, ours = f"{prefix}.encoder.layer.{{}}", "encoder/block_{}"
  embeddings = f"{prefix}.embeddings"
  return [
      *_table(f"{embeddings}.word_embeddings", "token_embedding"),
      *_table(f"{embeddings}.position_embeddings",
              "encoder/position_embedding"),
      *_table(f"{embeddings}.token_type_embeddings",
              "encoder/token_type_embedding"),
      *_norm(f"{embeddings}.LayerNorm", "encoder/embedding_norm"),
      *_attention(f"{theirs}.attention", f"{ours}/attention",
                  "self.query self.key self.value", "output.dense"),
      *_norm(f"{theirs}.attention.output.LayerNorm",
             f"{ours}/attention_norm"),
      *_dense(f"{theirs}.intermediate.dense", f"{ours}/feed_forward/up"),
      *_dense(f"{theirs}.output.dense", f"{ours}/feed_forward/down"),
      *_norm(f"{theirs}.output.LayerNorm", f"{ours}/feed_forward_norm"),
      *_dense(f"{prefix}.pooler.dense", "pooler"),
  ]


def _distilbert() -> list[Row]:
  theirs, ours = "distilbert.transformer.layer.{}", "encoder/block_{}"
  return [
      *_table("distilbert.embeddings.word_embeddings", "token_embedding"),
      *_table("distilbert.embeddings.position_embeddings",
              "encoder/position_embedding"),
      *_norm("distilbert.embeddings.LayerNorm", "encoder/embedding_norm"),
      *_attention(f"{theirs}.attention", f"{ours}/attention",
                  "q_lin k_lin v_lin", "out_lin"),
      *_norm(f"{theirs}.sa_layer_norm", f"{ours}/attention_norm"),
      *_dense(f"{theirs}.ffn.lin1", f"{ours}/feed_forward/up"),
      *_dense(f"{theirs}.ffn.lin2", f"{ours}/feed_forward/down"),
      *_norm(f"{theirs}.output_layer_norm", f"{ours}/feed_forward_norm"),
      *_dense("vocab_transform", "head_dense"),
      *_norm("vocab_layer_norm", "head_norm"),
      *_table("vocab_projector", "untied_head"),
      Row("vocab_projector.bias", "head_bias/bias", "vector"),
  ]


def _t5() -> list[Row]:
  rows = [*_table("shared", "token_embedding"),
          *_table("lm_head", "untied_head")]
  for stack in ("encoder", "decoder"):
    theirs, ours = f"{stack}.block.{{}}.layer", f"{stack}/block_{{}}"
    last = 1 if stack == "encoder" else 2
    dense = f"{theirs}.{last}.DenseReluDense"
    rows += [
        *_table(f"{stack}.block.0.layer.0.SelfAttention."
                "relative_attention_bias", f"{stack}/relative_bias"),
        *_norm(f"{theirs}.0.layer_norm", f"{ours}/attention_norm"),
        *_attention(f"{theirs}.0.SelfAttention", f"{ours}/attention",
                    "q k v", "o"),
        *_norm(f"{theirs}.{last}.layer_norm", f"{ours}/feed_forward_norm"),
        *_dense(f"{dense}.wi", f"{ours}/feed_forward/up", gated=False),
        *_dense(f"{dense}.wi_0", f"{ours}/feed_forward/gate", gated=True),
        *_dense(f"{dense}.wi_1", f"{ours}/feed_forward/up", gated=True),
        *_dense(f"{dense}.wo", f"{ours}/feed_forward/down"),
        *_norm(f"{stack}.final_layer_norm", f"{stack}/final_norm"),
    ]
  theirs, ours = "decoder.block.{}.layer.1", "decoder/block_{}"
  return rows + [
      *_norm(f"{theirs}.layer_norm", f"{ours}/cross_attention_norm"),
      *_attention(f"{theirs}.EncDecAttention", f"{ours}/cross_attention",
                  "q k v", "o"),
  ]


def _bart() -> list[Row]:
  rows = [*_table("model.shared", "token_embedding"),
          *_table("lm_head", "untied_head"),
          Row("final_logits_bias", "head_bias/bias", "row")]
  projections = ("q_proj k_proj v_proj", "out_proj")
  for stack in ("encoder", "decoder"):
    theirs, ours = f"model.{stack}.layers.{{}}", f"{stack}/block_{{}}"
    rows += [
        *_table(f"model.{stack}.embed_positions",
                f"{stack}/position_embedding"),
        *_norm(f"model.{stack}.layernorm_embedding",
               f"{stack}/embedding_norm"),
        *_attention(f"{theirs}.self_attn", f"{ours}/attention", *projections),
        *_norm(f"{theirs}.self_attn_layer_norm", f"{ours}/attention_norm"),
        *_dense(f"{theirs}.fc1", f"{ours}/feed_forward/up"),
        *_dense(f"{theirs}.fc2", f"{ours}/feed_forward/down"),
        *_norm(f"{theirs}.final_layer_norm", f"{ours}/feed_forward_norm"),
    ]
  theirs, ours = "model.decoder.layers.{}", "decoder/block_{}"
  return rows + [
      *_attention(f"{theirs}.encoder_attn", f"{ours}/cross_attention",
                  *projections),
      *_norm(f"{theirs}.encoder_attn_layer_norm",
             f"{ours}/cross_attention_norm"),
  ]


def _llama() -> list[Row]:
  theirs, ours = "model.layers.{}", "decoder/block_{}"
  return [
      *_table("model.embed_tokens", "token_embedding"),
      *_norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm"),
      *_attention(f"{theirs}.self_attn", f"{ours}/attention",
                  "q_proj k_proj v_proj", "o_proj"),
      *_norm(f"{theirs}.post_attention_layernorm",
             f"{ours}/feed_forward_norm"),
      *_dense(f"{theirs}.mlp.gate_proj", f"{ours}/feed_forward/gate"),
      *_dense(f"{theirs}.mlp.up_proj", f"{ours}/feed_forward/up"),
      *_dense(f"{theirs}.mlp.down_proj", f"{ours}/feed_forward/down"),
      *_norm("model.norm", "decoder/final_norm"),
      *_table("lm_head", "untied_head"),
  ]


def _modernbert() -> list[Row]:
  theirs, ours = "model.layers.{}", "encoder/block_{}"
  return [
      *_table("model.embeddings.tok_embeddings", "token_embedding"),
      *_norm("model.embeddings.norm", "encoder/embedding_norm"),
      *_norm(f"{theirs}.attn_norm", f"{ours}/attention_norm"),
      *_dense(f"{theirs}.attn.Wqkv", *_qkv(f"{ours}/attention")),
      *_dense(f"{theirs}.attn.Wo", f"{ours}/attention/output"),
      *_norm(f"{theirs}.mlp_norm", f"{ours}/feed_forward_norm"),
      *_dense(f"{theirs}.mlp.Wi", f"{ours}/feed_forward/gate",
              f"{ours}/feed_forward/up"),
      *_dense(f"{theirs}.mlp.Wo", f"{ours}/feed_forward/down"),
      *_norm("model.final_norm", "encoder/final_norm"),
      *_dense("head.dense", "head_dense"),
      *_norm("head.norm", "head_norm"),
      *_table("decoder", "untied_head"),
      Row("decoder.bias", "head_bias/bias", "vector"),
  ]


_BERT_LEFT_OUT = r"bert\.pooler\..*|cls\.seq_relationship\..*"
_POSITION_IDS = r"(\w+\.)?embeddings\.position_ids"

TENSORS = {
    "openai-gpt": Tensors(
        _gpt("tokens_embed", "positions_embed"), "transformer",
        "transformer.tokens_embed.weight",
        buffers=r"transformer\.(position_ids|h\.\d+\.attn\.bias)"),
    "gpt2": Tensors(
        _gpt("wte", "wpe"), "transformer", "transformer.wte.weight",
        buffers=r"transformer\.h\.\d+\.attn\.(masked_)?bias"),
    "bert": Tensors(
        [*_bert("bert"),
         *_dense("cls.predictions.transform.dense", "head_dense"),
         *_norm("cls.predictions.transform.LayerNorm", "head_norm"),
         *_table("cls.predictions.decoder", "untied_head"),
         Row("cls.predictions.bias", "head_bias/bias", "vector")],
        "bert", "bert.embeddings.word_embeddings.weight",
        copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        buffers=_POSITION_IDS, left_out=_BERT_LEFT_OUT),
    "roberta": Tensors(
        [*_bert("roberta"),
         *_dense("lm_head.dense", "head_dense"),
         *_norm("lm_head.layer_norm", "head_norm"),
         *_table("lm_head.decoder", "untied_head"),
         Row("lm_head.bias", "head_bias/bias", "vector")],
        "roberta", "roberta.embeddings.word_embeddings.weight",
        copies={"lm_head.decoder.bias": "lm_head.bias"},
        buffers=_POSITION_IDS, left_out=r"roberta\.pooler\..*"),
    "distilbert": Tensors(
        _distilbert(), "distilbert",
        "distilbert.embeddings.word_embeddings.weight",
        buffers=_POSITION_IDS),
    "t5": Tensors(
        _t5(), "", "shared.weight",
        copies={f"{stack}.embed_tokens.weight": "shared.weight"
                for stack in ("encoder", "decoder")},
        untied_copies=False,
        # The first releases stored a bias that nothing reads.
        buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\."
                r"relative_attention_bias\.weight"),
    "bart": Tensors(
        _bart(), "model", "model.shared.weight",
        copies={f"model.{stack}.embed_tokens.weight": "model.shared.weight"
                for stack in ("encoder", "decoder")},
        # The head's bias is a buffer there; zeros are none.
        buffers=r"final_logits_bias|model\.(encoder|decoder)\.version"),
    "llama": Tensors(
        _llama(), "model", "model.embed_tokens.weight",
        buffers=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    "modernbert": Tensors(
        _modernbert(), "model", "model.embeddings.tok_embeddings.weight"),
}


# --- A model's own -----------------------------------------------------------


def rows(model_type: str, config: config_lib.ModelConfig,
         paths: list[str]) -> dict[str, list[Row]]:
  """Path of a parameter -> its row; one a layer where layers are scanned.

  Raises:
    HubError: the model type has no place for a parameter.
  """
  table = {row.ours: row for row in TENSORS[model_type].rows
           if row.gated in (None, config.gated)}
  found = {}
  for path in paths:
    number = re.search(r"/block_(\d+)/", path)
    pattern = re.sub(f"/block_\\d+/|{_SCANNED}", "/block_{}/", path)
    if pattern not in table:
      raise errors.HubError(
          f"{model_type!r} models of transformers have no tensor for our "
          f"parameter {path}")
    row, stacked = table[pattern], _SCANNED in path
    layers = [int(number[1]) if number else 0]
    if stacked:
      count = (config.num_encoder_layers if path.startswith("encoder/")
               else config.num_layers)
      layers = range(0 if config.first_norm else 1, count)
    found[path] = [
        dataclasses.replace(row, theirs=row.theirs.format(layer),
                            ours=path, stacked=stacked) for layer in layers]
  return found


def copies(model_type: str, config: config_lib.ModelConfig) -> dict[str, str]:
  """Tensors that repeat another, a tied head too: name -> original."""
  tensors = TENSORS[model_type]
  tied = {row.theirs: tensors.embedding for row in tensors.rows
          if row.ours == "untied_head/embedding" and config.tie_embedding}
  return {**tensors.copies, **tied}
