# SPDX-License-Identifier: Apache-2.0
"""The memory of a device, estimated from a config, against what the compiler
makes of the same config; and a cache's against the cache itself."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tfjax import config as config_lib
from tfjax.cost import memory
from tfjax.cost import moments
from tfjax.models import decoding
from tfjax.models import inputs as inputs_lib
from tfjax.models import parametrization
from tfjax.models import search
from tfjax.models import transformer
from tfjax.objectives import cross_entropy
from tfjax.train import ahead
from tfjax.train import sharding
from tfjax.train import tuning

AXES = ("data", "fsdp", "sequence", "tensor")
FAMILIES = ("gpt2", "llama", "bert", "t5", "bart", "modernbert")


@pytest.fixture(name="make")
def make_fixture(make_config):
  """A config, and the shape of its mesh, whose axes are 1 unless set."""
  def make(changes: dict[str, Any]) -> tuple[
      config_lib.ExperimentConfig, dict[str, int]]:
    shape = {axis: changes.get(f"mesh.{axis}", 1) for axis in AXES}
    config = make_config({"runtime.num_devices": None, "mesh.data": 1,
                          "model.vocab_size": 512} | changes)
    return config, shape
  return make


def mesh_of(config: config_lib.ExperimentConfig,
            shape: dict[str, int]) -> jax.sharding.Mesh:
  devices = 1
  for size in shape.values():
    devices *= size
  return ahead.make_mesh(config, jax.devices()[:devices])


# --- What is exact -----------------------------------------------------------

MESHES = [{}, {"mesh.data": 4}, {"mesh.fsdp": 4},
          {"mesh.fsdp": 2, "mesh.tensor": 2}, {"mesh.sequence": 2}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_state_is_what_a_device_is_given(
    make, family: str, mesh: dict[str, int]) -> None:
  """Kernels are cut, vectors and tables of positions as the rules say."""
  config, shape = make({"model.family": family, "model.size": "98k",
                        "model.num_kv_heads": 2} | mesh)
  found = memory.estimate(config, shape, "cpu")
  assert found.parameters + found.optimizer == ahead.state_bytes(
      config, mesh_of(config, shape))


def test_state_by_hand(make) -> None:
  """One layer of width 16 and its biases; AdamW has two moments and a count."""
  config, shape = make({"model.size": "3k"})
  count = (4 * 16 * 16 + 2 * 16 * 64  # kernels
           + 4 * 16 + 64 + 16  # biases
           + 3 * 2 * 16  # norms
           + (512 + 16) * 16)  # tokens, positions
  found = memory.estimate(config, shape, "gpu")
  assert found.parameters == 4 * count
  assert found.optimizer == 8 * count + 4


OBJECTIVES = {
    "causal": {},
    "prefix": {"objective.prefix_lm": True,
               "objective.separate_documents": True},
    "masked": {"model.family": "bert"},
    "documents": {"model.family": "bert",
                  "objective.separate_documents": True},
    "spans": {"model.family": "t5", "model.context_length": 32},
    "infilling": {"model.family": "bart",
                  "objective.corruption": "infilling"},
    "none": {"model.family": "bart", "objective.corruption": "none",
             "objective.permute_sentences": True},
    "pairs": {"model.family": "t5", "objective.corruption": "pairs",
              "objective.source_length": 24, "data.corpus": "files",
              "data.files": ("unread.jsonl",), "data.target_field": "target"},
    "spikes": {"recovery.spike_factor": 2.0, "recovery.spike_window": 10},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_is_what_a_device_is_given(make, name: str) -> None:
  """Half of the rows, the step and the hyperparameters; and recent losses."""
  config, shape = make(OBJECTIVES[name] | {"mesh.data": 2})
  given = sum(x.size * x.dtype.itemsize // 2 for x in jax.tree.leaves(
      ahead.abstract_batch(config)))
  others = 4 * (1 + 10 + (10 if name == "spikes" else 0))
  assert memory.estimate(config, shape, "cpu").batch == given + others


def test_rules_are_those_of_the_step(make) -> None:
  """They are written down twice, as this room is below the step's."""
  assert memory.MESH_AXES == sharding.MESH_AXES
  of_parameters = {
      axis for family in FAMILIES for one in parametrization.parameters(
          make({"model.family": family})[0].model) for axis in one.axes}
  rules = {axis: sharding.RULES[axis] for axis in of_parameters
           if sharding.RULES[axis] is not None}
  assert rules == moments.PARAMETER_AXES
  for backend, tokens in moments.CHUNK_TOKENS.items():
    assert tokens == cross_entropy.CHUNK_TOKENS.get(
        backend, cross_entropy.CHUNK_TOKENS["accelerator"])


@pytest.mark.parametrize("params", [10**6, 8_388_607, 8_388_608, 10**8])
@pytest.mark.parametrize("tuning_is", ["auto", "off"])
@pytest.mark.parametrize("backend", memory.BACKENDS)
def test_part_tokens_are_those_of_the_step(
    params: int, tuning_is: str, backend: str) -> None:
  runtime = config_lib.RuntimeConfig(cpu_tuning=tuning_is)
  assert moments.part_tokens(runtime, backend, params) == tuning.part_tokens(
      runtime, backend, params)


# --- The cache ---------------------------------------------------------------


@pytest.mark.parametrize("family, changes", [
    ("gpt2", {}), ("llama", {"model.num_kv_heads": 2}),
    ("gpt3", {"model.scan_layers": True}), ("t5", {}),
    ("bart", {"model.scan_layers": True})])
@pytest.mark.parametrize("dtype, beams", [("float32", 1), ("bfloat16", 3)])
def test_cache_is_that_of_generation(
    make, family: str, changes: dict[str, Any], dtype: str,
    beams: int) -> None:
  """Two prompts in a bucket of 16 tokens, and 5 new ones, of which the last
  is not read again."""
  config, _ = make({"model.family": family, "model.size": "98k"} | changes)
  model = config.model
  pair = model.architecture == "encoder_decoder"
  module = transformer.create(model, "cpu", dtype)
  params = jax.tree.map(
      lambda x: x.value, transformer.abstract_parameters(module),
      is_leaf=lambda x: hasattr(x, "names"))
  tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
  settings = search.Settings(max_new_tokens=5, num_beams=beams,
                             start_token=0 if pair else None)
  state = jax.eval_shape(
      lambda params, tokens: decoding._prefill.__wrapped__(
          module, settings, params,
          inputs_lib.Inputs(tokens, tokens, tokens), jax.random.key(0)),
      params, tokens)
  real = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
  # An encoder-decoder's decoder begins with the start token alone.
  assert memory.cache_bytes(
      model, 2 * beams, 4 + (1 if pair else 16), dtype,
      source_length=16 if pair else None) == real


def test_cache_by_hand(make) -> None:
  """Keys and values: 2 layers, 2 heads of 16, 100 places, 3 sequences."""
  config, _ = make({"model.size": "98k", "model.num_kv_heads": 2})
  assert memory.cache_bytes(config.model, 3, 100, "bfloat16") == (
      2 * 2 * 2 * 2 * 16 * 100 * 3)


# --- Against the compiler ----------------------------------------------------

_WHOLE = {"runtime.cpu_tuning": "off"}  # the batch in as many parts as asked
_SCAN = _WHOLE | {"model.scan_layers": True}


def _wide(d_model: int, layers: int, length: int, batch: int, vocab: int,
          **others: Any) -> dict[str, Any]:
  """A model by its width, with heads of 64."""
  return {"model.d_model": d_model, "model.num_layers": layers,
          "model.num_heads": d_model // 64, "model.context_length": length,
          "train.batch_size": batch, "model.vocab_size": vocab} | {
              key.replace("__", "."): value for key, value in others.items()}


# Compiles in a few seconds each.
FEW = {
    "decoder": _SCAN | _wide(128, 4, 128, 16, 1024),
    "decoder full": _SCAN | _wide(128, 4, 256, 16, 1024, model__remat="full"),
    "decoder dots bfloat16": _SCAN | _wide(
        128, 4, 256, 8, 1024, model__remat="dots", train__dtype="bfloat16"),
    "decoder update": _WHOLE | _wide(256, 2, 128, 1, 512),
    "encoder": _WHOLE | _wide(128, 1, 256, 16, 1024, model__family="bert"),
    "encoder-decoder full": _SCAN | _wide(
        128, 2, 256, 8, 2048, model__family="t5", model__remat="full"),
    "tensor fsdp": _SCAN | _wide(
        128, 2, 128, 8, 2048, mesh__fsdp=2, mesh__tensor=2),
}
MANY = {
    "decoder unrolled": _WHOLE | _wide(512, 2, 256, 8, 32000),
    "decoder unrolled bfloat16": _WHOLE | _wide(
        256, 2, 1024, 8, 4096, train__dtype="bfloat16"),
    "decoder unrolled full": _WHOLE | _wide(
        192, 3, 256, 16, 1024, model__remat="full"),
    "decoder mostly parameters": _WHOLE | _wide(768, 2, 128, 4, 32000),
    "decoder data accumulation": _SCAN | _wide(
        256, 6, 512, 64, 8192, mesh__data=4, train__accumulation_steps=4),
    "decoder cpu tuning": _wide(256, 2, 512, 32, 1024),
    "decoder 41M full 1024": _SCAN | _wide(
        512, 8, 1024, 4, 32000, model__remat="full"),
    "decoder fsdp bfloat16": _SCAN | _wide(
        512, 4, 256, 16, 8192, mesh__fsdp=4, train__dtype="bfloat16"),
    "llama fsdp tensor": _SCAN | _wide(
        512, 4, 512, 16, 8192, model__family="llama", mesh__fsdp=2,
        mesh__tensor=2),
    "encoder dots": _SCAN | _wide(
        192, 4, 128, 32, 8192, model__family="bert", model__remat="dots"),
    "encoder 41M": _SCAN | _wide(
        512, 8, 512, 8, 32000, model__family="bert"),
    "encoder sequence": _WHOLE | _wide(
        256, 2, 512, 16, 4096, model__family="bert", mesh__sequence=2),
    "encoder-decoder dots": _SCAN | _wide(
        384, 8, 512, 16, 32000, model__family="t5", model__remat="dots"),
    "encoder-decoder data": _WHOLE | _wide(
        256, 2, 512, 16, 4096, model__family="t5", mesh__data=4),
    "encoder-decoder fsdp tensor": _WHOLE | _wide(
        256, 2, 256, 32, 4096, model__family="bart",
        objective__corruption="infilling", mesh__fsdp=2, mesh__tensor=2),
}


@pytest.mark.parametrize("name", [
    *FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MANY)])
def test_total_is_within_a_tenth_of_the_compilers(make, name: str) -> None:
  """What the step is given, what it returns beside the state, and what it
  needs meanwhile."""
  config, shape = make((FEW | MANY)[name])
  found = memory.estimate(config, shape, "cpu")
  real = ahead.compile_step(config, mesh_of(config, shape)).memory
  assert found.total == pytest.approx(real.total - real.code, rel=0.1)


def with_batch(config: config_lib.ExperimentConfig,
               batch: int) -> config_lib.ExperimentConfig:
  return dataclasses.replace(config, train=dataclasses.replace(
      config.train, batch_size=batch))


@pytest.mark.slow
@pytest.mark.parametrize("name, available_bytes", [
    ("decoder", 256 * 2**20), ("decoder full", 128 * 2**20)])
def test_the_largest_batch_is_the_compilers(
    make, name: str, available_bytes: int) -> None:
  """It fits, and one that is 1.15 times as large does not."""
  config, shape = make((FEW | MANY)[name])
  batch = memory.largest_batch(config, shape, available_bytes, "cpu")

  def needed(size: int) -> int:
    changed = with_batch(config, size)
    return ahead.compile_step(changed, mesh_of(changed, shape)).memory.total
  assert needed(batch) <= available_bytes < needed(round(1.15 * batch))


# --- Largest batch and errors ------------------------------------------------


@pytest.mark.parametrize("backend", memory.BACKENDS)
def test_one_unit_more_than_the_largest_batch_does_not_fit(
    make, backend: str) -> None:
  """It is a multiple of the rows of the mesh and the parts."""
  config, shape = make(FEW["decoder"] | {
      "mesh.fsdp": 2, "train.accumulation_steps": 3, "train.batch_size": 6})
  batch = memory.largest_batch(config, shape, 2**28, backend)
  assert batch % 6 == 0 and batch > 6
  totals = [memory.estimate(with_batch(config, size), shape, backend).total
            for size in (batch, batch + 6)]
  assert totals[0] <= 2**28 < totals[1]


def test_no_batch_fits_beside_the_state(make) -> None:
  config, shape = make(FEW["decoder"])
  state = memory.estimate(config, shape, "gpu").parameters
  assert memory.largest_batch(config, shape, state, "gpu") is None


@pytest.mark.parametrize("available", [0, -1, float("nan"), float("inf")])
def test_a_device_has_some_memory(make, available: float) -> None:
  config, shape = make({})
  with pytest.raises(ValueError, match="available_bytes"):
    memory.largest_batch(config, shape, available, "cpu")


@pytest.mark.parametrize("shape, backend, field", [
    ({"model": 2}, "cpu", "'model'"), ({"data": 0}, "cpu", "'data'"),
    ({"data": 1.0}, "cpu", "'data'"), ({"data": 3}, "cpu", "train.batch_size"),
    ({"fsdp": 8, "data": 2}, "cpu", "train.batch_size"),
    ({"tensor": 3}, "cpu", "mesh.tensor"),
    ({"sequence": 5}, "cpu", "mesh.sequence"), ({}, "npu", "backend 'npu'")])
def test_a_mesh_that_does_not_do_is_named(
    make, shape: dict[str, Any], backend: str, field: str) -> None:
  config, _ = make({})
  with pytest.raises(ValueError, match=field):
    memory.estimate(config, shape, backend)


@pytest.mark.parametrize("key, value", [
    ("batch_size", -8), ("batch_size", 0), ("accumulation_steps", 0)])
def test_a_batch_that_is_none_is_named(make, key: str, value: int) -> None:
  config, shape = make({})
  config = dataclasses.replace(config, train=dataclasses.replace(
      config.train, **{key: value}))
  with pytest.raises(config_lib.ConfigError, match=f"train.{key}"):
    memory.estimate(config, shape, "cpu")


def test_an_unknown_vocabulary_is_named(make) -> None:
  config, shape = make({"model.vocab_size": None})
  with pytest.raises(config_lib.ConfigError, match="model.vocab_size"):
    memory.estimate(config, shape, "cpu")


@pytest.mark.parametrize("changes, field", [
    ({"batch_size": 0}, "batch_size"), ({"length": -1}, "length"),
    ({"length": 1.5}, "length"), ({"dtype": "int8"}, "int8"),
    ({"source_length": 4}, "source_length")])
def test_a_cache_of_nothing_is_named(
    make, changes: dict[str, Any], field: str) -> None:
  config, _ = make({})
  call = dict(batch_size=1, length=1, dtype="float32") | changes
  with pytest.raises(ValueError, match=field):
    memory.cache_bytes(config.model, **call)


def test_an_encoder_has_no_cache(make) -> None:
  config, _ = make({"model.family": "bert"})
  with pytest.raises(config_lib.ConfigError, match="architecture"):
    memory.cache_bytes(config.model, 1, 1, "float32")


def test_an_estimate_takes_no_time(make) -> None:
  """Once the shapes of a model are known: a sweep has hundreds of runs."""
  config, shape = make({"model.size": "25M", "model.family": "t5"})
  memory.estimate(config, shape, "cpu")
  seconds = []
  for _ in range(5):
    begin = time.perf_counter()
    memory.estimate(config, shape, "cpu")
    seconds.append(time.perf_counter() - begin)
  assert min(seconds) < 0.01


# --- What follows from what is kept ------------------------------------------


@pytest.mark.parametrize("backend", memory.BACKENDS)
def test_less_is_kept_in_a_scan_the_more_is_recomputed(
    make, backend: str) -> None:
  totals = []
  for remat in ("none", "dots", "full"):
    config, shape = make(_SCAN | _wide(
        128, 4, 512, 16, 1024, model__remat=remat))
    totals.append(memory.estimate(config, shape, backend).total)
  assert totals == sorted(totals, reverse=True)
  assert totals[2] < totals[0] / 1.5


def test_flash_attention_keeps_no_scores(make) -> None:
  """Of 512 x 512 scores of 4 heads and 16 sequences, float32, 4 layers."""
  names = ("splash", "dot_product")
  activations = []
  for name in names:
    config, shape = make(_WHOLE | _wide(
        256, 4, 512, 16, 1024, model__attention=name))
    activations.append(memory.estimate(config, shape, "tpu").activations)
  scores = 16 * 4 * 512 * 512 * 4
  assert activations[1] - activations[0] == 4 * scores


def test_padding_and_prefixes_take_the_attention_that_can(make) -> None:
  """cuDNN takes no segments and splash no prefix: scores are kept."""
  changes = _WHOLE | _wide(256, 4, 512, 16, 1024, train__dtype="bfloat16")
  for backend, key in (("gpu", "separate_documents"), ("tpu", "prefix_lm")):
    activations = []
    for value in (False, True):
      config, shape = make(changes | {f"objective.{key}": value})
      activations.append(memory.estimate(config, shape, backend).activations)
    assert activations[1] - activations[0] == 4 * 16 * 4 * 512 * 512 * 2
