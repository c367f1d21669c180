# SPDX-License-Identifier: Apache-2.0
"""What an experiment is: frozen dataclasses, and the ConfigDict edge.

Experiment files and the command line speak `ml_collections.ConfigDict`
(`default()`, then assignments); everything inside tfjax takes the frozen
`ExperimentConfig` that `resolve` makes of one. Every field has a
documentation, a type and, where values are limited, a check. What needs the
data or the model to be known (steps from epochs, say) is derived in
`tfjax.cost.budget`, not here.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import pathlib
import types
import typing
from typing import Any, Callable, Mapping

import ml_collections
from ml_collections import config_dict

from tfjax.models import families

Check = Callable[[Any], str | None]  # the value -> what would be valid, or None


class ConfigError(ValueError):
  """A config that cannot be run. The message names the key and the remedy."""

  def __init__(self, key: str, problem: str):
    super().__init__(f"config.{key}: {problem}" if key else problem)
    self.key = key


def at_least(minimum: float) -> Check:
  return lambda v: None if v >= minimum else f"must be at least {minimum}"


def more_than(minimum: float) -> Check:
  return lambda v: None if v > minimum else f"must be more than {minimum}"


def within(low: float, high: float) -> Check:
  return lambda v: None if low <= v <= high else (
      f"must lie between {low} and {high}")


def one_of(*choices: str) -> Check:
  def check(value: str) -> str | None:
    if value in choices:
      return None
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"must be one of {', '.join(map(repr, choices))}{hint}"
  return check


def field(
    default: Any,
    doc: str,
    check: Check | None = None,
    *,
    affects_result: bool = True,
) -> Any:
  """A config field; `affects_result=False` leaves it out of a run's id."""
  return dataclasses.field(default=default, metadata=dict(
      doc=doc, check=check, affects_result=affects_result))


def group(cls: type, *, affects_result: bool = True) -> Any:
  """A field that is a config of its own."""
  return dataclasses.field(default_factory=cls, metadata=dict(
      doc=(cls.__doc__ or "").strip(), check=None,
      affects_result=affects_result))


_SIZES = tuple(dict.fromkeys(
    size for family in families.FAMILIES for size in families.shapes(family)))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network: a family (tfjax.models.families), which sets every field that
  is left unset, and a size."""

  family: str = field("gpt2", "the preset of what is not set here",
                      one_of(*families.FAMILIES))
  size: str | None = field(
      None, "a published size of the family (small, base, ...) or a name on "
      "the ladder (98k, 85M, ...); sets d_model, num_layers, num_heads, ...",
      one_of(*_SIZES), affects_result=False)
  architecture: str | None = field(
      None, "which stacks there are",
      one_of("decoder", "encoder", "encoder_decoder"))
  d_model: int | None = field(None, "width of the residual stream",
                              at_least(1))
  num_layers: int | None = field(
      None, "number of blocks, in each stack", at_least(1))
  num_encoder_layers: int | None = field(
      None, "blocks of an encoder-decoder's encoder; unset: num_layers",
      at_least(1))
  num_heads: int | None = field(None, "attention heads", at_least(1))
  num_kv_heads: int | None = field(
      None, "heads of keys and values (grouped-query attention); unset: the "
      "largest divisor of num_heads that is at most num_heads / query_groups",
      at_least(1))
  query_groups: int | None = field(
      None, "query heads that share keys and values, where num_kv_heads is "
      "not set", at_least(1))
  head_dim: int | None = field(
      None, "width of a head; unset: d_model / num_heads", at_least(1))
  d_ff: int | None = field(
      None, "feed-forward width; unset: 4 d_model, or 8/3 d_model rounded up "
      "to a multiple of 8 where it is gated", at_least(1))
  context_length: int = field(
      256, "tokens in a training window, and rows of learned positions",
      at_least(1))
  vocab_size: int | None = field(
      None, "rows of the embedding; unset: the tokenizer's size, and what the "
      "objective adds", at_least(2))
  positions: str | None = field(
      None, "position encoding",
      one_of("learned", "sinusoidal", "rotary", "relative"))
  position_offset: int | None = field(
      None, "learned positions start at this row", at_least(0))
  rotary_base: float | None = field(None, "base of the rotary wavelengths",
                                    more_than(1))
  rotary_base_local: float | None = field(
      None, "the same in layers with a window; unset: rotary_base",
      more_than(1))
  relative_buckets: int | None = field(
      None, "rows of the relative position bias", at_least(4))
  relative_distance: int | None = field(
      None, "distance from which relative positions share a bucket",
      at_least(2))
  num_token_types: int | None = field(
      None, "rows of the token type (sentence) embedding; 0: none",
      at_least(0))
  embedding_norm: bool | None = field(None, "a norm after the embeddings")
  scale_embedding: bool | None = field(
      None, "token embeddings are multiplied by sqrt(d_model)")
  norm: str | None = field(None, "normalisation",
                           one_of("layer_norm", "rms_norm"))
  norm_position: str | None = field(
      None, "pre: of a sublayer's input, and after the last block; post: of "
      "the sum with its output", one_of("pre", "post"))
  norm_epsilon: float | None = field(None, "added to the variance",
                                     more_than(0))
  first_norm: bool | None = field(
      None, "the first block's attention has a norm of its own")
  window: int | None = field(
      None, "sliding attention: keys that a causal query sees, itself "
      "included; without causality half of it on either side; 0: all",
      at_least(0))
  global_every: int | None = field(
      None, "of so many layers the first attends to everything, the others "
      "within the window; 0: none does", at_least(0))
  scale_scores: bool | None = field(
      None, "attention scores are divided by sqrt(head_dim)")
  activation: str | None = field(
      None, "feed-forward nonlinearity; gelu: exact, by the error function",
      one_of("gelu", "gelu_tanh", "relu", "silu"))
  gated: bool | None = field(
      None, "the feed-forward is gated (GEGLU, SwiGLU: Shazeer 2020)")
  use_bias: bool | None = field(None, "biases in projections and layer norms")
  tie_embedding: bool | None = field(
      None, "the head is the embedding, transposed")
  scale_head: bool | None = field(
      None, "the head's input is divided by sqrt(d_model)")
  head_transform: bool | None = field(
      None, "a dense layer, the nonlinearity and a norm before the head")
  head_bias: bool | None = field(None, "the head adds a bias")
  pooler: bool | None = field(
      None, "a dense layer and tanh over the first token; no objective trains "
      "it")
  initializer: str | None = field(
      None, "normal: init_std; fan_in: 1 / sqrt(inputs), embeddings 1 (or "
      "1 / sqrt(d_model), where they are scaled)", one_of("normal", "fan_in"))
  init_std: float = field(
      0.02, "standard deviation of initial weights (initializer=normal); in "
      "pre-norm models projections into the residual stream get "
      "init_std / sqrt(2 num_layers)", more_than(0))
  scan_layers: bool = field(
      False, "nn.scan over layers: compiles faster when deep, runs slower")
  remat: str = field(
      "none", "what the backward pass recomputes: nothing, all but matmul "
      "outputs, or whole blocks", one_of("none", "dots", "full"))
  attention: str = field(
      "auto", "attention implementation; auto: by backend",
      one_of("auto", "reference", "blocks", "dot_product"),
      affects_result=False)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """How text becomes tokens."""

  kind: str = field("bpe", "byte: one token a byte; bpe, unigram: trained on "
                    "the training split; directory: loaded from path",
                    one_of("byte", "bpe", "unigram", "directory"))
  vocab_size: int = field(
      1024, "size of a trained vocabulary, separator included", at_least(258))
  path: str = field("", "directory with tokenizer.json (kind=directory)")
  training_bytes: int = field(
      64_000_000, "a tokenizer is trained on at most this much of the training "
      "split, from its start", at_least(1))


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
  """A seeded Markov source of known entropy rate (corpus=synthetic)."""

  order: int = field(2, "symbols that the next one depends on", within(1, 6))
  num_symbols: int = field(16, "alphabet size", within(2, 26))
  concentration: float = field(
      0.3, "Dirichlet concentration of each conditional distribution; small "
      "values give a predictable source", more_than(0))
  num_bytes: int = field(4_000_000, "length of the corpus", at_least(1))
  document_bytes: int = field(4_000, "length of a document", at_least(1))
  seed: int = field(0, "seed of the source and of its text", at_least(0))


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Corpus, split, tokens, and how much of them a run may see."""

  corpus: str = field(
      "sotu", "where text comes from",
      one_of("sotu", "stdlib", "synthetic", "files", "hub"))
  files: tuple[str, ...] = field(
      (), "paths or globs of .txt, .md, .py and other text, .jsonl[.gz], or "
      ".parquet (corpus=files)")
  text_unit: str = field(
      "file", "what a document is in a text file (corpus=files)",
      one_of("file", "paragraph", "line"))
  text_field: str = field("text", "column of JSONL, Parquet and hub rows")
  target_field: str = field(
      "", "column of the target, for objective.corruption=pairs")
  hub_name: str = field("", "name for datasets.load_dataset (corpus=hub)")
  hub_config: str = field("", "its configuration name; empty: none")
  hub_split: str = field("train", "its split")
  hub_streaming: bool = field(False, "stream instead of downloading first")
  hub_max_documents: int | None = field(
      None, "stop after this many rows", at_least(1))
  synthetic: SyntheticConfig = group(SyntheticConfig)
  tokenizer: TokenizerConfig = group(TokenizerConfig)
  validation_fraction: float = field(
      0.05, "share of documents held out, chosen by hash of their identity",
      within(1e-6, 0.5))
  split_seed: int = field(0, "changes which documents are held out",
                          at_least(0))
  deduplicate: bool = field(
      True, "drop every paragraph that occurred before, exactly")
  unique_tokens: int | None = field(
      None, "train on a nested subset of this many tokens; unset: all",
      at_least(1))
  max_epochs: float = field(
      1.0, "passes over the data that a run may make; asking for more tokens "
      "is an error", more_than(0))
  shuffle_seed: int = field(0, "order of the training windows", at_least(0))
  cache_dir: str = field(
      "~/.cache/tfjax", "where token stores are kept", affects_result=False)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What is predicted from what."""

  name: str | None = field(
      None, "unset: what the architecture is for: causal for a decoder, "
      "masked for an encoder, seq2seq for an encoder-decoder",
      one_of("causal", "masked", "seq2seq"))
  separate_documents: bool = field(
      False, "attention does not cross the border between two documents in a "
      "window (causal and masked)")
  prefix_lm: bool = field(
      False, "causal: a random prefix of each window is seen whole and not "
      "predicted (Raffel et al. 2020, §3.2)")
  mask_rate: float = field(
      0.15, "masked: share of tokens that are predicted", within(1e-6, 1))
  mask_share: float = field(
      0.8, "masked: share of the predicted that become the mask token",
      within(0, 1))
  random_share: float = field(
      0.1, "masked: share of the predicted that become a random token; the "
      "rest stays", within(0, 1))
  whole_words: bool = field(
      False, "masked: all tokens of a word are predicted, or none")
  corruption: str = field(
      "spans", "seq2seq: spans (T5: each becomes a sentinel, the target lists "
      "them), infilling (BART: each becomes one mask, the target is the "
      "text), pairs (data.target_field), or none (BART with sentence "
      "permutation only)",
      one_of("spans", "infilling", "pairs", "none"))
  noise_density: float = field(
      0.15, "seq2seq: share of tokens in corrupted spans (T5: 0.15, BART: "
      "0.3)", within(1e-6, 0.99))
  mean_span: float = field(
      3.0, "seq2seq: mean length of a corrupted span", at_least(1))
  permute_sentences: bool = field(
      False, "seq2seq: the source's sentences in random order (BART)")
  source_length: int | None = field(
      None, "pairs: longest source, with its end; unset: context_length",
      at_least(2))
  seed: int = field(0, "of the corruption", at_least(0))


@dataclasses.dataclass(frozen=True)
class DurationConfig:
  """How long to train: exactly one is set, the others are derived."""

  steps: int | None = field(None, "optimizer steps", at_least(1))
  tokens: int | None = field(None, "training tokens", at_least(1))
  epochs: float | None = field(None, "passes over the data", more_than(0))
  tokens_per_parameter: float | None = field(
      None, "training tokens over total parameters", more_than(0))
  flops: float | None = field(
      None, "training FLOPs in the default convention (tfjax.cost.flops)",
      more_than(0))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW, its schedule and its clipping."""

  name: str = field("adamw", "optimizer", one_of("adamw"))
  learning_rate: float = field(1e-3, "peak learning rate", more_than(0))
  schedule: str = field(
      "cosine", "after a linear warmup: cosine or linear decay to the end, "
      "wsd: constant then a linear decay, or constant",
      one_of("cosine", "linear", "wsd", "constant"))
  warmup_fraction: float = field(
      0.05, "share of steps in the warmup, unless warmup_steps is set",
      within(0, 1))
  warmup_steps: int | None = field(None, "steps in the warmup", at_least(0))
  decay_fraction: float = field(0.2, "share of steps in wsd's decay",
                                within(0, 1))
  final_fraction: float = field(
      0.1, "last learning rate over the peak", within(0, 1))
  beta1: float = field(0.9, "decay of the first moment", within(0, 1))
  beta2: float = field(0.95, "decay of the second moment", within(0, 1))
  epsilon: float = field(1e-8, "added to the root second moment",
                         more_than(0))
  weight_decay: float = field(
      0.1, "decoupled, multiplied by the learning rate; for matrices only",
      at_least(0))
  clip_norm: float | None = field(
      1.0, "largest global gradient norm; unset: no clipping", more_than(0))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The step."""

  batch_size: int = field(16, "sequences a step, over all devices",
                          at_least(1))
  accumulation_steps: int = field(
      1, "parts in which a batch is computed one after another", at_least(1))
  dtype: str = field(
      "float32", "compute type; parameters, optimizer state, softmax and loss "
      "stay float32", one_of("float32", "bfloat16"))
  log_every_steps: int = field(10, "a metrics row every so many steps",
                               at_least(1), affects_result=False)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Loss on the held-out documents; always measured at the end."""

  every_steps: int | None = field(
      None, "also measure every so many steps", at_least(1),
      affects_result=False)
  tokens: int | None = field(
      None, "measure on this many held-out tokens, spread evenly; unset: all",
      at_least(1))
  batch_size: int | None = field(
      None, "sequences a batch; unset: the training batch", at_least(1),
      affects_result=False)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """What a killed run resumes from."""

  every_steps: int | None = field(
      None, "save every so many steps", at_least(1))
  every_seconds: float | None = field(
      60.0, "save when this much time has passed", more_than(0))
  keep: int = field(1, "checkpoints kept", at_least(1))


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
  """The mirror of the run's records in wandb."""

  wandb: str = field(
      "auto", "auto: online with a key and a network, else offline",
      one_of("auto", "online", "offline", "disabled"))
  project: str = field("tfjax", "wandb project")
  entity: str = field("", "wandb entity; empty: the key's default")
  init_timeout_seconds: float = field(
      15.0, "how long wandb may take to start before it goes offline",
      more_than(0))


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """The machine, not the experiment."""

  num_devices: int | None = field(
      None, "devices of the data axis; unset: all local ones", at_least(1))
  cpu_tuning: str = field(
      "auto", "allocator pages and one host device a core on CPUs; auto: on "
      "when there is no accelerator", one_of("auto", "on", "off"))
  compilation_cache_dir: str = field(
      "~/.cache/tfjax/xla", "persistent compilation cache; empty: none")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """One run, whole."""

  name: str = field(
      "experiment", "what people call it; kept in config.json and wandb",
      affects_result=False)
  seed: int = field(0, "of the initial weights", at_least(0))
  objective: ObjectiveConfig = group(ObjectiveConfig)
  model: ModelConfig = group(ModelConfig)
  data: DataConfig = group(DataConfig)
  duration: DurationConfig = group(DurationConfig)
  optimizer: OptimizerConfig = group(OptimizerConfig)
  train: TrainConfig = group(TrainConfig)
  evaluation: EvaluationConfig = group(EvaluationConfig)
  checkpoint: CheckpointConfig = group(CheckpointConfig, affects_result=False)
  tracking: TrackingConfig = group(TrackingConfig, affects_result=False)
  runtime: RuntimeConfig = group(RuntimeConfig, affects_result=False)


# --- The ConfigDict edge -----------------------------------------------------


def default() -> ml_collections.ConfigDict:
  """Every field at its default, locked: an unknown key raises at once."""
  return _to_config_dict(ExperimentConfig)


def resolve(config: ml_collections.ConfigDict) -> ExperimentConfig:
  """Checks every value and fills in what follows from others.

  Raises:
    ConfigError: a key is unknown, of the wrong type, out of range, or
      contradicts another.
  """
  return _complete(_build(ExperimentConfig, config.to_dict(), ""))


def load(path: str | pathlib.Path,
         overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
  """The experiment in a file, with overrides of dotted keys."""
  config = module(path).get_config()
  override(config, overrides or {})
  return resolve(config)


def module(path: str | pathlib.Path) -> types.ModuleType:
  """Imports an experiment file, which defines get_config()."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no experiment file {path}")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  if not hasattr(loaded, "get_config"):
    raise ConfigError("", f"{path} does not define get_config()")
  return loaded


def override(config: ml_collections.ConfigDict,
             overrides: Mapping[str, Any]) -> None:
  """Sets dotted keys in place; an unknown key or a wrong type raises."""
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError("", "get_config() must return a ConfigDict, as "
                      f"tfjax.config.default() makes one, not {config!r:.60}")
  for key, value in overrides.items():
    *parents, leaf = key.split(".")
    node, cls = config, ExperimentConfig
    for depth, name in enumerate(parents):
      cls = _subconfig(cls, name, ".".join(parents[:depth]))
      node = node[name]
    _known_field(cls, leaf, ".".join(parents))
    value = _checked_type(_hints(cls)[leaf], value, key)
    # Assigned without ConfigDict's own type check, which would refuse a None.
    with node.ignore_type():
      node[leaf] = value


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
  """A JSON-ready dictionary, for config.json and wandb."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
  """The inverse of `to_dict`; checks everything again."""
  return _complete(_build(ExperimentConfig, values, ""))


def config_hash(config: ExperimentConfig) -> str:
  """12 hexadecimal digits of what determines the run's result."""
  kept = _result_fields(config)
  text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def replace(config: ExperimentConfig, **overrides: Any) -> ExperimentConfig:
  """A copy with dotted keys changed, written a__b for a.b."""
  values = to_dict(config)
  for key, value in overrides.items():
    *parents, leaf = key.split("__")
    node = values
    for name in parents:
      node = node[name]
    node[leaf] = value
  return from_dict(values)


def describe(cls: type = ExperimentConfig, prefix: str = "") -> list[str]:
  """One line a field: dotted key, type, default, documentation."""
  lines = []
  for entry in dataclasses.fields(cls):
    hint = _hints(cls)[entry.name]
    if dataclasses.is_dataclass(hint):
      lines += describe(hint, f"{prefix}{entry.name}.")
    else:
      name = hint.__name__ if isinstance(hint, type) else str(hint)
      lines.append(f"{prefix}{entry.name}: {name} = {entry.default!r}  "
                   f"{entry.metadata['doc']}")
  return lines


# --- Details -----------------------------------------------------------------


def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _optional(hint: Any) -> tuple[Any, bool]:
  """`int | None` -> (int, True); `int` -> (int, False)."""
  arguments = typing.get_args(hint)
  if type(None) in arguments:
    return next(a for a in arguments if a is not type(None)), True
  return hint, False


def _to_config_dict(cls: type) -> ml_collections.ConfigDict:
  result = ml_collections.ConfigDict()
  for entry in dataclasses.fields(cls):
    hint, optional = _optional(_hints(cls)[entry.name])
    if dataclasses.is_dataclass(hint):
      result[entry.name] = _to_config_dict(hint)
    elif optional:
      # A plain None could not be overridden from the command line.
      result[entry.name] = config_dict.placeholder(hint)
      if entry.default is not None:
        result[entry.name] = entry.default
    else:
      result[entry.name] = entry.default
  return result.lock()


def _known_field(cls: type, name: str, prefix: str) -> None:
  known = [entry.name for entry in dataclasses.fields(cls)]
  if name in known:
    return
  key = f"{prefix}.{name}".lstrip(".")
  close = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {close[0]!r}? " if close else ""
  raise ConfigError(
      key, f"no such key; {hint}valid here: {', '.join(sorted(known))}")


def _subconfig(cls: type, name: str, prefix: str) -> type:
  _known_field(cls, name, prefix)
  hint = _hints(cls)[name]
  if not dataclasses.is_dataclass(hint):
    key = f"{prefix}.{name}".lstrip(".")
    raise ConfigError(key, "is a value and has no keys below it")
  return hint


def _checked_type(hint: Any, value: Any, key: str) -> Any:
  """The value as the hint's type, or a ConfigError."""
  hint, optional = _optional(hint)
  if value is None and optional:
    return None
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if isinstance(value, (tuple, list)):
      return tuple(_checked_type(item, v, key) for v in value)
  elif hint is float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      if value == value and abs(value) != float("inf"):
        return float(value)
      raise ConfigError(key, f"must be a finite number, not {value!r}")
  elif hint is int:
    if isinstance(value, int) and not isinstance(value, bool):
      return value
  elif isinstance(value, hint):
    return value
  name = getattr(hint, "__name__", str(hint))
  found = "None" if value is None else f"{type(value).__name__} {value!r}"
  raise ConfigError(key, f"must be {name}{' or None' if optional else ''}, "
                    f"not {found}")


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
  """A dataclass from nested values, each known, typed and checked."""
  hints = _hints(cls)
  for name in values:
    _known_field(cls, name, prefix)
  made = {}
  for entry in dataclasses.fields(cls):
    if entry.name not in values:
      continue
    key = f"{prefix}.{entry.name}".lstrip(".")
    value, hint = values[entry.name], hints[entry.name]
    if dataclasses.is_dataclass(hint):
      if not isinstance(value, Mapping):
        raise ConfigError(key, f"must be a group of keys, not {value!r}")
      made[entry.name] = _build(hint, value, key)
      continue
    value = _checked_type(hint, value, key)
    check = entry.metadata["check"]
    problem = check(value) if check and value is not None else None
    if problem:
      raise ConfigError(key, f"{problem}, not {value!r}")
    made[entry.name] = value
  return cls(**made)


def _complete(config: ExperimentConfig) -> ExperimentConfig:
  """Fills in derived fields and checks fields against each other."""
  config = dataclasses.replace(config, model=complete_model(config.model))
  model, train = config.model, config.train
  given = [entry.name for entry in dataclasses.fields(DurationConfig)
           if getattr(config.duration, entry.name) is not None]
  if len(given) != 1:
    names = [entry.name for entry in dataclasses.fields(DurationConfig)]
    raise ConfigError(
        "duration", f"set exactly one of {', '.join(names)}; "
        f"{'none is' if not given else ' and '.join(given) + ' are'} set"
        + "; set the others to None" * bool(given))
  if train.batch_size % train.accumulation_steps:
    raise ConfigError(
        "train.accumulation_steps", f"{train.accumulation_steps} does not "
        f"divide train.batch_size {train.batch_size}")
  tokenizer = config.data.tokenizer
  if (tokenizer.kind == "directory") != bool(tokenizer.path):
    raise ConfigError("data.tokenizer.path", "is the directory of "
                      "data.tokenizer.kind='directory', and of no other kind")
  for key, corpus, value in (("files", "files", config.data.files),
                             ("hub_name", "hub", config.data.hub_name)):
    if (config.data.corpus == corpus) != bool(value):
      raise ConfigError(f"data.{key}", f"is for data.corpus={corpus!r}, where "
                        "it must be set; the corpus is "
                        f"{config.data.corpus!r}")
  optimizer = config.optimizer
  if (optimizer.schedule == "wsd" and optimizer.warmup_steps is None and
      optimizer.warmup_fraction + optimizer.decay_fraction > 1):
    raise ConfigError("optimizer.decay_fraction", "warmup_fraction and "
                      "decay_fraction must not exceed 1 together")
  for name in ("beta1", "beta2"):
    if getattr(optimizer, name) == 1:
      raise ConfigError(f"optimizer.{name}", "must be less than 1")
  return dataclasses.replace(
      config, objective=_complete_objective(config))


def complete_model(model: ModelConfig) -> ModelConfig:
  """Every field set, from the size, the family and each other.

  Raises:
    ConfigError: fields are missing or contradict each other.
  """
  preset = families.FAMILIES[model.family].fields
  shape = ("d_model", "num_layers", "num_heads")
  if model.size is not None:
    sizes = families.shapes(model.family)
    if model.size not in sizes:
      raise ConfigError(
          "model.size", f"{model.family} has no size {model.size!r}; it has "
          f"{', '.join(families.FAMILIES[model.family].sizes)} and the "
          f"ladder's {', '.join(families.LADDER)}")
    named = sizes[model.size]
    clash = [k for k in named if getattr(model, k) not in (None, named[k])]
    if clash:
      raise ConfigError(
          f"model.{clash[0]}", f"model.size={model.size!r} already sets it to "
          f"{named[clash[0]]}; set model.size to None to choose it freely")
    model = dataclasses.replace(model, **named)
  missing = [name for name in shape if getattr(model, name) is None]
  if missing:
    raise ConfigError(
        f"model.{missing[0]}", "is not set; set model.size (one of "
        f"{', '.join(families.shapes(model.family))}) or all of "
        f"{', '.join(shape)}")
  model = dataclasses.replace(model, **{
      name: value for name, value in preset.items()
      if getattr(model, name) is None})
  return _checked_model(_derived_fields(model))


def _derived_fields(model: ModelConfig) -> ModelConfig:
  """Sets what is still unset from other fields."""
  heads, given = model.num_heads, {}
  if model.head_dim is None:
    if model.d_model % heads:
      raise ConfigError(
          "model.num_heads", f"{heads} does not divide model.d_model "
          f"{model.d_model}; valid: "
          f"{', '.join(map(str, _divisors(model.d_model)))}, or set "
          "model.head_dim")
    given["head_dim"] = model.d_model // heads
  if model.num_kv_heads is None:
    most = max(1, heads // model.query_groups)
    given["num_kv_heads"] = max(n for n in _divisors(heads) if n <= most)
  if model.d_ff is None:
    given["d_ff"] = (-(-8 * model.d_model // 3 // 8) * 8 if model.gated
                     else 4 * model.d_model)
  if model.num_encoder_layers is None:
    given["num_encoder_layers"] = model.num_layers
  return dataclasses.replace(model, **given)


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def _checked_model(model: ModelConfig) -> ModelConfig:
  """The model, unless its fields contradict each other."""
  if model.num_heads % model.num_kv_heads:
    raise ConfigError(
        "model.num_kv_heads", f"{model.num_kv_heads} does not divide "
        f"model.num_heads {model.num_heads}; valid: "
        f"{', '.join(map(str, _divisors(model.num_heads)))}")
  if model.positions == "rotary" and model.head_dim % 2:
    raise ConfigError(
        "model.num_heads", "rotary positions need an even head width; it is "
        f"{model.head_dim}")
  if model.positions == "sinusoidal" and model.d_model % 2:
    raise ConfigError("model.d_model", "sinusoidal positions need an even "
                      f"width, not {model.d_model}")
  if model.window and model.positions == "relative":
    raise ConfigError("model.window", "is not for relative positions; set it "
                      "to 0 or choose other positions")
  if (model.num_encoder_layers != model.num_layers and
      model.architecture != "encoder_decoder"):
    raise ConfigError("model.num_encoder_layers", "is for encoder-decoders; "
                      f"the architecture is {model.architecture!r}")
  if not model.first_norm and (
      model.norm_position == "post" or model.architecture != "encoder"):
    raise ConfigError("model.first_norm", "may be left out of pre-norm "
                      "encoders only")
  if model.pooler and model.architecture != "encoder":
    raise ConfigError("model.pooler", "is for encoders; the architecture is "
                      f"{model.architecture!r}")
  return model


_OBJECTIVES = {"decoder": "causal", "encoder": "masked",
               "encoder_decoder": "seq2seq"}


def _complete_objective(config: ExperimentConfig) -> ObjectiveConfig:
  """The objective with its name, checked against model and data."""
  objective, model = config.objective, config.model
  name = _OBJECTIVES[model.architecture]
  if objective.name not in (None, name):
    raise ConfigError(
        "objective.name", f"{objective.name!r} is not what the "
        f"{model.architecture!r} architecture of model.family="
        f"{model.family!r} is trained on; valid: {name!r}, or another family")
  if objective.mask_share + objective.random_share > 1:
    raise ConfigError("objective.random_share", "mask_share and random_share "
                      "must not exceed 1 together")
  for key, owner in (("prefix_lm", "causal"), ("whole_words", "masked"),
                     ("permute_sentences", "seq2seq")):
    if getattr(objective, key) and name != owner:
      raise ConfigError(f"objective.{key}", f"is for the {owner} objective, "
                        f"not {name}")
  if objective.separate_documents and name == "seq2seq":
    raise ConfigError("objective.separate_documents", "is for the causal and "
                      "masked objectives, not seq2seq")
  pairs = name == "seq2seq" and objective.corruption == "pairs"
  if pairs != bool(config.data.target_field):
    raise ConfigError("data.target_field", "is for objective.corruption="
                      "'pairs' of an encoder-decoder, where it must be set")
  if objective.source_length is not None and not pairs:
    raise ConfigError("objective.source_length", "is for objective.corruption="
                      "'pairs'; other sources follow from "
                      "model.context_length")
  return dataclasses.replace(objective, name=name)


def _result_fields(config: Any) -> dict[str, Any]:
  kept = {}
  for entry in dataclasses.fields(config):
    if not entry.metadata["affects_result"]:
      continue
    value = getattr(config, entry.name)
    kept[entry.name] = (_result_fields(value)
                        if dataclasses.is_dataclass(value) else value)
  return kept
