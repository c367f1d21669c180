# SPDX-License-Identifier: Apache-2.0
"""The keys of config.json, a table for each model type of transformers.

Every key that changes what is computed is a field of ours or must have the one
value that we compute. Forms that only older or newer releases of transformers
write are first brought to the one in the table. Defaults are those of
transformers 5.23, for keys that are not there. settings.py reads and writes by
these tables.
"""

import dataclasses
from typing import Any, Callable, Mapping

from tfjax import config as config_lib
from tfjax.hub import errors

Settings = dict[str, Any]

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu"}
# What GPT calls gelu is the tanh form.
_GPT_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu",
                    "swish": "silu"}


def _typed(name: str, value: Any, *kinds: type) -> Any:
  """The value, which is of one of these types."""
  if type(value) not in kinds:
    raise errors.HubError(
        f"{name} is {value!r}; it must be "
        f"{' or '.join(kind.__name__ for kind in kinds)}")
  return value


@dataclasses.dataclass(frozen=True)
class Key:
  """A key of config.json.

  Attributes:
    default: what transformers takes where the key is not there.
    field: our field; None: the key must have its default.
    values: theirs -> ours; None: as they are. Of several of theirs the first
      is written.
  """

  name: str
  default: Any
  field: str | None = None
  values: Mapping[Any, Any] | None = None

  def read(self, value: Any) -> Any:
    """Our value of theirs."""
    kinds = {type(None): (int, type(None)), float: (float, int)}.get(
        type(self.default), (type(self.default),))
    _typed(self.name, value, *kinds)
    if self.field is None and value != self.default:
      raise errors.HubError(
          f"{self.name} is {value!r}; only {self.default!r} is supported")
    if self.values is not None:
      if value not in self.values:
        raise errors.HubError(
            f"{self.name} is {value!r}; supported: "
            f"{', '.join(map(repr, self.values))}")
      value = self.values[value]
    return value

  def write(self, config: config_lib.ModelConfig) -> Any:
    """Their value of ours."""
    if self.field is None:
      return self.default
    value = getattr(config, self.field)
    if self.values is None:
      return value
    for theirs, ours in self.values.items():
      if ours == value:
        return theirs
    raise errors.HubError(
        f"model.{self.field}={value!r} cannot be said in {self.name}; it can "
        f"be {', '.join(sorted({repr(v) for v in self.values.values()}))}")


@dataclasses.dataclass(frozen=True)
class ModelType:
  """A model type of transformers.

  Attributes:
    headed: the classes whose head is ours; the first is written.
    bare: the class without a head.
    families: ours; the first is what a loaded model is called.
    keys: the table.
    token_ids: keys of special tokens, which we do not keep.
    irrelevant: other keys that change nothing that is computed here.
    read: brings a config.json to the table's keys.
    write: brings the table's keys to a config.json.
  """

  headed: tuple[str, ...]
  bare: str
  families: tuple[str, ...]
  keys: tuple[Key, ...]
  token_ids: tuple[str, ...]
  irrelevant: tuple[str, ...] = ()
  read: Callable[[Settings], None] = lambda settings: None
  write: Callable[[Settings], None] = lambda settings: None

  @property
  def architectures(self) -> tuple[str, ...]:
    return *self.headed, self.bare


# Of any model: names, numbers of training, what is returned, and how text is
# generated where nobody says otherwise.
IRRELEVANT = frozenset("""
    architectures model_type transformers_version _name_or_path name_or_path
    _commit_hash dtype torch_dtype attn_implementation _attn_implementation
    _attn_implementation_autoset use_cache return_dict output_attentions
    output_hidden_states output_past keys_to_ignore_at_inference
    gradient_checkpointing torchscript chunk_size_feed_forward id2label
    label2id num_labels problem_type finetuning_task task_specific_params
    tokenizer_class prefix classifier_dropout initializer_range
    initializer_factor
    bos_token_id eos_token_id pad_token_id cls_token_id sep_token_id
    mask_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split())
# Of any model, with the one value that is computed here.
COMMON = (
    Key("is_encoder_decoder", False), Key("is_decoder", False),
    Key("add_cross_attention", False),
    Key("cross_attention_hidden_size", None), Key("pruned_heads", {}),
    Key("tie_encoder_decoder", False), Key("use_bfloat16", False),
    Key("tf_legacy_loss", False))


def _rope_base(settings: Settings, parameters: Any, where: str,
               default: float) -> float:
  """The base of plain rotary positions; any scaling of them is an error."""
  parameters = dict(_typed(where, parameters, dict, type(None)) or {})
  kind = parameters.pop("rope_type", parameters.pop("type", "default"))
  base = parameters.pop("rope_theta", default)
  # A share of 1 is all of a head, as we have it.
  if parameters.pop("partial_rotary_factor", 1.0) != 1.0 or parameters or (
      kind != "default"):
    raise errors.HubError(
        f"{where} is {settings[where]!r}; only rope_type 'default' with "
        "rope_theta is supported")
  return base


def _read_llama(settings: Settings) -> None:
  base = settings.get("rope_theta", 10000.0)
  # Before release 5: rope_theta, and rope_scaling or null.
  for where in ("rope_scaling", "rope_parameters"):
    if where in settings:
      base = _rope_base(settings, settings[where], where, base)
      del settings[where]
  settings["rope_theta"] = base
  if settings.get("num_key_value_heads") is None:
    settings["num_key_value_heads"] = settings.get("num_attention_heads", 32)


def _write_llama(settings: Settings) -> None:
  settings["rope_parameters"] = dict(
      rope_type="default", rope_theta=settings.pop("rope_theta"))


_ROTARY_KINDS = {"full_attention": "global_rope_theta",
                 "sliding_attention": "local_rope_theta"}


def _read_modernbert(settings: Settings) -> None:
  settings.setdefault("global_rope_theta", 160000.0)
  settings.setdefault("local_rope_theta", 10000.0)
  if settings.pop("rope_scaling", None) is not None:
    raise errors.HubError("rope_scaling is set; only null is supported")
  parameters = _typed("rope_parameters", settings.get("rope_parameters"),
                      dict, type(None)) or {}
  if set(parameters) - set(_ROTARY_KINDS):
    raise errors.HubError(
        f"rope_parameters are for {sorted(parameters)}; supported: "
        f"{', '.join(_ROTARY_KINDS)}")
  for kind, key in _ROTARY_KINDS.items():
    settings[key] = _rope_base(
        settings, parameters.get(kind), "rope_parameters", settings[key])
  settings.pop("rope_parameters", None)
  kinds = settings.pop("layer_types", None)
  if kinds is not None:
    _typed("layer_types", kinds, list)
    layers = settings.get("num_hidden_layers", 22)
    if len(kinds) != layers:
      raise errors.HubError(f"layer_types are of {len(kinds)} layers, but "
                            f"num_hidden_layers is {layers!r}")
    settings["global_attn_every_n_layers"] = _global_every(kinds)


def _global_every(kinds: list[str]) -> int:
  """Of so many layers the first is global; 0: none is."""
  full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
  every = 0 if not full else full[1] if len(full) > 1 else max(len(kinds), 1)
  expected = ["full_attention" if every and i % every == 0
              else "sliding_attention" for i in range(len(kinds))]
  if kinds != expected:
    raise errors.HubError(
        f"layer_types are {kinds}; supported: full_attention in the first of "
        "every so many layers, sliding_attention in the others")
  return every


def _write_modernbert(settings: Settings) -> None:
  every = settings.pop("global_attn_every_n_layers")
  settings["layer_types"] = [
      "full_attention" if every and i % every == 0 else "sliding_attention"
      for i in range(settings["num_hidden_layers"])]
  settings["rope_parameters"] = {
      kind: dict(rope_type="default", rope_theta=settings.pop(key))
      for kind, key in _ROTARY_KINDS.items()}


def _read_t5(settings: Settings) -> None:
  projection = _typed("feed_forward_proj",
                      settings.pop("feed_forward_proj", "relu"), str)
  gated = projection.startswith("gated-")
  # In this one place gelu is the tanh form.
  activation = ("gelu_new" if projection == "gated-gelu"
                else projection.removeprefix("gated-"))
  for key, value in (("is_gated_act", gated), ("dense_act_fn", activation)):
    if settings.setdefault(key, value) != value:
      raise errors.HubError(
          f"{key} is {settings[key]!r}, which feed_forward_proj="
          f"{projection!r} contradicts")
  # Only models that scale their head's input tied it to the embedding.
  settings.setdefault("scale_decoder_outputs",
                      settings.get("tie_word_embeddings") is not False)
  if settings.get("num_decoder_layers") is None:
    settings["num_decoder_layers"] = settings.get("num_layers", 6)


def _write_t5(settings: Settings) -> None:
  name, gated = settings["dense_act_fn"], settings["is_gated_act"]
  if gated:
    name = "gated-gelu" if name == "gelu_new" else f"gated-{name}"
  settings["feed_forward_proj"] = name


def _read_roberta(settings: Settings) -> None:
  # Positions count from the one behind padding's.
  padding = settings.get("pad_token_id", 1)
  if padding is None:
    raise errors.HubError("pad_token_id is null; RoBERTa's positions start "
                          "behind it")
  settings["position_offset"] = _typed("pad_token_id", padding, int) + 1
  rows = _typed("max_position_embeddings",
                settings.get("max_position_embeddings", 512), int)
  settings["max_position_embeddings"] = rows - padding - 1


def _write_roberta(settings: Settings) -> None:
  offset = settings.pop("position_offset")
  settings["pad_token_id"] = offset - 1
  settings["max_position_embeddings"] += offset


_BERT_KEYS = (
    Key("vocab_size", 30522, "vocab_size"), Key("hidden_size", 768, "d_model"),
    Key("num_hidden_layers", 12, "num_layers"),
    Key("num_attention_heads", 12, "num_heads"),
    Key("intermediate_size", 3072, "d_ff"),
    Key("hidden_act", "gelu", "activation", _ACTIVATIONS),
    Key("max_position_embeddings", 512, "context_length"),
    Key("type_vocab_size", 2, "num_token_types"),
    Key("layer_norm_eps", 1e-12, "norm_epsilon"),
    Key("tie_word_embeddings", True, "tie_embedding"),
    Key("position_embedding_type", "absolute"))
_BERT_IRRELEVANT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_SUMMARY = ("summary_type", "summary_use_proj", "summary_activation",
            "summary_proj_to_labels", "summary_first_dropout",
            "resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx",
            "predict_special_tokens")
_PAD_BOS_EOS = ("pad_token_id", "bos_token_id", "eos_token_id")

MODEL_TYPES = {
    "openai-gpt": ModelType(
        ("OpenAIGPTLMHeadModel",), "OpenAIGPTModel", ("gpt",), (
            Key("vocab_size", 40478, "vocab_size"),
            Key("n_positions", 512, "context_length"),
            Key("n_embd", 768, "d_model"), Key("n_layer", 12, "num_layers"),
            Key("n_head", 12, "num_heads"),
            Key("afn", "gelu", "activation", _GPT_ACTIVATIONS),
            Key("layer_norm_epsilon", 1e-5, "norm_epsilon"),
            Key("tie_word_embeddings", True, "tie_embedding")),
        _PAD_BOS_EOS, _SUMMARY),
    "gpt2": ModelType(
        ("GPT2LMHeadModel",), "GPT2Model", ("gpt2", "gpt3"), (
            Key("vocab_size", 50257, "vocab_size"),
            Key("n_positions", 1024, "context_length"),
            Key("n_embd", 768, "d_model"), Key("n_layer", 12, "num_layers"),
            Key("n_head", 12, "num_heads"), Key("n_inner", None, "d_ff"),
            Key("activation_function", "gelu_new", "activation",
                _ACTIVATIONS),
            Key("layer_norm_epsilon", 1e-5, "norm_epsilon"),
            Key("scale_attn_weights", True, "scale_scores"),
            Key("scale_attn_by_inverse_layer_idx", False),
            Key("tie_word_embeddings", True, "tie_embedding")),
        # The order of a float32 computation.
        _PAD_BOS_EOS, (*_SUMMARY, "reorder_and_upcast_attn")),
    "bert": ModelType(
        ("BertForMaskedLM", "BertForPreTraining"), "BertModel", ("bert",),
        _BERT_KEYS, _PAD_BOS_EOS, _BERT_IRRELEVANT),
    "roberta": ModelType(
        ("RobertaForMaskedLM",), "RobertaModel", ("roberta",),
        (Key("vocab_size", 50265, "vocab_size"), *_BERT_KEYS[1:],
         Key("position_offset", 2, "position_offset")),
        ("bos_token_id", "eos_token_id"), _BERT_IRRELEVANT,
        _read_roberta, _write_roberta),
    "distilbert": ModelType(
        ("DistilBertForMaskedLM",), "DistilBertModel", ("distilbert",), (
            Key("vocab_size", 30522, "vocab_size"),
            Key("max_position_embeddings", 512, "context_length"),
            Key("n_layers", 6, "num_layers"), Key("n_heads", 12, "num_heads"),
            Key("dim", 768, "d_model"), Key("hidden_dim", 3072, "d_ff"),
            Key("activation", "gelu", "activation", _ACTIVATIONS),
            Key("tie_word_embeddings", True, "tie_embedding"),
            Key("tie_weights_", True)),
        # Sinusoids are where the learned positions start.
        _PAD_BOS_EOS, ("dropout", "attention_dropout", "qa_dropout",
                       "seq_classif_dropout", "sinusoidal_pos_embds")),
    "t5": ModelType(
        ("T5ForConditionalGeneration",), "T5Model", ("t5", "t5v1_1"), (
            Key("vocab_size", 32128, "vocab_size"),
            Key("d_model", 512, "d_model"), Key("d_kv", 64, "head_dim"),
            Key("d_ff", 2048, "d_ff"),
            Key("num_layers", 6, "num_encoder_layers"),
            Key("num_decoder_layers", 6, "num_layers"),
            Key("num_heads", 8, "num_heads"),
            Key("relative_attention_num_buckets", 32, "relative_buckets"),
            Key("relative_attention_max_distance", 128, "relative_distance"),
            Key("layer_norm_epsilon", 1e-6, "norm_epsilon"),
            Key("dense_act_fn", "relu", "activation", _ACTIVATIONS),
            Key("is_gated_act", False, "gated"),
            Key("scale_decoder_outputs", True, "scale_head"),
            Key("tie_word_embeddings", True, "tie_embedding"),
            # No limit of the model's, only of what it was trained on.
            Key("n_positions", 512, "context_length"),
            Key("is_encoder_decoder", True)),
        (*_PAD_BOS_EOS, "decoder_start_token_id"), ("dropout_rate",),
        _read_t5, _write_t5),
    "bart": ModelType(
        ("BartForConditionalGeneration",), "BartModel", ("bart",), (
            Key("vocab_size", 50265, "vocab_size"),
            Key("max_position_embeddings", 1024, "context_length"),
            Key("encoder_layers", 12, "num_encoder_layers"),
            Key("decoder_layers", 12, "num_layers"),
            Key("encoder_ffn_dim", 4096, "d_ff"),
            Key("decoder_ffn_dim", 4096, "d_ff"),
            Key("encoder_attention_heads", 16, "num_heads"),
            Key("decoder_attention_heads", 16, "num_heads"),
            Key("activation_function", "gelu", "activation", _ACTIVATIONS),
            Key("d_model", 1024, "d_model"),
            Key("scale_embedding", False, "scale_embedding"),
            Key("tie_word_embeddings", True, "tie_embedding"),
            Key("is_encoder_decoder", True),
            # What other models of its first code had.
            Key("normalize_before", False), Key("normalize_embedding", True),
            Key("add_final_layer_norm", False), Key("add_bias_logits", False),
            Key("static_position_embeddings", False),
            Key("extra_pos_embeddings", 2)),
        (*_PAD_BOS_EOS, "decoder_start_token_id", "forced_eos_token_id"),
        ("dropout", "attention_dropout", "activation_dropout",
         "encoder_layerdrop", "decoder_layerdrop", "init_std",
         "classif_dropout", "num_hidden_layers",
         "force_bos_token_to_be_generated")),
    "llama": ModelType(
        ("LlamaForCausalLM",), "LlamaModel", ("llama",), (
            Key("vocab_size", 32000, "vocab_size"),
            Key("hidden_size", 4096, "d_model"),
            Key("intermediate_size", 11008, "d_ff"),
            Key("num_hidden_layers", 32, "num_layers"),
            Key("num_attention_heads", 32, "num_heads"),
            Key("num_key_value_heads", None, "num_kv_heads"),
            Key("head_dim", None, "head_dim"),
            Key("hidden_act", "silu", "activation", _ACTIVATIONS),
            Key("max_position_embeddings", 2048, "context_length"),
            Key("rms_norm_eps", 1e-6, "norm_epsilon"),
            Key("rope_theta", 10000.0, "rotary_base"),
            Key("attention_bias", False, "use_bias"),
            Key("mlp_bias", False, "use_bias"),
            Key("tie_word_embeddings", False, "tie_embedding"),
            Key("pretraining_tp", 1)),
        _PAD_BOS_EOS, ("attention_dropout",), _read_llama, _write_llama),
    "modernbert": ModelType(
        ("ModernBertForMaskedLM",), "ModernBertModel", ("modernbert",), (
            Key("vocab_size", 50368, "vocab_size"),
            Key("hidden_size", 768, "d_model"),
            Key("intermediate_size", 1152, "d_ff"),
            Key("num_hidden_layers", 22, "num_layers"),
            Key("num_attention_heads", 12, "num_heads"),
            Key("hidden_activation", "gelu", "activation", _ACTIVATIONS),
            Key("classifier_activation", "gelu", "activation", _ACTIVATIONS),
            Key("max_position_embeddings", 8192, "context_length"),
            Key("norm_eps", 1e-5, "norm_epsilon"),
            Key("norm_bias", False, "use_bias"),
            Key("attention_bias", False, "use_bias"),
            Key("mlp_bias", False, "use_bias"),
            Key("classifier_bias", False, "use_bias"),
            Key("decoder_bias", True, "head_bias"),
            Key("local_attention", 128, "window"),
            Key("global_attn_every_n_layers", 3, "global_every"),
            Key("global_rope_theta", 160000.0, "rotary_base"),
            Key("local_rope_theta", 10000.0, "rotary_base_local"),
            Key("tie_word_embeddings", True, "tie_embedding")),
        (*_PAD_BOS_EOS, "cls_token_id", "sep_token_id"),
        ("initializer_cutoff_factor", "attention_dropout",
         "embedding_dropout", "mlp_dropout", "classifier_pooling",
         "deterministic_flash_attn", "sparse_prediction",
         "sparse_pred_ignore_index", "reference_compile",
         "repad_logits_with_grad", "layer_norm_eps",
         "position_embedding_type"),
        _read_modernbert, _write_modernbert),
}
# Whose bare class has a pooler.
POOLED = ("bert", "roberta")
# What the stored tensors say, whatever config.json does.
STORED = {"t5": ("tie_embedding",), "bart": ("head_bias",)}
