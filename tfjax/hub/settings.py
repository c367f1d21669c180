# SPDX-License-Identifier: Apache-2.0
"""config.json of a Hugging Face model <-> our ModelConfig.

By the tables in model_types.py, both ways. A key that is in no table and not
known to be irrelevant is an error, and so is a config of ours of which
transformers would compute something else.
"""

import dataclasses
from typing import Any, Mapping

from tfjax import config as config_lib
from tfjax.hub import errors
from tfjax.hub import model_types
from tfjax.models import families
from tfjax.models import transformer

_TYPES = model_types.MODEL_TYPES
_FIELDS = {entry.name: entry
           for entry in dataclasses.fields(config_lib.ModelConfig)}


def model_type(settings: model_types.Settings) -> str:
  """The model type; an error if it, or the class, is not supported."""
  kind = settings.get("model_type")
  if not isinstance(kind, str) or kind not in _TYPES:
    raise errors.HubError(
        f"model_type is {kind!r}; supported: {', '.join(_TYPES)}")
  known = _TYPES[kind].architectures
  given = settings.get("architectures")
  if not isinstance(given, list) or len(given) != 1 or given[0] not in known:
    raise errors.HubError(
        f"architectures are {given!r}; supported: one of {', '.join(known)}")
  return kind


def is_bare(settings: model_types.Settings) -> bool:
  return settings["architectures"][0] == _TYPES[
      settings["model_type"]].bare


def read(settings: Mapping[str, Any],
         stored: Mapping[str, Any]) -> config_lib.ModelConfig:
  """The ModelConfig of a config.json.

  A model without a head gets its embedding for one, tied and without a
  transform. `stored` has the fields that only the tensors tell
  (model_types.STORED).

  Raises:
    HubError: a key is unknown, or has a value that is not supported.
  """
  kind = model_type(dict(settings))
  spec, left = _TYPES[kind], dict(settings)
  spec.read(left)
  fields: dict[str, Any] = {}
  origin: dict[str, str] = {}
  for key in (*spec.keys, *model_types.COMMON):
    value = key.read(left.pop(key.name, key.default))
    if key.field is None:
      continue
    check = _FIELDS[key.field].metadata["check"]
    problem = check(value) if check and value is not None else None
    if problem:
      raise errors.HubError(f"{key.name} is {value!r}; it {problem}")
    if fields.setdefault(key.field, value) != value:
      raise errors.HubError(
          f"{origin[key.field]} and {key.name} differ ({fields[key.field]!r} "
          f"and {value!r}); only models where they agree are supported")
    origin.setdefault(key.field, key.name)
  unknown = sorted(set(left) - model_types.IRRELEVANT - set(spec.irrelevant))
  if unknown:
    raise errors.HubError(
        f"unknown key(s) {', '.join(f'{k}={left[k]!r}' for k in unknown)}; "
        "remove what does not change the computation")
  fields.update(stored)
  if is_bare(settings):
    fields.update(tie_embedding=True, head_transform=False, head_bias=False,
                  pooler=kind in model_types.POOLED)
  elif kind == "roberta" and fields["activation"] != "gelu":
    raise errors.HubError(
        f"hidden_act is {settings['hidden_act']!r}; RoBERTa's head has 'gelu' "
        "and ours what the blocks have")
  family = spec.families[-1 if kind == "t5" and fields["gated"] else 0]
  try:
    return config_lib.complete_model(
        config_lib.ModelConfig(family=family, **fields))
  except config_lib.ConfigError as error:
    raise errors.HubError(str(error)) from error


def write(config: config_lib.ModelConfig,
          token_ids: Mapping[str, Any]) -> model_types.Settings:
  """The config.json of a ModelConfig; special tokens that are not in
  `token_ids` are null.

  Raises:
    HubError: transformers has no model that computes what the config says.
  """
  kind = _type_of(config)
  spec = _TYPES[kind]
  preset = families.FAMILIES[config.family].fields
  bare = preset["head_transform"] and not config.head_transform
  table = _table(kind, config)
  for name, value in token_ids.items():
    if value not in (None, table.get(name, value)):
      raise errors.HubError(
          f"{name} is {value}, but a {kind!r} model with model."
          f"position_offset={config.position_offset} must have {table[name]}")
  settings = dict(
      architectures=[spec.bare if bare else spec.headed[0]], model_type=kind,
      **{name: token_ids.get(name) for name in spec.token_ids}, **table)
  kept = {name: getattr(config, name)
          for name in model_types.STORED.get(kind, ())}
  back, wanted = _meaning(read(settings, kept)), _meaning(config)
  different = [name for name in wanted
               if name in back and wanted[name] != back[name]]
  if different:
    raise errors.HubError("; ".join(
        f"model.{name}={wanted[name]!r} is not what transformers' {kind!r} "
        f"computes, which is {back[name]!r}" for name in different))
  return settings


def fixed_token_ids(config: config_lib.ModelConfig) -> dict[str, int]:
  """The special tokens that follow from the config itself.

  Raises:
    HubError: as `write`.
  """
  return {name: value
          for name, value in _table(_type_of(config), config).items()
          if name.endswith("_token_id")}


def _type_of(config: config_lib.ModelConfig) -> str:
  for kind, spec in _TYPES.items():
    if config.family in spec.families:
      return kind
  known = [name for spec in _TYPES.values() for name in spec.families]
  raise errors.HubError(
      f"transformers has no model of the family {config.family!r}; "
      f"supported: {', '.join(known)}")


def _table(kind: str, config: config_lib.ModelConfig) -> model_types.Settings:
  """The keys that are fields of ours."""
  table = {key.name: key.write(config)
           for key in _TYPES[kind].keys if key.field}
  _TYPES[kind].write(table)
  return table


# Of a config, what changes nothing or only the start of training.
_NO_MEANING = ("family", "size", "query_groups", "initializer", "init_std",
               "scan_layers", "remat", "attention")


def _meaning(config: config_lib.ModelConfig) -> dict[str, Any]:
  """What a model computes, the window layer by layer; fields that it does not
  use are left out."""
  if config.positions == "learned" and _reaches_all(config):
    config = dataclasses.replace(config, window=0)
  meaning = dataclasses.asdict(config)
  unused = [*_NO_MEANING, "global_every"]
  local = transformer.local_layers(config)
  meaning["window"] = [config.window if near else 0 for near in local]
  if config.positions != "rotary":
    unused += ["rotary_base", "rotary_base_local"]
  elif config.rotary_base_local is None or not any(local):
    meaning["rotary_base_local"] = config.rotary_base
  if config.positions != "relative":
    unused += ["relative_buckets", "relative_distance"]
  if config.positions != "learned":
    unused += ["position_offset"]
  return {name: value for name, value in meaning.items()
          if name not in unused}


def _reaches_all(config: config_lib.ModelConfig) -> bool:
  """Whether the window excludes nothing within context_length, which learned
  positions cannot exceed."""
  reach = (config.window - 1 if config.architecture == "decoder"
           else config.window // 2)
  return reach >= config.context_length - 1
