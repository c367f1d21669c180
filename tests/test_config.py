# SPDX-License-Identifier: Apache-2.0
"""Configs: known keys, checked values, one hash for one result."""

import dataclasses
import json
import pathlib
import typing
from typing import Any

from absl import flags
from ml_collections import config_flags
import pytest

from tfjax import config as config_lib
from tfjax.models import families

SMALL = {"model.size": "3k", "duration.steps": 10}


def resolve(changes: dict[str, Any] | None = None,
            base: dict[str, Any] | None = None) -> config_lib.ExperimentConfig:
  config = config_lib.default()
  config_lib.override(config, SMALL if base is None else base)
  config_lib.override(config, changes or {})
  return config_lib.resolve(config)


def leaves(cls: type = config_lib.ExperimentConfig, prefix: str = ""
           ) -> list[tuple[str, dataclasses.Field, Any]]:
  """(dotted key, field, type) of every value."""
  found = []
  hints = typing.get_type_hints(cls)
  for entry in dataclasses.fields(cls):
    if dataclasses.is_dataclass(hints[entry.name]):
      found += leaves(hints[entry.name], f"{prefix}{entry.name}.")
    else:
      found.append((prefix + entry.name, entry, hints[entry.name]))
  return found


LEAVES = leaves()


def another(key: str, entry: dataclasses.Field, hint: Any,
            than: Any = None) -> Any:
  """A value that the field may have, not its default, and not `than`."""
  if hint == tuple[str, ...]:
    return ("a.txt", "b.txt")
  hint = typing.get_args(hint)[0] if typing.get_args(hint) else hint
  candidates = {
      bool: [True, False],
      int: [1, 2, 7, 300, 30_000],
      float: [0.25, 0.125, 1.5, 3.5],
      str: ["elsewhere", "3k", "6k", "llama", "decoder", "encoder", "rotary",
            "sinusoidal", "relu", "rms_norm", "post", "fan_in", "dots",
            "reference", "causal", "masked", "infilling", "byte", "stdlib",
            "line", "wsd", "bfloat16", "offline", "on", "mup"],
  }[hint]
  check = entry.metadata["check"]
  for value in candidates:
    if value not in (entry.default, than) and (
        check is None or check(value) is None):
      return value
  pytest.skip(f"{key} has one valid value only")


# --- Keys and types ----------------------------------------------------------


@pytest.mark.parametrize("key, named, valid", [
    ("model.d_modl", "config.model.d_modl", "did you mean 'd_model'"),
    ("modle.d_model", "config.modle", "did you mean 'model'"),
    ("trian", "config.trian", "did you mean 'train'"),
    ("data.tokenizer.knid", "config.data.tokenizer.knid", "'kind'"),
    ("model.size.big", "config.model.size", "no keys below"),
    ("qqq", "config.qqq", "valid here: checkpoint, cost, data"),
    ("objective", "config.objective", "set a key below it: name, separate_"),
    ("model.mask_rate", "config.model.mask_rate", "no such key"),
])
def test_an_unknown_key_is_named_with_what_is_valid(
    key: str, named: str, valid: str) -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.override(config_lib.default(), {key: 1})
  assert str(error.value).startswith(named + ":")
  assert valid in str(error.value)


def test_the_config_dict_is_locked() -> None:
  config = config_lib.default()
  with pytest.raises(AttributeError, match="d_modl(.|\n)*d_model"):
    config.model.d_modl = 3
  with pytest.raises(TypeError, match="batch_size"):
    config.train.batch_size = "many"


@pytest.mark.parametrize("key, value, expected", [
    ("model.d_model", "wide", "int"),
    ("model.d_model", 16.0, "int"),
    ("model.d_model", True, "int"),
    ("model.use_bias", 1, "bool"),
    ("model.window", 2.5, "int or None"),
    ("model.pooler", "yes", "bool or None"),
    ("model.norm_epsilon", "small", "float or None"),
    ("objective.name", 1, "str or None"),
    ("objective.prefix_lm", 1, "bool"),
    ("objective.mask_rate", None, "float"),
    ("optimizer.learning_rate", "fast", "float"),
    ("optimizer.learning_rate", None, "float"),
    ("optimizer.learning_rate", True, "float"),
    ("optimizer.learning_rate", float("nan"), "finite"),
    ("duration.flops", float("inf"), "finite"),
    ("train.batch_size", None, "int"),
    ("data.files", "a.txt", "tuple"),
    ("data.files", (1,), "str"),
    ("name", 3, "str"),
])
def test_a_wrong_type_is_named_with_the_right_one(
    key: str, value: Any, expected: str) -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    resolve({key: value})
  assert str(error.value).startswith(f"config.{key}: must be ")
  assert expected in str(error.value)


@pytest.mark.parametrize("key, value, valid", [
    ("model.family", "gpt4", "did you mean 'gpt'"),
    ("model.architecture", "decodr", "did you mean 'decoder'"),
    ("model.num_encoder_layers", 0, "at least 1"),
    ("model.num_kv_heads", 0, "at least 1"),
    ("model.query_groups", 0, "at least 1"),
    ("model.head_dim", 0, "at least 1"),
    ("model.vocab_size", 1, "at least 2"),
    ("model.position_offset", -1, "at least 0"),
    ("model.rotary_base", 1.0, "more than 1"),
    ("model.rotary_base_local", 0.5, "more than 1"),
    ("model.relative_buckets", 3, "at least 4"),
    ("model.relative_distance", 1, "at least 2"),
    ("model.num_token_types", -1, "at least 0"),
    ("model.norm", "rmsnorm", "did you mean 'rms_norm'"),
    ("model.norm_position", "after", "'pre', 'post'"),
    ("model.norm_epsilon", 0.0, "more than 0"),
    ("model.window", -1, "at least 0"),
    ("model.global_every", -1, "at least 0"),
    ("model.activation", "swiglu", "'gelu', 'gelu_tanh', 'relu', 'silu'"),
    ("model.initializer", "fanin", "did you mean 'fan_in'"),
    ("model.init_std", 0.0, "more than 0"),
    ("model.attention", "block", "did you mean 'blocks'"),
    ("objective.name", "mlm", "'causal', 'masked', 'seq2seq'"),
    ("objective.mask_rate", 0.0, "between 1e-06 and 1"),
    ("objective.mask_share", 1.1, "between 0 and 1"),
    ("objective.random_share", -0.1, "between 0 and 1"),
    ("objective.corruption", "span", "did you mean 'spans'"),
    ("objective.noise_density", 1.0, "between 1e-06 and 0.99"),
    ("objective.mean_span", 0.5, "at least 1"),
    ("objective.source_length", 1, "at least 2"),
    ("objective.seed", -1, "at least 0"),
    ("data.tokenizer.kind", "unigrm", "did you mean 'unigram'"),
    ("model.size", "4k", "'3k'"),
    ("model.positions", "rotery", "did you mean 'rotary'"),
    ("model.remat", "all", "'full'"),
    ("model.context_length", 0, "at least 1"),
    ("optimizer.learning_rate", 0.0, "more than 0"),
    ("optimizer.beta1", 1.5, "between 0 and 1"),
    ("data.validation_fraction", 0.9, "between 1e-06 and 0.5"),
    ("data.tokenizer.vocab_size", 100, "at least 258"),
    ("data.max_epochs", -1.0, "more than 0"),
    ("train.dtype", "float16", "'bfloat16'"),
    ("tracking.wandb", "off", "'disabled'"),
    ("duration.steps", 0, "at least 1"),
])
def test_a_value_out_of_range_is_named_with_the_range(
    key: str, value: Any, valid: str) -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    resolve({key: value})
  assert str(error.value).startswith(f"config.{key}: ")
  assert valid in str(error.value)
  assert repr(value) in str(error.value)


def test_every_field_has_a_doc_a_type_and_a_valid_default() -> None:
  for key, entry, hint in LEAVES:
    assert entry.metadata["doc"].strip(), key
    assert hint is not Any, key
    check = entry.metadata["check"]
    if check is not None and entry.default is not None:
      assert check(entry.default) is None, key
    numeric = {int, float} & {hint, *typing.get_args(hint)}
    assert check is not None or not numeric, f"{key} has no check"


def test_describe_has_a_line_for_every_field() -> None:
  lines = config_lib.describe()
  assert [line.split(":")[0] for line in lines] == [k for k, *_ in LEAVES]
  assert any(line.startswith("train.batch_size: int = 16  sequences a step")
             for line in lines)


# --- The fields against each other -------------------------------------------


def shape(d_model: int, num_layers: int, num_heads: int) -> dict[str, Any]:
  return {"model.size": None, "model.d_model": d_model,
          "model.num_layers": num_layers, "model.num_heads": num_heads}


@pytest.mark.parametrize("changes, key, valid", [
    (shape(20, 1, 3), "model.num_heads",
     "3 does not divide model.d_model 20; valid: 1, 2, 4, 5, 10, 20, or set "
     "model.head_dim"),
    ({"model.d_model": 32}, "model.d_model",
     "model.size='3k' already sets it to 16; set model.size to None"),
    ({"model.size": None, "model.d_model": 32}, "model.num_layers",
     "set model.size (one of 3k, 6k"),
    ({"model.size": "base"}, "model.size", "gpt2 has no size 'base'; it has "
     "small, medium, large, xl and the ladder's 3k, 6k"),
    ({"model.family": "t5", "model.size": "11b", "model.d_ff": 100},
     "model.d_ff", "model.size='11b' already sets it to 65536"),
    (shape(16, 1, 4) | {"model.num_kv_heads": 3}, "model.num_kv_heads",
     "3 does not divide model.num_heads 4; valid: 1, 2, 4"),
    (shape(6, 1, 2) | {"model.positions": "rotary"}, "model.num_heads",
     "even head width; it is 3"),
    (shape(5, 1, 1) | {"model.positions": "sinusoidal"}, "model.d_model",
     "even width, not 5"),
    ({"model.family": "t5", "model.window": 8}, "model.window",
     "is not for relative positions; set it to 0"),
    ({"model.family": "t5", "model.relative_distance": 16},
     "model.relative_distance", "16 leaves no distance to share a bucket, as "
     "16 have their own; set it higher, or model.relative_buckets lower"),
    ({"model.family": "bert", "model.positions": "relative",
      "model.relative_distance": 8}, "model.relative_distance", "as 8 have"),
    ({"model.num_encoder_layers": 2}, "model.num_encoder_layers",
     "is for encoder-decoders; the architecture is 'decoder'"),
    ({"model.first_norm": False}, "model.first_norm", "pre-norm encoders"),
    ({"model.family": "bert", "model.first_norm": False}, "model.first_norm",
     "pre-norm encoders"),
    ({"model.pooler": True}, "model.pooler",
     "is for encoders; the architecture is 'decoder'"),
    ({"objective.name": "masked"}, "objective.name",
     "'masked' is not what the 'decoder' architecture of model.family='gpt2' "
     "is trained on; valid: 'causal', or another family"),
    ({"model.family": "bert", "objective.name": "seq2seq"}, "objective.name",
     "valid: 'masked'"),
    ({"model.architecture": "encoder", "objective.name": "causal"},
     "objective.name", "valid: 'masked'"),
    ({"model.family": "t5", "objective.name": "masked"}, "objective.name",
     "valid: 'seq2seq'"),
    ({"objective.mask_share": 0.95}, "objective.random_share",
     "must not exceed 1 together"),
    ({"model.family": "bert", "objective.prefix_lm": True},
     "objective.prefix_lm", "is for the causal objective, not masked"),
    ({"objective.whole_words": True}, "objective.whole_words",
     "is for the masked objective, not causal"),
    ({"model.family": "bert", "objective.permute_sentences": True},
     "objective.permute_sentences", "is for the seq2seq objective"),
    ({"model.family": "bart", "objective.separate_documents": True},
     "objective.separate_documents", "not seq2seq"),
    ({"model.family": "t5", "objective.corruption": "pairs"},
     "data.target_field", "where it must be set"),
    ({"data.target_field": "summary"}, "data.target_field",
     "is for objective.corruption='pairs' of an encoder-decoder"),
    ({"model.family": "t5", "objective.corruption": "none"},
     "objective.corruption", "makes the target the source"),
    ({"objective.corruption": "pairs", "data.target_field": "summary"},
     "objective.corruption", "not causal, and would change nothing"),
    ({"model.family": "t5", "objective.mask_rate": 0.3},
     "objective.mask_rate", "leave it at 0.15"),
    ({"model.family": "t5", "objective.source_length": 64},
     "objective.source_length", "is for objective.corruption='pairs'"),
    ({"model.family": "t5", "objective.corruption": "pairs",
      "data.target_field": "summary"}, "data.corpus", "'sotu' has no columns"),
    ({"model.positions": "relative", "objective.prefix_lm": True},
     "objective.prefix_lm", "choose other model.positions"),
    ({"model.global_every": 3}, "model.global_every",
     "changes nothing unless model.window is set; leave it at 0"),
    ({"model.rotary_base": 5.0}, "model.rotary_base", "positions is 'rotary'"),
    ({"model.family": "llama", "model.relative_buckets": 8},
     "model.relative_buckets", "leave it at 32"),
    ({"model.family": "t5", "model.init_std": 0.1}, "model.init_std",
     "initializer is 'normal'; leave it at 0.02"),
    ({"train.batch_size": 6, "train.accumulation_steps": 4},
     "train.accumulation_steps", "4 does not divide train.batch_size 6"),
    ({"data.tokenizer.kind": "directory"}, "data.tokenizer.path", "directory"),
    ({"data.tokenizer.path": "somewhere"}, "data.tokenizer.path", "directory"),
    ({"data.corpus": "files"}, "data.files", "must be set"),
    ({"data.files": ("a.txt",)}, "data.files", "data.corpus='files'"),
    ({"data.corpus": "hub"}, "data.hub_name", "must be set"),
    ({"optimizer.schedule": "wsd", "optimizer.warmup_fraction": 0.5,
      "optimizer.decay_fraction": 0.6}, "optimizer.decay_fraction",
     "must not exceed 1 together"),
    ({"optimizer.beta2": 1.0}, "optimizer.beta2", "less than 1"),
    ({"duration.steps": None}, "duration", "none is set"),
    ({"duration.tokens": 100}, "duration", "steps and tokens are set"),
])
def test_a_contradiction_is_named_with_the_remedy(
    changes: dict[str, Any], key: str, valid: str) -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    resolve(changes)
  assert error.value.key == key
  assert str(error.value).startswith(f"config.{key}: ")
  assert valid in str(error.value)


def test_what_follows_is_filled_in() -> None:
  model = resolve({"model.size": "98k"}).model
  assert (model.d_model, model.num_layers, model.num_heads) == (64, 2, 4)
  assert (model.d_ff, model.head_dim, model.num_kv_heads) == (256, 16, 4)
  assert model.num_encoder_layers == 2
  # 8/3 of 64 is 170.67, and the next multiple of 8 is 176.
  assert resolve({"model.size": "98k", "model.gated": True}).model.d_ff == 176
  assert resolve({"model.d_ff": 40}).model.d_ff == 40
  assert resolve(shape(20, 1, 3) | {"model.head_dim": 7}).model.head_dim == 7


@pytest.mark.parametrize("heads, groups, expected", [
    (8, 4, 2), (6, 4, 1), (12, 4, 3), (12, 5, 2), (1, 4, 1), (8, 1, 8)])
def test_heads_of_keys_divide_the_heads(
    heads: int, groups: int, expected: int) -> None:
  model = resolve(shape(48, 1, heads) | {
      "model.head_dim": 4, "model.query_groups": groups}).model
  assert model.num_kv_heads == expected


def test_a_family_fills_what_is_unset_and_nothing_else() -> None:
  gpt2, llama = resolve().model, resolve({"model.family": "llama"}).model
  assert (gpt2.positions, llama.positions) == ("learned", "rotary")
  kept = resolve({"model.family": "llama", "model.positions": "learned",
                  "model.use_bias": True, "model.gated": False,
                  "model.norm_epsilon": 0.5, "model.tie_embedding": True}).model
  assert (kept.positions, kept.use_bias, kept.gated, kept.norm_epsilon,
          kept.tie_embedding) == ("learned", True, False, 0.5, True)
  assert (kept.norm, kept.activation) == (llama.norm, llama.activation)


@pytest.mark.parametrize("family, name", [
    ("gpt2", "causal"), ("bert", "masked"), ("modernbert", "masked"),
    ("t5", "seq2seq"), ("bart", "seq2seq")])
def test_the_architecture_says_what_the_objective_is(
    family: str, name: str) -> None:
  config = resolve({"model.family": family})
  assert config.objective.name == name
  assert config == resolve({"model.family": family, "objective.name": name})


def test_a_completed_model_stays_as_it_is() -> None:
  for family in families.FAMILIES:
    model = resolve({"model.family": family}).model
    assert config_lib.complete_model(model) == model
    unset = {entry.name for entry in dataclasses.fields(model)
             if getattr(model, entry.name) is None}
    assert unset - {"rotary_base_local"} == {
        "vocab_size", "base_d_model", "base_head_dim", "base_num_layers"}


# --- Ways in and out ---------------------------------------------------------


@pytest.mark.parametrize("changes", [
    *({"model.family": family} for family in families.FAMILIES),
    {"model.family": "t5", "model.size": "11b"},
    {"model.family": "llama", "model.size": "8b"},
    {"model.family": "bart", "objective.corruption": "infilling",
     "objective.permute_sentences": True},
    {"model.family": "t5", "objective.corruption": "pairs",
     "data.target_field": "summary", "objective.source_length": 99,
     "data.corpus": "files", "data.files": ("a.jsonl",)},
], ids=lambda changes: "-".join(map(str, changes.values())))
def test_round_trip_of_every_family(changes: dict[str, Any]) -> None:
  config = resolve(changes)
  again = config_lib.from_dict(json.loads(json.dumps(
      config_lib.to_dict(config), allow_nan=False)))
  assert again == config
  assert config_lib.config_hash(again) == config_lib.config_hash(config)


def test_round_trip_through_json() -> None:
  config = resolve({
      "data.corpus": "files", "data.files": ["a.txt", "b/*.md"],
      "optimizer.clip_norm": None, "checkpoint.every_steps": 7,
      "optimizer.learning_rate": 1e-3 / 3, "model.num_heads": 1})
  text = json.dumps(config_lib.to_dict(config), allow_nan=False)
  again = config_lib.from_dict(json.loads(text))
  assert again == config
  assert again.data.files == ("a.txt", "b/*.md")
  assert config_lib.config_hash(again) == config_lib.config_hash(config)
  hash(again)  # frozen all the way down


def test_from_dict_checks_again() -> None:
  values = config_lib.to_dict(resolve())
  values["train"]["batch_sise"] = 4
  with pytest.raises(config_lib.ConfigError, match="did you mean 'batch_size'"):
    config_lib.from_dict(values)
  with pytest.raises(config_lib.ConfigError, match="config.model: must be a "
                     "group"):
    config_lib.from_dict({"model": 3})


def test_replace_changes_a_copy() -> None:
  config = resolve()
  changed = config_lib.replace(config, train__batch_size=4, seed=5)
  assert (changed.train.batch_size, changed.seed) == (4, 5)
  assert config.train.batch_size == 16
  with pytest.raises(config_lib.ConfigError, match="config.train.batch_size"):
    config_lib.replace(config, train__batch_size=0)


def test_load_reads_an_experiment_and_overrides_it(
    tmp_path: pathlib.Path) -> None:
  path = tmp_path / "experiment.py"
  path.write_text(
      "from tfjax import config as config_lib\n"
      "def get_config():\n"
      "  config = config_lib.default()\n"
      "  config.model.size = '6k'\n"
      "  config.duration.steps = 5\n"
      "  return config\n", encoding="utf-8")
  config = config_lib.load(path, {"duration.steps": None,
                                  "duration.epochs": 2})
  assert config.model.num_layers == 2
  assert config.duration == config_lib.DurationConfig(epochs=2.0)
  with pytest.raises(FileNotFoundError, match="nowhere.py"):
    config_lib.load(tmp_path / "nowhere.py")
  path.write_text("", encoding="utf-8")
  with pytest.raises(config_lib.ConfigError, match=r"get_config\(\)"):
    config_lib.load(path)


def from_command_line(*arguments: str) -> config_lib.ExperimentConfig:
  values = flags.FlagValues()
  command = ["program", *arguments]
  config_flags.DEFINE_config_dict(
      "config", config_lib.default(), flag_values=values, sys_argv=command)
  values(command)
  return config_lib.resolve(values["config"].value)


# What must be set beside a key for the whole to be valid.
SHAPE = {"model.d_model", "model.num_layers", "model.num_heads"}
PAIRS = {"model.family": "t5", "objective.corruption": "pairs",
         "data.corpus": "files", "data.files": "('a.jsonl',)"}
BASE = {"model.base_d_model": 8, "model.base_head_dim": 8}
BESIDE = {
    "model.num_encoder_layers": {"model.family": "t5"},
    "model.pooler": {"model.family": "bert"},
    "objective.name": {"model.family": "gpt2"},
    "objective.mask_rate": {"model.family": "bert"},
    "objective.mask_share": {"model.family": "bert"},
    "objective.random_share": {
        "model.family": "bert", "objective.mask_share": 0.5},
    "objective.whole_words": {"model.family": "bert"},
    "objective.corruption": {"model.family": "t5"},
    "objective.noise_density": {"model.family": "t5"},
    "objective.mean_span": {"model.family": "t5"},
    "objective.permute_sentences": {"model.family": "bart"},
    "objective.source_length": PAIRS | {"data.target_field": "summary"},
    "data.target_field": PAIRS,
    "model.global_every": {"model.window": 8},
    "model.rotary_base": {"model.positions": "rotary"},
    "model.rotary_base_local": {"model.positions": "rotary"},
    "model.relative_buckets": {"model.positions": "relative"},
    "model.relative_distance": {
        "model.family": "bert", "model.positions": "relative",
        "model.relative_buckets": 4},
    "model.parametrization": BASE,
    "model.base_d_model": BASE | {"model.parametrization": "mup"},
    "model.base_head_dim": BASE | {"model.parametrization": "mup"},
    "model.base_num_layers": BASE | {"model.parametrization": "complete_p"},
    "data.files": {"data.corpus": "files"},
    "data.hub_name": {"data.corpus": "hub"},
    "data.tokenizer.path": {"data.tokenizer.kind": "directory"},
}


@pytest.mark.parametrize("key, entry, hint", LEAVES,
                         ids=[key for key, *_ in LEAVES])
def test_every_field_can_be_set_on_the_command_line(
    key: str, entry: dataclasses.Field, hint: Any) -> None:
  value = another(key, entry, hint)
  given = BESIDE.get(key, {}) | {key: value}
  if not key.startswith("duration."):
    given["duration.steps"] = 10
  if key in SHAPE:
    given |= {other: 7 for other in SHAPE - {key}} | {"model.num_heads": 1}
    value = given[key]
  else:
    given.setdefault("model.size", "3k")
  config: Any = from_command_line(
      *(f"--config.{name}={setting}" for name, setting in given.items()))
  for name in key.split("."):
    config = getattr(config, name)
  assert config == value and value != entry.default


@pytest.mark.parametrize("argument", [
    "--config.model.d_modl=3", "--config.train.batch_size=many",
    "--config.optimizer.learning_rate=fast"])
def test_a_bad_argument_stops_at_once(argument: str) -> None:
  with pytest.raises((AttributeError, ValueError, KeyError,
                      flags.Error)) as error:
    from_command_line(
        "--config.model.size=3k", "--config.duration.steps=1", argument)
  assert argument.split("=")[0].rpartition(".")[2] in str(error.value)


# --- Identity ----------------------------------------------------------------


@pytest.mark.parametrize("key, entry, hint", LEAVES,
                         ids=[key for key, *_ in LEAVES])
def test_the_hash_changes_with_what_shapes_the_result(
    key: str, entry: dataclasses.Field, hint: Any) -> None:
  groups = {"checkpoint", "tracking", "sweep", "mesh", "runtime", "cost"}
  same = key.split(".")[0] in groups or key in {
      "name", "model.attention", "data.cache_dir", "train.log_every_steps",
      "evaluation.every_steps", "evaluation.batch_size"}
  if key == "model.size":
    pytest.skip("stands for the numbers that it sets")
  base = resolve()
  # Replaced without checks: what is valid together is another test's matter.
  *parents, leaf = key.split(".")
  def put(node: Any, names: list[str]) -> Any:
    if not names:
      return dataclasses.replace(node, **{
          leaf: another(key, entry, hint, than=getattr(node, leaf))})
    return dataclasses.replace(
        node, **{names[0]: put(getattr(node, names[0]), names[1:])})
  changed = put(base, parents)
  assert changed != base
  equal = config_lib.config_hash(changed) == config_lib.config_hash(base)
  assert equal == same


def test_the_hash_does_not_tell_a_size_from_its_numbers() -> None:
  spelt = resolve({"model.size": None, "model.d_model": 16,
                   "model.num_layers": 1, "model.num_heads": 1})
  assert config_lib.config_hash(spelt) == config_lib.config_hash(resolve())
  assert len(config_lib.config_hash(spelt)) == 12


@pytest.mark.parametrize("family, size, spelt", [
    ("t5", "3b", dict(d_model=1024, num_layers=24, num_heads=32, head_dim=128,
                      d_ff=16384)),
    ("llama", "8b", dict(d_model=4096, num_layers=32, num_heads=32,
                         num_kv_heads=8, d_ff=14336, rotary_base=500000.0))])
def test_nor_a_published_size_from_its_numbers(
    family: str, size: str, spelt: dict[str, Any]) -> None:
  named = resolve({"model.family": family, "model.size": size})
  by_numbers = resolve({"model.family": family, "model.size": None} | {
      f"model.{name}": value for name, value in spelt.items()})
  assert config_lib.config_hash(named) == config_lib.config_hash(by_numbers)
  assert named != by_numbers
