# SPDX-License-Identifier: Apache-2.0
"""What an experiment is, whole and checked; the ConfigDict edge.

Experiment files and the command line speak `ml_collections.ConfigDict`
(`default()`, then assignments); everything inside tfjax takes the frozen
`ExperimentConfig` that `resolve` makes of one. The fields are declared in
`tfjax.schema`. What needs the data or the model to be known (steps from
epochs, say) is derived in `tfjax.cost.budget`, not here.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import pathlib
import types
import typing
from typing import Any, Mapping

import ml_collections
from ml_collections import config_dict

from tfjax import schema
from tfjax.models import families

ModelConfig = schema.ModelConfig
TokenizerConfig = schema.TokenizerConfig
SyntheticConfig = schema.SyntheticConfig
DataConfig = schema.DataConfig
ObjectiveConfig = schema.ObjectiveConfig
DurationConfig = schema.DurationConfig
OptimizerConfig = schema.OptimizerConfig
TrainConfig = schema.TrainConfig
RecoveryConfig = schema.RecoveryConfig
EvaluationConfig = schema.EvaluationConfig
CheckpointConfig = schema.CheckpointConfig
TrackingConfig = schema.TrackingConfig
SweepConfig = schema.SweepConfig
MeshConfig = schema.MeshConfig
RuntimeConfig = schema.RuntimeConfig
CostConfig = schema.CostConfig
ExperimentConfig = schema.ExperimentConfig


class ConfigError(ValueError):
  """A config that cannot be run. The message names the key and the remedy."""

  def __init__(self, key: str, problem: str):
    super().__init__(f"config.{key}: {problem}" if key else problem)
    self.key = key


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
    hint = _hints(cls)[leaf]
    if dataclasses.is_dataclass(hint):
      names = ", ".join(entry.name for entry in dataclasses.fields(hint))
      raise ConfigError(key, f"is a group; set a key below it: {names}")
    value = _checked_type(hint, value, key)
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


# Fields that matter only where another has a certain value.
_MATTER_WITH = {
    "global_every": ("window", lambda value: value > 0, "set"),
    "rotary_base": ("positions", "rotary".__eq__, "'rotary'"),
    "rotary_base_local": ("positions", "rotary".__eq__, "'rotary'"),
    "relative_buckets": ("positions", "relative".__eq__, "'relative'"),
    "relative_distance": ("positions", "relative".__eq__, "'relative'"),
    "position_offset": ("positions", "learned".__eq__, "'learned'"),
    "init_std": ("initializer", "normal".__eq__, "'normal'"),
}


def _refuse_idle_fields(model: ModelConfig) -> None:
  """What somebody has chosen must change something."""
  named = families.shapes(model.family).get(model.size, {})
  usual = families.FAMILIES[model.family].fields | dict(named)
  usual.setdefault("init_std", ModelConfig.init_std)
  for key, (other, matters, wanted) in _MATTER_WITH.items():
    if getattr(model, key) != usual[key] and not matters(
        getattr(model, other)):
      raise ConfigError(
          f"model.{key}", f"changes nothing unless model.{other} is {wanted}; "
          f"leave it at {usual[key]!r}")


# What each parametrization is relative to.
_BASES = {"standard": (), "mup": ("base_d_model", "base_head_dim"),
          "complete_p": ("base_d_model", "base_head_dim", "base_num_layers")}


def _check_parametrization(model: ModelConfig) -> None:
  name = model.parametrization
  own = {"base_d_model": "d_model", "base_head_dim": "head_dim",
         "base_num_layers": "num_layers"}
  for key, field in own.items():
    given, wanted = getattr(model, key) is not None, key in _BASES[name]
    if wanted and not given:
      raise ConfigError(
          f"model.{key}", f"is what model.parametrization={name!r} is relative "
          f"to; set it to the {field} of the model that learning rate and "
          f"init_std were tuned for (this model's is {getattr(model, field)})")
    if given and not wanted:
      users = [user for user, keys in _BASES.items() if key in keys]
      raise ConfigError(
          f"model.{key}", "changes nothing unless model.parametrization is "
          f"{' or '.join(map(repr, users))}; it is {name!r}; leave it unset")
  if name == "complete_p":
    if model.norm_position != "pre":
      raise ConfigError(
          "model.parametrization", "'complete_p' scales what is added to a "
          f"pre-norm stream; {model.family} has model.norm_position="
          f"{model.norm_position!r}; valid: 'mup', 'standard'")
    if model.num_encoder_layers != model.num_layers:
      raise ConfigError(
          "model.num_encoder_layers", "must be model.num_layers, here "
          f"{model.num_layers}, under model.parametrization='complete_p', "
          "which knows one depth")


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
  _refuse_idle_fields(model)
  _check_parametrization(model)
  if model.window and model.positions == "relative":
    raise ConfigError("model.window", "is not for relative positions; set it "
                      "to 0 or choose other positions")
  # In an encoder half of the buckets are for keys behind.
  buckets = model.relative_buckets // (
      2 if model.architecture == "encoder" else 1)
  if model.positions == "relative" and model.relative_distance <= buckets // 2:
    raise ConfigError(
        "model.relative_distance", f"{model.relative_distance} leaves no "
        f"distance to share a bucket, as {buckets // 2} have their own; set it "
        "higher, or model.relative_buckets lower")
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


# Whose an option is; those that are not here are everybody's.
_OBJECTIVES_OF = {
    "separate_documents": ("causal", "masked"),
    "prefix_lm": ("causal",),
    "mask_rate": ("masked",), "mask_share": ("masked",),
    "random_share": ("masked",), "whole_words": ("masked",),
    "corruption": ("seq2seq",), "noise_density": ("seq2seq",),
    "mean_span": ("seq2seq",), "permute_sentences": ("seq2seq",),
    "source_length": ("seq2seq",),
}


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
  for entry in dataclasses.fields(objective):
    owners = _OBJECTIVES_OF.get(entry.name, (name,))
    if getattr(objective, entry.name) != entry.default and name not in owners:
      raise ConfigError(
          f"objective.{entry.name}", f"is for the {' and '.join(owners)} "
          f"objective{'s' * (len(owners) > 1)}, not {name}, and would change "
          f"nothing; leave it at {entry.default!r}")
  if (name == "seq2seq" and objective.corruption == "none" and
      not objective.permute_sentences):
    raise ConfigError("objective.corruption", "'none' makes the target the "
                      "source, unless objective.permute_sentences is set")
  pairs = name == "seq2seq" and objective.corruption == "pairs"
  if pairs != bool(config.data.target_field):
    raise ConfigError("data.target_field", "is for objective.corruption="
                      "'pairs' of an encoder-decoder, where it must be set")
  if pairs and config.data.corpus not in ("files", "hub"):
    raise ConfigError("data.corpus", f"{config.data.corpus!r} has no columns; "
                      "pairs come from 'files' or 'hub'")
  if objective.prefix_lm and model.positions == "relative":
    raise ConfigError("objective.prefix_lm", "needs to tell apart the places "
                      "ahead, and a decoder's relative positions do not; "
                      "choose other model.positions")
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
    if entry.metadata["added"] and value == entry.default:
      continue
    kept[entry.name] = (_result_fields(value)
                        if dataclasses.is_dataclass(value) else value)
  return kept
