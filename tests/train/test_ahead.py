# SPDX-License-Identifier: Apache-2.0
"""The step that is compiled ahead is the step that trains: its shapes, its
memory and what its devices send each other."""

import sys
from typing import Any

import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.cost import estimates
from tfjax.data import batches as batches_lib
from tfjax.data import tokenizers
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.models import transformer
from tfjax.train import ahead
from tfjax.train import optimizers
from tfjax.train import step as step_lib

OBJECTIVES = {
    "causal": {},
    "prefix": {"objective.prefix_lm": True,
               "objective.separate_documents": True},
    "masked": {"model.family": "bert"},
    "whole_words": {"model.family": "bert", "objective.whole_words": True},
    "spans": {"model.family": "t5", "model.context_length": 32},
    "infilling": {"model.family": "bart",
                  "objective.corruption": "infilling",
                  "objective.permute_sentences": True},
    "pairs": {"model.family": "t5", "objective.corruption": "pairs",
              "objective.source_length": 24, "data.corpus": "files",
              "data.files": ("unread.jsonl",), "data.target_field": "target"},
}


@pytest.fixture(name="make")
def make_fixture(make_config):
  """A config for eight devices, whose vocabulary is known."""
  def make(changes: dict[str, Any]) -> config_lib.ExperimentConfig:
    return estimates.with_vocabulary(make_config(
        {"runtime.num_devices": 8} | changes))
  return make


@pytest.mark.parametrize("name", OBJECTIVES)
def test_abstract_batches_are_shaped_like_real_ones(make, name: str) -> None:
  config = make(OBJECTIVES[name])
  tokenizer = tokenizers.byte_level()
  real = vocabulary_lib.of(config, tokenizer)
  assert config.model.vocab_size == real.size
  rows, length = config.train.batch_size, config.model.context_length
  rng = np.random.default_rng(0)
  windows = rng.integers(97, 120, (rows, length + 1)).astype(np.int32)
  if name == "pairs":
    windows = batches_lib.Pairs(
        rng.integers(97, 120, (rows, 24)).astype(np.int32), windows[:, 1:])
  batch = objectives.create(config, real).batch(
      windows, np.ones(rows, np.float32),
      objectives.Generators(0, 0, range(rows)))
  shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), batch)
  assert jax.tree.map(lambda x: (x.shape, str(x.dtype)),
                      ahead.abstract_batch(config)) == shapes


def test_a_vocabulary_that_is_given_is_kept(make) -> None:
  """Then no tokenizer is needed, not even the one of a directory."""
  config = make({"model.vocab_size": 512, "data.tokenizer.kind": "directory",
                 "data.tokenizer.path": "not/there"})
  assert config.model.vocab_size == 512
  assert make({}).model.vocab_size == 257


def test_memory_by_kind_when_all_is_replicated(make) -> None:
  """One sequence of 16 tokens a device; AdamW has two moments and a count."""
  config = make({})
  outcome = ahead.compile_step(config, ahead.make_mesh(config, jax.devices()))
  params = transformer.count_parameters(config.model).total
  memory = outcome.memory
  assert memory.parameters == 4 * params
  assert memory.optimizer == 2 * 4 * params + 4
  assert memory.batch == 3 * 4 * 16  # tokens, targets, weights
  assert memory.padding == 4 + 10 * 4  # step and hyperparameters
  assert memory.total == outcome.needed_bytes == (
      memory.parameters + memory.optimizer + memory.batch + memory.padding +
      memory.outputs + memory.temporary + memory.code)
  assert memory.temporary > 0 and memory.peak is None
  assert memory.outputs < 1024  # metrics; the state is updated in place
  # Simulated devices have no memory size of their own.
  assert outcome.fits is None and outcome.available_bytes is None


def test_memory_by_kind_is_what_a_sharded_state_takes(make) -> None:
  config = make({"mesh.fsdp": 4, "mesh.tensor": 2, "model.size": "98k",
                 "model.vocab_size": 512})
  mesh = ahead.make_mesh(config, jax.devices())
  steps = step_lib.steps_for(config, mesh)
  state = steps.init(jax.random.key(0),
                     optimizers.make_hyperparameters(config.optimizer, 10))

  def on_first_device(tree):
    return sum(x.addressable_shards[0].data.nbytes
               for x in jax.tree.leaves(tree))
  outcome = ahead.compile_step(config, mesh)
  assert outcome.memory.parameters == on_first_device(state.params)
  assert outcome.memory.optimizer == on_first_device(state.optimizer_state)
  params = transformer.count_parameters(config.model).total
  assert outcome.memory.parameters < 4 * params / 3
  assert ahead.state_bytes(config, mesh) == on_first_device(
      (state.params, state.optimizer_state))


def test_data_parallel_devices_send_the_gradients(make) -> None:
  """Seven eighths of them, twice, and a few sums. (The gradients of a tied
  table are reduced for each of its uses.)"""
  config = make({"model.tie_embedding": False})
  outcome = ahead.compile_step(config, ahead.make_mesh(config, jax.devices()))
  params = transformer.count_parameters(config.model).total
  assert {one.kind for one in outcome.collectives} == {"all-reduce"}
  sent = sum(one.times * one.bytes_sent for one in outcome.collectives)
  assert sent == pytest.approx(2 * 7 / 8 * 4 * params, rel=0.005)
  assert outcome.unknown_loops == 0
  # Parameters and moments are read and written, gradients once each.
  assert outcome.memory_bytes > 8 * 4 * params


def test_a_memory_size_that_is_given_decides(make) -> None:
  config = make({})
  mesh = ahead.make_mesh(config, jax.devices())
  needed = ahead.compile_step(config, mesh).needed_bytes
  for size, fits in ((needed, True), (needed - 1, False)):
    outcome = ahead.compile_step(config, mesh, size)
    assert (outcome.fits, outcome.available_bytes) == (fits, size)


def test_a_mesh_of_too_few_devices_is_refused(make_config) -> None:
  config = make_config({"runtime.num_devices": None, "mesh.data": 2})
  with pytest.raises(config_lib.ConfigError, match="data 2 .* is 2 of 8"):
    ahead.make_mesh(config, jax.devices())


@pytest.mark.parametrize("message, expected", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
     "for HLO temporaries (27.50G) exceeds available HBM (15.75G).",
     (27.5 * 2**30, 15.75 * 2**30)),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory "
     "in memory space hbm. Used 512.00M of 256.50M hbm. Exceeded hbm capacity "
     "by 255.50M. Memory usage report: ...", (512 * 2**20, 256.5 * 2**20)),
    ("RESOURCE_EXHAUSTED: something new", (None, None))])
def test_what_the_compiler_says_of_memory(
    message: str, expected: tuple[float, float]) -> None:
  # pylint: disable-next=protected-access
  assert ahead._exhausted(message) == expected


def test_without_libtpu_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "libtpu", None)  # its import fails
  with pytest.raises(ahead.TopologyError, match=r"\.\[tpu\]"):
    ahead.topology("v5e:2x2")


@pytest.mark.parametrize("name", ["v5p-128", "v5e", "16x16", ""])
def test_a_name_of_another_form_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str) -> None:
  monkeypatch.setattr(ahead, "_has_libtpu", lambda: True)
  with pytest.raises(ahead.TopologyError, match="v5e:16x16"):
    ahead.topology(name)
