# SPDX-License-Identifier: Apache-2.0
"""Our models beside transformers' own, on the same random weights.

A case is a model of transformers at odd sizes, with padding in the batch. Its
weights go through `save_pretrained` and `tfjax.hub.load`; then hidden states,
logits and gradients of the loss are compared. Cases are the list below;
scripts/parity.py prints the table.

Shape letters: B batch, T length, S source length.
"""

from collections.abc import Mapping
import dataclasses
import functools
import importlib.util
import os
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from tfjax import config as config_lib
from tfjax.hub import errors
from tfjax.hub import huggingface
from tfjax.hub import mappings
from tfjax.hub import settings as settings_lib
from tfjax.hub import weights
from tfjax.models import transformer
from tfjax.objectives import cross_entropy

_BATCH, _LENGTH, _SOURCE = 3, 21, 18
_LOWEST_TOKEN = 6  # below are padding and other special tokens
# Gradients that are smaller than this share of the model's largest are zero
# but for rounding (keys' biases shift all scores of a query alike): they are
# compared to that largest, all others to their own tensor's largest.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
  """A model of transformers, and how it is fed.

  Attributes:
    family: ours.
    name: what is odd about it.
    settings: of its configuration class, beside the vocabulary.
    padding: the side that short sequences are padded on.
    untied: T5's head gets weights of its own, which no setting says.
    scan_layers: how our parameters are laid out.
    shard_size: of the saved checkpoint; None: one file.
  """

  family: str
  name: str
  settings: Mapping[str, Any]
  padding: str = "right"
  untied: bool = False
  scan_layers: bool = False
  shard_size: str | None = None


@dataclasses.dataclass(frozen=True)
class Errors:
  """Largest differences: absolute of hidden states (of both stacks) and
  logits at tokens; relative of gradients, tensor by tensor."""

  hidden: float
  logits: float
  gradients: float

  def within_limits(self) -> bool:
    return all(value <= limit for value, limit in zip(
        dataclasses.astuple(self), dataclasses.astuple(LIMITS)))


LIMITS = Errors(hidden=2e-5, logits=2e-5, gradients=1e-4)

# Family -> configuration class, model class, what holds the last states.
_CLASSES = {
    "gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", "transformer"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", "transformer"),
    "bert": ("BertConfig", "BertForMaskedLM", "bert"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", "roberta"),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", "distilbert"),
    "t5": ("T5Config", "T5ForConditionalGeneration", "decoder"),
    "t5v1_1": ("T5Config", "T5ForConditionalGeneration", "decoder"),
    "bart": ("BartConfig", "BartForConditionalGeneration", "model"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", "model"),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", "model"),
}


def _bert(d_model: int, heads: int, layers: int, d_ff: int,
          **others: Any) -> dict[str, Any]:
  return dict(hidden_size=d_model, num_attention_heads=heads,
              num_hidden_layers=layers, intermediate_size=d_ff,
              max_position_embeddings=33) | others


_T5 = dict(d_model=28, num_heads=3, d_kv=10, d_ff=44, num_layers=2)
# Unscaled, a head of unit variance gives logits in the tens.
_T5_V1_1 = dict(_T5, initializer_factor=0.2)
_BART = dict(max_position_embeddings=31)

CASES = (
    Case("gpt", "tied", dict(n_embd=24, n_head=3, n_layer=2, n_positions=29)),
    Case("gpt", "untied, left padding", dict(
        n_embd=40, n_head=5, n_layer=2, n_positions=21, afn="silu",
        layer_norm_epsilon=1e-4, tie_word_embeddings=False), padding="left",
         scan_layers=True),
    Case("gpt2", "tied, d_ff 50, shards", dict(
        n_embd=24, n_head=3, n_layer=3, n_positions=29, n_inner=50),
         shard_size="20KB"),
    Case("gpt2", "untied, exact gelu, left padding", dict(
        n_embd=40, n_head=5, n_layer=2, n_positions=21,
        activation_function="gelu", scale_attn_weights=False,
        tie_word_embeddings=False), padding="left", scan_layers=True),
    Case("bert", "tied, 3 token types", _bert(24, 3, 2, 50,
                                              type_vocab_size=3)),
    Case("bert", "untied, tanh gelu", _bert(
        40, 5, 2, 36, hidden_act="gelu_new", layer_norm_eps=1e-6,
        tie_word_embeddings=False), scan_layers=True),
    Case("roberta", "tied", _bert(24, 3, 2, 50)),
    Case("roberta", "untied, padding 4", _bert(
        40, 5, 2, 36, pad_token_id=4, type_vocab_size=1,
        tie_word_embeddings=False), padding="left", scan_layers=True),
    Case("distilbert", "tied", dict(
        dim=24, n_heads=3, n_layers=2, hidden_dim=50,
        max_position_embeddings=33)),
    Case("distilbert", "untied, relu", dict(
        dim=40, n_heads=5, n_layers=2, hidden_dim=36, activation="relu",
        max_position_embeddings=21, tie_word_embeddings=False),
         scan_layers=True),
    Case("t5", "tied, 1 + 2 layers", dict(
        _T5, num_layers=1, num_decoder_layers=2)),
    Case("t5", "untied, 8 buckets", dict(
        _T5, num_heads=5, relative_attention_num_buckets=8,
        relative_attention_max_distance=11), padding="left", untied=True,
         scan_layers=True),
    Case("t5v1_1", "untied, 2 + 1 layers", dict(
        _T5_V1_1, num_decoder_layers=1, tie_word_embeddings=False,
        feed_forward_proj="gated-gelu"), untied=True),
    Case("t5v1_1", "tied, gated silu", dict(
        _T5_V1_1, num_heads=5, tie_word_embeddings=False,
        feed_forward_proj="gated-silu"), scan_layers=True),
    Case("bart", "tied, 1 + 2 layers", dict(
        _BART, d_model=24, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=50, decoder_ffn_dim=50)),
    Case("bart", "untied, head bias, scaled", dict(
        _BART, d_model=40, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=5, decoder_attention_heads=5,
        encoder_ffn_dim=36, decoder_ffn_dim=36, activation_function="relu",
        scale_embedding=True, tie_word_embeddings=False), scan_layers=True),
    Case("llama", "untied, 6 / 2 heads of 10, left padding", _bert(
        24, 6, 3, 50, num_key_value_heads=2, head_dim=10), padding="left"),
    Case("llama", "tied, 5 / 1 heads, biases", _bert(
        40, 5, 2, 36, num_key_value_heads=1, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=500.0)),
         scan_layers=True, shard_size="20KB"),
    Case("modernbert", "tied, 5 layers, window 6", _bert(
        24, 3, 5, 50, local_attention=6)),
    Case("modernbert", "the same, scanned", _bert(
        24, 3, 5, 50, local_attention=6), scan_layers=True),
    Case("modernbert", "untied, biases, window 64", _bert(
        40, 5, 3, 36, local_attention=64, norm_bias=True, attention_bias=True,
        mlp_bias=True, classifier_bias=True, decoder_bias=False,
        tie_word_embeddings=False, layer_types=[
            "full_attention", "sliding_attention", "full_attention"]),
         padding="left"),
)


def unavailable() -> str | None:
  """Why nothing can be compared here, if so."""
  lacking = [name for name in ("torch", "transformers")
             if importlib.util.find_spec(name) is None]
  return f"{' and '.join(lacking)} not installed" if lacking else None


def quiet() -> None:
  """Silences transformers; one thread of torch leaves the others to JAX."""
  import torch  # pylint: disable=import-outside-toplevel
  import transformers  # pylint: disable=import-outside-toplevel
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()


def reference(case: Case) -> Any:
  """transformers' model, every weight random; always the same."""
  import torch  # pylint: disable=import-outside-toplevel
  import transformers  # pylint: disable=import-outside-toplevel
  config_class, model_class, _ = _CLASSES[case.family]
  vocabulary = 61 + len(case.name)  # odd and not
  settings = dict(dict(
      pad_token_id=1, bos_token_id=0, eos_token_id=2), **case.settings)
  if case.family == "modernbert":
    settings.update(cls_token_id=0, sep_token_id=2)
  config = getattr(transformers, config_class)(
      vocab_size=vocabulary, attn_implementation="eager", **settings)
  torch.manual_seed(0)
  model = getattr(transformers, model_class)(config).eval()
  if case.untied:
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.detach().clone())
  state = dict(model.named_parameters(remove_duplicate=False))
  if config.model_type == "bart":
    state["final_logits_bias"] = model.final_logits_bias
  with torch.no_grad():
    for name, x in model.named_parameters():
      x += 0.1 * torch.randn_like(x)
    if "head bias" in case.name:
      model.final_logits_bias += torch.randn_like(model.final_logits_bias)
    # One of ours is several of theirs where nothing is tied.
    for name, original in mappings.TENSORS[config.model_type].copies.items():
      state[name].copy_(state[original])
  if config.model_type == "bart":
    model.final_logits_bias.requires_grad_(True)
  return model


def arguments(case: Case, vocabulary: int) -> dict[str, np.ndarray]:
  """What the model is called with: tokens, masks, and types where it has
  some."""
  random = np.random.default_rng(0)

  def tokens(length):
    mask = np.arange(length) < random.integers(
        length // 2, length, _BATCH)[:, None]
    mask[0] = True
    if case.padding == "left":
      mask = mask[:, ::-1]
    padding = case.settings.get("pad_token_id", 1)
    ids = random.integers(_LOWEST_TOKEN, vocabulary, (_BATCH, length))
    return np.where(mask, ids, padding).astype(np.int32), mask.astype(np.int32)

  if case.family in ("t5", "t5v1_1", "bart"):
    names = ("input_ids", "attention_mask", "decoder_input_ids",
             "decoder_attention_mask")
    return dict(zip(names, (*tokens(_SOURCE), *tokens(_LENGTH))))
  given = dict(zip(("input_ids", "attention_mask"), tokens(_LENGTH)))
  if types := case.settings.get("type_vocab_size"):
    given["token_type_ids"] = random.integers(
        0, types, (_BATCH, _LENGTH)).astype(np.int32)
  return given


def compare(case: Case, model: Any,
            directory: str | os.PathLike[str]) -> Errors:
  """Saves `reference(case)` to a directory, loads it and compares."""
  model.save_pretrained(
      directory, **({} if case.shard_size is None else
                    dict(max_shard_size=case.shard_size)))
  config, params = huggingface.load(directory, scan_layers=case.scan_layers)
  if config.family != case.family:
    raise errors.HubError(f"{case.family} was loaded as {config.family}")
  given = arguments(case, config.vocab_size)
  real = given.get("decoder_attention_mask", given["attention_mask"]) == 1
  targets = np.random.default_rng(1).integers(
      0, config.vocab_size, real.shape)
  theirs = _theirs(case, model, given, targets, real)
  ours = _ours(config, params, given, targets, real)
  hidden = _distance(ours["hidden"][real], theirs["hidden"][real])
  if "encoder" in theirs:
    source = given["attention_mask"] == 1
    hidden = max(hidden, _distance(ours["encoder"][source],
                                   theirs["encoder"][source]))
  gradients = _as_ours(config, directory, theirs["gradients"])
  flat = traverse_util.flatten_dict(ours["gradients"], sep="/")
  sizes = {path: float(np.abs(x).max()) for path, x in gradients.items()}
  largest = max(sizes.values())
  return Errors(
      hidden, _distance(ours["logits"][real], theirs["logits"][real]),
      max(_distance(flat[path], x) / (
          sizes[path] if sizes[path] > _ROUNDING * largest else largest)
          for path, x in gradients.items()))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.abs(a - b).max())


def _theirs(case: Case, model: Any, given: Mapping[str, np.ndarray],
            targets: np.ndarray, real: np.ndarray) -> dict[str, Any]:
  """Last states, logits and gradients by transformers."""
  import torch  # pylint: disable=import-outside-toplevel
  given = {name: torch.tensor(x, dtype=torch.long)
           for name, x in given.items()}
  if case.family in ("gpt", "gpt2", "llama"):
    # What `generate` passes; by default padding on the left moves positions.
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(0)
  kept = {}
  module = model.get_submodule(_CLASSES[case.family][2])
  hook = module.register_forward_hook(lambda _, __, output: kept.update(
      hidden=output.last_hidden_state))
  output = model(**given)
  hook.remove()
  real = torch.tensor(real)
  loss = torch.nn.functional.cross_entropy(
      output.logits[real], torch.tensor(targets)[real])
  model.zero_grad()
  loss.backward()
  gradients = {name: x.grad.numpy() for name, x in (
      *model.named_parameters(), *model.named_buffers())
               if x.grad is not None}
  result = dict(hidden=kept["hidden"], logits=output.logits)
  if "encoder_last_hidden_state" in output:
    result["encoder"] = output.encoder_last_hidden_state
  return {name: x.detach().numpy() for name, x in result.items()} | dict(
      gradients=gradients)


def _ours(config: config_lib.ModelConfig, params: dict,
          given: Mapping[str, np.ndarray], targets: np.ndarray,
          real: np.ndarray) -> dict[str, Any]:
  """The same by our model."""
  model = transformer.create(config)
  inputs = huggingface.inputs(config, **given)

  def evaluate(params):
    apply = functools.partial(model.apply, {"params": params})
    hidden_BTD, seen = apply(
        inputs, method="hidden", mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "encoder")
    result = dict(hidden=hidden_BTD, logits=apply(hidden_BTD, method="logits"))
    if inputs.source is not None:
      result["encoder"] = seen["intermediates"]["encoder"]["__call__"][0]
    # As tfjax.objectives.loss has it, on the same forward pass.
    total = cross_entropy.loss_sum(
        model.backend, apply(hidden_BTD, method="features"),
        *apply(method="head"),
        jnp.asarray(targets), jnp.asarray(real, jnp.float32))
    return total / real.sum(), result

  gradients, result = jax.jit(jax.grad(evaluate, has_aux=True))(params)
  return jax.tree.map(np.asarray, result | dict(gradients=gradients))


def _as_ours(config: config_lib.ModelConfig,
             directory: str | os.PathLike[str],
             gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Gradients of their tensors as those of our parameters, by the table."""
  settings = huggingface.read_settings(directory)
  kind = settings_lib.model_type(settings)
  for name, original in mappings.copies(kind, config).items():
    if name in gradients:
      copy = gradients.pop(name)
      gradients[original] = gradients.get(original, 0) + copy
  shapes = huggingface.shapes_of(
      transformer.abstract_parameters(transformer.create(config)))
  rows = mappings.rows(kind, config, list(shapes))
  stored, names = weights.Stored(gradients), {name: name for name in gradients}
  return {path: huggingface.read_slice(
      stored, names, rows[path], shape, np.dtype(np.float32),
      (slice(None),) * len(shape)) for path, shape in shapes.items()}
