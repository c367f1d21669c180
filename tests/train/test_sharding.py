# SPDX-License-Identifier: Apache-2.0
"""The mesh, and rules that cover everything or raise."""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import layers
from tfjax.models import families
from tfjax.models import transformer
from tfjax.train import sharding


def mesh(make_config, changes: dict[str, Any] | None = None):
  return sharding.make_mesh(make_config({
      "runtime.num_devices": None} | (changes or {})))


def shape(*sizes: int) -> dict[str, int]:
  return dict(zip(sharding.MESH_AXES, sizes))


def test_the_mesh_is_all_devices_or_as_many_as_asked(make_config) -> None:
  assert mesh(make_config).shape == shape(8, 1, 1, 1)
  two = mesh(make_config, {"runtime.num_devices": 2})
  assert list(two.devices.flat) == jax.devices()[:2]


@pytest.mark.parametrize("axes, expected", [
    (dict(fsdp=8), (1, 8, 1, 1)), (dict(fsdp=2, tensor=2), (2, 2, 1, 2)),
    (dict(sequence=4), (2, 1, 4, 1)), (dict(data=1, tensor=2), (1, 1, 1, 2)),
    (dict(data=2, fsdp=2, sequence=2), (2, 2, 2, 1))])
def test_data_takes_what_the_other_axes_leave(
    axes: dict[str, int], expected: tuple[int, ...], make_config) -> None:
  got = mesh(make_config, {f"mesh.{k}": v for k, v in axes.items()})
  assert got.shape == shape(*expected)


@pytest.mark.parametrize("changes, key, message", [
    ({"runtime.num_devices": 9, "train.batch_size": 18},
     "runtime.num_devices", "9 .*is more than the 8 cpu"),
    ({"mesh.data": 2, "mesh.fsdp": 8}, "mesh", "16 .*more than the 8 cpu"),
    ({"mesh.data": 2, "runtime.num_devices": 4}, "runtime.num_devices",
     "4 is not the product of the mesh, data 2 x fsdp 1 x .* = 2"),
    ({"mesh.tensor": 3, "runtime.num_devices": 8}, "mesh",
     "tensor 3 = 3 does not divide 8"),
    ({"runtime.num_devices": 8, "train.batch_size": 12}, "train.batch_size",
     "multiple of 8"),
    ({"mesh.data": 2, "mesh.fsdp": 4, "train.batch_size": 12},
     "train.batch_size", "multiple of 8"),
    ({"runtime.num_devices": 8, "evaluation.batch_size": 12},
     "evaluation.batch_size", "multiple of 8"),
    ({"mesh.sequence": 3}, "mesh.sequence",
     "3 does not divide the 16 tokens of the decoder"),
], ids=str)
def test_a_mesh_that_cannot_be_is_refused(
    changes: dict[str, Any], key: str, message: str, make_config) -> None:
  with pytest.raises(config_lib.ConfigError, match=message) as error:
    mesh(make_config, changes)
  assert error.value.key == key


@dataclasses.dataclass(frozen=True)
class Card:
  """As much of an accelerator as the mesh looks at."""

  id: int
  process_index: int = 0
  platform: str = "gpu"
  device_kind: str = "card"
  slice_index: int = 0


def test_no_accelerator_and_no_process_stands_idle(make_config) -> None:
  cards = [Card(i, i // 2) for i in range(4)]
  config = make_config({"mesh.data": 2, "runtime.num_devices": None})
  with pytest.raises(config_lib.ConfigError, match="use all 6"):
    sharding.make_mesh(config, [Card(i, i // 2) for i in range(6)])
  with pytest.raises(config_lib.ConfigError, match="uses 2 of 4 gpu devices.*"
                     "runtime.num_devices=2"):
    sharding.make_mesh(config, [Card(i) for i in range(4)])


def test_cpu_devices_that_do_not_divide_the_batches_stay_idle(make_config
                                                              ) -> None:
  def data(batch: int, evaluation: int | None = None, **axes: int) -> int:
    return mesh(make_config, {
        "train.batch_size": batch, "evaluation.batch_size": evaluation,
        **{f"mesh.{k}": v for k, v in axes.items()}}).shape["data"]
  assert [data(12), data(7), data(9), data(8, 12)] == [6, 7, 3, 4]
  assert [data(6, tensor=2), data(12, fsdp=2)] == [3, 3]


def test_every_process_takes_part_with_as_many_devices(make_config) -> None:
  cores = [Card(i, i // 4, "cpu") for i in range(8)]
  # 6 sequences are for 2 devices of the 8, not 6 or 3: one of each process.
  got = sharding.make_mesh(make_config({
      "train.batch_size": 6, "evaluation.batch_size": 8,
      "runtime.num_devices": None}), cores)
  assert [device.id for device in got.devices.flat] == [0, 4]


@pytest.mark.parametrize("axes, along", [
    (dict(fsdp=2, tensor=2), 0), (dict(fsdp=8), 1), (dict(tensor=8), None)])
def test_between_slices_are_data_or_else_fsdp(
    axes: dict[str, int], along: int | None, make_config) -> None:
  cards = [Card(i, slice_index=i // 4) for i in range(8)]
  config = make_config({"runtime.num_devices": None} | {
      f"mesh.{name}": size for name, size in axes.items()})
  if along is None:
    with pytest.raises(config_lib.ConfigError, match="the 2 slices"):
      sharding.make_mesh(config, cards)
    return
  devices = np.moveaxis(sharding.make_mesh(config, cards).devices, along, 0)
  halves = [{device.slice_index for device in half.flat}
            for half in np.split(devices, 2)]
  assert halves == [{0}, {1}]


def test_a_host_reads_the_rows_of_its_devices(make_config) -> None:
  config = make_config({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
                        "runtime.num_devices": None})
  whole = sharding.make_mesh(config)
  assert sharding.row_parts(whole) == 4
  assert sharding.host_rows(whole, 8) == list(range(8))


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


@pytest.mark.parametrize("names, spec", [
    (("embed", "mlp"), P("fsdp", "tensor")),
    (("heads", "embed"), P("tensor", "fsdp")),
    (("position", "stream"), P(None, None))])
def test_a_parameter_lies_where_the_rules_say(
    names: tuple[str, str], spec: P, make_config) -> None:
  got = sharding.parameter_shardings(boxed(*names), mesh(make_config, {
      "mesh.fsdp": 2, "mesh.tensor": 4}))
  assert got["block"]["kernel"].spec == spec


@pytest.mark.parametrize("tree, message", [
    (boxed("embed", "mpl"), "block/kernel.*'mpl' has no rule; known: batch"),
    (boxed("mlp", "heads"), "block/kernel: two of the axes .*'tensor'"),
    (boxed("batch", "embed"), "block/kernel: two of the axes .*'fsdp'"),
    (boxed("embed", "mlp", shape=(16, 22)),
     "mesh.tensor: 4 does not divide the 'mlp' dimension, 22, of .*kernel"),
    (boxed("vocab", "embed", shape=(257, 16)),
     "mesh.tensor: 4 does not .* set model.vocab_size to 260"),
    ({"block": {"kernel": jax.ShapeDtypeStruct((2,), "float32")}},
     "block/kernel has no logical axes"),
], ids=["unknown", "two on one", "two on one of two", "uneven", "vocabulary",
        "none"])
def test_what_linen_would_drop_in_silence_raises_and_names_the_parameter(
    tree: dict, message: str, make_config) -> None:
  with pytest.raises(ValueError, match=message):
    sharding.parameter_shardings(tree, mesh(make_config, {
        "mesh.fsdp": 2, "mesh.tensor": 4}))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_parameter_of_a_family_has_axes(family: str, make_config
                                              ) -> None:
  config = config_lib.complete_model(config_lib.ModelConfig(
      family=family, d_model=16, num_layers=2, num_heads=2, context_length=8,
      vocab_size=30, scan_layers=True))
  tree = transformer.abstract_parameters(transformer.create(config))
  everything = mesh(make_config)
  got = sharding.parameter_shardings(tree, everything)
  assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(nn.meta.unbox(tree)))
  assert sharding.batch_sharding(everything).spec == P(("data", "fsdp"))
