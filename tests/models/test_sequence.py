# SPDX-License-Identifier: Apache-2.0
"""Attention whose sequences are cut over devices equals the uncut one.

Shape letters as in tfjax.models.attention.
"""

import contextlib
import functools
from typing import Any, Callable, Iterator

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import attention_choice
from tfjax.models import attention_forms
from tfjax.models import attention_shards
from tfjax.models import blocks
from tfjax.models import inputs as inputs_lib
from tfjax.models import masks
from tfjax.models import transformer
from tfjax.train import sharding

LENGTH, OTHER = 64, 96
SEGMENTS = np.array([[1] * 20 + [2] * 23 + [3] * 21, [1] * 50 + [0] * 14],
                    np.int32)
OTHER_SEGMENTS = np.array(
    [[1] * 40 + [2] * 30 + [3] * 26, [1] * 70 + [0] * 26], np.int32)
PREFIX = np.array([37, 0], np.int32)
packed = functools.partial(masks.Mask, segments=SEGMENTS,
                           key_segments=SEGMENTS)
# Masks, and how many heads of keys there are to four of queries.
MASKS = {
    "full": (masks.Mask(), 4),
    "causal": (masks.Mask(causal=True), 2),
    "window": (masks.Mask(causal=True, window=9), 4),
    "wide window": (masks.Mask(causal=True, window=40), 1),
    "window both ways": (masks.Mask(window=10), 4),
    "packed": (packed(), 4),
    "packed causal": (packed(causal=True), 2),
    "prefix": (masks.Mask(causal=True, prefix=PREFIX), 4),
    "packed prefix in a window": (
        packed(causal=True, prefix=PREFIX, window=30), 1),
    "cross": (masks.Mask(), 2),
    "packed cross": (masks.Mask(
        segments=SEGMENTS, key_segments=OTHER_SEGMENTS), 4),
}


@contextlib.contextmanager
def mesh_of(**axes: int) -> Iterator[Mesh]:
  shape = [axes.get(name, 1) for name in sharding.MESH_AXES]
  devices = np.array(jax.devices()[:np.prod(shape)]).reshape(shape)
  mesh = Mesh(devices, sharding.MESH_AXES)
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.rules()):
    yield mesh


def heads(groups: int, keys: int, length: int = LENGTH,
          dtype: str = "float32") -> list[jax.Array]:
  """Queries, keys, values and a cotangent."""
  random = np.random.default_rng(0)
  shapes = [(2, 4, length, 8), *[(2, groups, keys, 8)] * 2, (2, 4, length, 8)]
  return [jnp.asarray(random.standard_normal(s), dtype) for s in shapes]


def out_and_gradients(attend: Callable, mask: masks.Mask) -> Callable:
  def run(q, k, v, dout):
    out, pull = jax.vjp(lambda *x: attend(*x, mask, scale=0.3), q, k, v)
    return out, *pull(dout)
  return run


def assert_equal(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
  """To `tolerance` of the largest element of each array."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected),
                  strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


IN_BLOCKS = functools.partial(attention_shards.attend, blocks.blocks)

def plain(q, k, v, mask, scale):
  """The formula as a kernel that sees whole sequences and a few heads."""
  return attention_forms.reference(q, k, v, mask, scale=scale)


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("axes", [
    dict(sequence=4), dict(data=2, sequence=2, tensor=2)],
    ids=["4", "2x2x2"])
def test_a_ring_computes_what_one_device_does(
    axes: dict[str, int], case: str) -> None:
  mask, groups = MASKS[case]
  if groups % axes.get("tensor", 1):
    groups = 4
  inputs = heads(groups, OTHER if "cross" in case else LENGTH)
  expected = jax.jit(out_and_gradients(attention_forms.reference, mask))(
      *inputs)
  with mesh_of(**axes):
    lowered = jax.jit(out_and_gradients(IN_BLOCKS, mask)).lower(*inputs)
    got = lowered.compile()(*inputs)
  assert "collective_permute" in lowered.as_text()
  assert "sequence" in got[0].sharding.spec
  assert_equal(got, expected)


@pytest.mark.parametrize("case", MASKS)
def test_heads_exchanged_for_length_compute_the_same(case: str) -> None:
  mask, groups = MASKS[case]
  inputs = heads(groups, OTHER if "cross" in case else LENGTH)
  expected = jax.jit(out_and_gradients(attention_forms.reference, mask))(
      *inputs)
  with mesh_of(sequence=4):
    lowered = jax.jit(out_and_gradients(functools.partial(
        attention_shards.attend, plain), mask)).lower(*inputs)
    got = lowered.compile()(*inputs)
  assert "all_to_all" in lowered.as_text()
  assert_equal(got, expected)


def test_a_ring_in_bfloat16_is_as_close_as_its_eight_bits() -> None:
  mask = masks.Mask(causal=True)
  inputs = heads(2, LENGTH, dtype="bfloat16")
  expected = jax.jit(out_and_gradients(attention_forms.reference, mask))(
      *(x.astype(jnp.float32) for x in inputs))
  with mesh_of(sequence=8):
    got = jax.jit(out_and_gradients(IN_BLOCKS, mask))(*inputs)
  assert {x.dtype for x in got} == {jnp.dtype("bfloat16")}
  assert_equal(got, expected, 0.02)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 4, 5])
@pytest.mark.parametrize("prefix", [None, -3, 0, 2])
def test_keys_that_a_mask_passes_over_are_known(
    causal: bool, window: int, prefix: int | None) -> None:
  """By place, against the mask itself, pair by pair."""
  queries, keys = 3, 4
  for start in range(-12, 13):
    mask = masks.Mask(
        causal=causal, window=window, start=jnp.int32(start),
        prefix=None if prefix is None else jnp.array([prefix]))
    seen = mask.allowed(*mask.places(slice(0, queries), slice(0, keys)))
    sees = True if seen is None else bool(seen.any())
    meets = bool(mask.meets(queries, keys))
    if causal and prefix is not None and window:
      assert meets or not sees  # it may go over keys in vain
    else:
      assert meets == sees


def needs(length: int, devices: int, mask: masks.Mask) -> int:
  """Bytes of one device beside its inputs and outputs."""
  shape = jax.ShapeDtypeStruct((1, 4, length, 32), jnp.float32)
  with mesh_of(sequence=devices) as mesh:
    cut = jax.NamedSharding(mesh, P(None, None, "sequence"))
    x = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=cut)
    compiled = jax.jit(out_and_gradients(IN_BLOCKS, mask)).lower(
        x, x, x, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_a_devices_memory_falls_with_the_devices() -> None:
  """Scores as the square, since both queries and keys are a part."""
  two, four, eight = (needs(2048, n, masks.Mask(causal=True))
                      for n in (2, 4, 8))
  assert four < two / 1.9 and eight < four / 1.9


def test_twice_the_length_on_twice_the_devices_needs_no_more() -> None:
  mask = masks.Mask()
  assert needs(2048, 8, mask) <= 1.05 * needs(1024, 4, mask)


# --- Models ------------------------------------------------------------------


def model(family: str, **fields: object) -> config_lib.ModelConfig:
  return config_lib.complete_model(config_lib.ModelConfig(**dict(
      family=family, d_model=16, num_layers=2, num_heads=4, vocab_size=32,
      context_length=LENGTH) | fields))


MODELS = {
    "gpt2": dict(init_std=0.3),
    "llama": dict(init_std=0.3, num_kv_heads=2),
    "gpt3": dict(init_std=0.3, window=9),
    "t5": dict(),
    "bert": dict(init_std=0.3),
}


@pytest.mark.parametrize("form", ["auto", "dot_product"])
@pytest.mark.parametrize("family", MODELS)
def test_a_models_sequences_may_be_cut(family: str, form: str) -> None:
  """Packed documents through whole models: outputs and gradients."""
  config = model(family, attention=form, **MODELS[family])
  tokens = np.random.default_rng(0).integers(0, 32, (2, LENGTH))
  source = None
  if config.architecture == "encoder_decoder":
    source = inputs_lib.Inputs(
        np.random.default_rng(1).integers(0, 32, (2, OTHER)),
        segments=OTHER_SEGMENTS)
  inputs = inputs_lib.Inputs(tokens, segments=SEGMENTS, source=source)
  module = transformer.create(config)
  params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), inputs))

  def run(params, inputs):
    def loss(params):
      out = module.apply(params, inputs)
      return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).mean()
    return jax.value_and_grad(loss)(params)
  expected = jax.jit(lambda *x: run(*x))(params, inputs)
  with mesh_of(data=2, sequence=2, tensor=2):
    lowered = jax.jit(lambda *x: run(*x)).lower(params, inputs)
    got = lowered.compile()(params, inputs)
  assert ("collective_permute" in lowered.as_text()) == (form == "auto")
  assert_equal(got[0], expected[0])
  # Some gradients (of a key's bias) are zero but for rounding: all as one.
  flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree[1])])
          for tree in (got, expected)]
  assert_equal(*flat)


def test_a_choice_for_long_sequences_says_how_they_are_cut() -> None:
  q, k, *_ = (jax.ShapeDtypeStruct(x.shape, x.dtype)
              for x in heads(2, LENGTH))
  with mesh_of(sequence=4, tensor=2):
    assert attention_choice.choose("auto", "cpu", q, k, masks.Mask()) == (
        "blocks", "on cpu, in a ring of 4 devices")
    name, why = attention_choice.choose(
        "auto", "tpu", q, k, masks.Mask(causal=True))
    # Splash has no part of 4 heads for each of 8 devices.
    assert name == "blocks" and "4 heads do not divide over the 2 x 4" in why
    odd = jax.ShapeDtypeStruct((2, 4, 1, 8), jnp.float32)
    name, why = attention_choice.choose("auto", "cpu", odd, odd, masks.Mask())
    assert name == "reference" and "1 does not divide over the 4" in why
