# SPDX-License-Identifier: Apache-2.0
"""The mesh, and rules that cover everything or raise."""

from flax import linen as nn
import jax
from jax.sharding import PartitionSpec as P
import pytest

from tfjax import config as config_lib
from tfjax.models import layers
from tfjax.models import families
from tfjax.models import transformer
from tfjax.train import sharding


def mesh(devices: int | None = None, batch_size: int = 8):
  return sharding.make_mesh(
      config_lib.RuntimeConfig(num_devices=devices), batch_size)


def test_the_mesh_is_all_devices_or_as_many_as_asked() -> None:
  assert mesh().shape == {"data": len(jax.devices())} == {"data": 8}
  assert list(mesh(2).devices) == jax.devices()[:2]


def test_a_mesh_that_cannot_be_is_refused() -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    mesh(9, 18)
  assert error.value.key == "runtime.num_devices"
  assert "more than the 8 cpu" in str(error.value)
  with pytest.raises(config_lib.ConfigError) as error:
    mesh(8, 12)
  assert error.value.key == "train.batch_size"
  assert "multiple of 8" in str(error.value)


def test_cpu_devices_that_do_not_divide_the_batches_stay_idle() -> None:
  assert mesh(None, 12).shape == {"data": 6}
  assert mesh(None, 7).shape == {"data": 7}
  assert mesh(None, 9).shape == {"data": 3}
  runtime = config_lib.RuntimeConfig()
  assert sharding.make_mesh(runtime, 8, 12).shape == {"data": 4}
  with pytest.raises(config_lib.ConfigError) as error:
    sharding.make_mesh(config_lib.RuntimeConfig(num_devices=8), 8, 12)
  assert error.value.key == "evaluation.batch_size"


def test_rules_cover_the_closed_vocabulary(
    monkeypatch: pytest.MonkeyPatch) -> None:
  assert dict(sharding.rules()) == sharding.RULES
  assert set(sharding.RULES) == layers.PARAMETER_AXES | layers.ACTIVATION_AXES
  monkeypatch.delitem(sharding.RULES, "mlp")
  with pytest.raises(ValueError, match=r"no rule .*\['mlp'\]"):
    sharding.rules()


def boxed(*names: str, shape=(16, 24)) -> dict:
  return {"block": {"kernel": nn.LogicallyPartitioned(
      jax.ShapeDtypeStruct(shape, "float32"), names)}}


def test_a_parameter_lies_where_the_rules_say(
    monkeypatch: pytest.MonkeyPatch) -> None:
  got = sharding.parameter_shardings(boxed("embed", "mlp"), mesh())
  assert got["block"]["kernel"].spec == P(None, None)
  monkeypatch.setitem(sharding.RULES, "mlp", "data")
  got = sharding.parameter_shardings(boxed("embed", "mlp"), mesh())
  assert got["block"]["kernel"].spec == P(None, "data")


@pytest.mark.parametrize("tree, message", [
    (boxed("embed", "mpl"), "block/kernel.*'mpl' has no rule; known: batch"),
    (boxed("mlp", "heads"), "block/kernel: two of the axes .*'data'"),
    (boxed("embed", "mlp", shape=(16, 20)),
     "block/kernel: 20 does not divide over the 8"),
    ({"block": {"kernel": jax.ShapeDtypeStruct((2,), "float32")}},
     "block/kernel has no logical axes"),
], ids=["unknown", "two on one", "uneven", "none"])
def test_what_linen_would_drop_in_silence_raises_and_names_the_parameter(
    tree: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
  for axis in ("mlp", "heads"):
    monkeypatch.setitem(sharding.RULES, axis, "data")
  with pytest.raises(ValueError, match=message):
    sharding.parameter_shardings(tree, mesh())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_parameter_of_a_family_has_axes(family: str) -> None:
  config = config_lib.complete_model(config_lib.ModelConfig(
      family=family, d_model=16, num_layers=2, num_heads=2, context_length=8,
      vocab_size=30, scan_layers=True))
  tree = transformer.abstract_parameters(transformer.create(config))
  got = sharding.parameter_shardings(tree, mesh())
  assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(nn.meta.unbox(tree)))
  assert sharding.batch_sharding(mesh()).spec == P("data")
