# SPDX-License-Identifier: Apache-2.0
"""Kernels of other people, as far as a machine without their device goes; and
which form of attention is taken where.

Shape letters as in tfjax.models.kernels.
"""

import functools
import os
import re
import subprocess
import sys
from typing import Any, Callable

from flax import linen as nn
import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import attention
from tfjax.models import attention_choice
from tfjax.models import attention_forms
from tfjax.models import attention_shards
from tfjax.models import inputs as inputs_lib
from tfjax.models import kernels
from tfjax.models import layers
from tfjax.models import masks
from tfjax.models import transformer
from tfjax.train import sharding

LENGTH = 256
SEGMENTS = np.array([[1] * 90 + [2] * 166, [1] * 200 + [0] * 56], np.int32)
SPLASH = functools.partial(kernels.splash, interpret=True)


def heads(groups: int, width: int, keys: int = LENGTH) -> list[jax.Array]:
  """Queries, keys, values and a cotangent."""
  random = np.random.default_rng(0)
  shapes = [(2, 4, LENGTH, width), *[(2, groups, keys, width)] * 2,
            (2, 4, LENGTH, width)]
  return [jnp.asarray(random.standard_normal(s), jnp.float32) for s in shapes]


def out_and_gradients(attend: Callable, mask: masks.Mask) -> Callable:
  def run(q, k, v, dout):
    out, pull = jax.vjp(lambda *x: attend(*x, mask, scale=0.3), q, k, v)
    return out, *pull(dout)
  return run


# --- Splash ------------------------------------------------------------------


@pytest.mark.parametrize("mask, groups, width, keys", [
    (masks.Mask(causal=True), 2, 16, 256),
    (masks.Mask(), 4, 64, 384),
    (masks.Mask(causal=True, window=40), 1, 16, 256),
    (masks.Mask(window=40), 4, 24, 256),
    (masks.Mask(causal=True, segments=SEGMENTS, key_segments=SEGMENTS),
     4, 16, 256),
    (masks.Mask(window=90, segments=SEGMENTS, key_segments=SEGMENTS),
     2, 16, 256),
], ids=["causal", "cross", "window", "window both ways", "packed causal",
        "packed window"])
def test_splash_computes_the_formula(
    mask: masks.Mask, groups: int, width: int, keys: int) -> None:
  inputs = heads(groups, width, keys)
  got = jax.jit(out_and_gradients(SPLASH, mask))(*inputs)
  expected = jax.jit(out_and_gradients(attention_forms.reference, mask))(
      *inputs)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_splash_computes_it_on_a_mesh_with_cut_sequences() -> None:
  mask = masks.Mask(causal=True, segments=SEGMENTS, key_segments=SEGMENTS)
  inputs = heads(2, 16)
  expected = jax.jit(out_and_gradients(attention_forms.reference, mask))(
      *inputs)
  mesh = Mesh(np.array(jax.devices()).reshape(2, 1, 2, 2), sharding.MESH_AXES)
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.rules()):
    got = jax.jit(out_and_gradients(functools.partial(
        attention_shards.attend, SPLASH), mask))(*inputs)
  assert {"data", "tensor", "sequence"} <= set(got[0].sharding.spec)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_splash_computes_no_block_that_the_mask_excludes() -> None:
  """Of 4 x 4 blocks of 512: the diagonal's and below, or a band."""
  def run(mask):
    kernel = splash_attention.make_splash_mha(
        kernels.splash_mask(mask, 1, 2048, 2048),
        block_sizes=splash_attention.BlockSizes(
            **kernels.splash_blocks(2048, 2048)),
        head_shards=1, q_seq_shards=1)
    return int((np.asarray(kernel.fwd_mask_info.block_mask) > 0).sum())
  assert run(masks.Mask(causal=True)) == 10
  assert run(masks.Mask(causal=True, window=512)) == 7
  assert run(masks.Mask(window=512)) == 10


# --- cuDNN -------------------------------------------------------------------


def cudnn_calls(monkeypatch: pytest.MonkeyPatch, mask: masks.Mask,
                dtype: str = "bfloat16") -> list[str]:
  """The custom calls of a pass forwards and backwards, for CUDA."""
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version",
                      lambda: 91000)
  q = jax.ShapeDtypeStruct((2, 4, LENGTH, 64), dtype)
  k = jax.ShapeDtypeStruct((2, 2, LENGTH, 64), dtype)
  text = jax.jit(out_and_gradients(kernels.cudnn, mask)).trace(
      q, k, k, q).lower(lowering_platforms=("cuda",)).as_text()
  return [line for line in text.splitlines() if "custom_call" in line]


@pytest.mark.parametrize("mask, kind, window", [
    (masks.Mask(causal=True), "CAUSAL", 0),
    (masks.Mask(), "NO_MASK", 0),
    (masks.Mask(causal=True, window=16), "CAUSAL", 16)])
def test_cudnn_is_given_the_mask_and_no_array_of_it(
    monkeypatch: pytest.MonkeyPatch, mask: masks.Mask, kind: str,
    window: int) -> None:
  forward, backward = cudnn_calls(monkeypatch, mask)
  assert "@__cudnn$fmhaSoftmax(" in forward
  assert "@__cudnn$fmhaSoftmaxBackward(" in backward
  for call in (forward, backward):
    config = call.replace(r"\22", '"')
    assert f'"mask_type": "{kind}"' in config
    assert f'"sliding_window_length": {window}' in config
    assert '"fmha_scale": 0.3' in config
    assert "2x256x2x64xbf16" in call  # keys, their heads not repeated
    assert "256x256" not in call


def test_what_cudnn_is_refused_it_would_refuse(
    monkeypatch: pytest.MonkeyPatch) -> None:
  with pytest.raises(ValueError, match="right window"):
    cudnn_calls(monkeypatch, masks.Mask(window=16))
  with pytest.raises(NotImplementedError, match="Q must be fp16/bf16"):
    cudnn_calls(monkeypatch, masks.Mask(), "float32")


# --- Which form where --------------------------------------------------------


def shaped(width: int = 64, dtype: str = "bfloat16", length: int = LENGTH
           ) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((2, 4, length, width), dtype)


CAUSAL = masks.Mask(causal=True)


@pytest.mark.parametrize("backend, x, mask, bias, name, why", [
    ("cpu", shaped(dtype="float32"), CAUSAL, False, "blocks", "on cpu"),
    ("cpu", shaped(), CAUSAL, True, "reference", "position bias"),
    ("cpu", shaped(), CAUSAL.replace(start=1), False, "reference", "cache"),
    ("gpu", shaped(), CAUSAL, False, "cudnn", "on gpu"),
    ("gpu", shaped(), CAUSAL.replace(window=9), False, "cudnn", "on gpu"),
    ("gpu", shaped(128), masks.Mask(), False, "cudnn", "on gpu"),
    ("gpu", shaped(dtype="float32"), CAUSAL, False, "dot_product",
     "train.dtype is float32"),
    ("gpu", shaped(136), CAUSAL, False, "dot_product", "at most 128"),
    ("gpu", shaped(60), CAUSAL, False, "dot_product", "multiple of 8"),
    ("gpu", shaped(), masks.Mask(window=9), False, "dot_product", "windows"),
    ("gpu", shaped(), masks.Mask(segments=SEGMENTS, key_segments=SEGMENTS),
     False, "dot_product", "T x T"),
    ("gpu", shaped(), CAUSAL.replace(prefix=1), False, "dot_product",
     "prefix"),
    ("gpu", shaped(), CAUSAL, True, "dot_product", "position bias"),
    ("tpu", shaped(24, "float32"), CAUSAL, False, "splash", "on tpu"),
    ("tpu", shaped(), masks.Mask(segments=SEGMENTS, key_segments=SEGMENTS),
     False, "splash", "on tpu"),
    ("tpu", shaped(length=200), CAUSAL, False, "dot_product",
     "128 divides, and this is 200"),
    ("tpu", shaped(), CAUSAL.replace(prefix=1), False, "dot_product",
     "prefix"),
    ("other", shaped(), CAUSAL, False, "dot_product", "on other")])
def test_auto_takes_what_is_fast_and_can(
    backend: str, x: Any, mask: masks.Mask, bias: bool, name: str, why: str
) -> None:
  chosen, because = attention_choice.choose("auto", backend, x, x, mask, bias)
  assert chosen == name and why in because


@pytest.mark.parametrize("capability, width, name", [
    (None, 128, "cudnn"), (None, 256, "dot_product"), ((7, 5), 64,
    "dot_product"), ((8, 0), 128, "cudnn"), ((8, 9), 256, "dot_product"),
    ((9, 0), 256, "cudnn"), ((10, 0), 264, "dot_product"),
    ((0,), 64, "dot_product")])
def test_cudnn_is_taken_by_what_the_gpu_can(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, ...] | None,
    width: int, name: str) -> None:
  monkeypatch.setattr(kernels, "cuda_capability", lambda: capability)
  x = shaped(width)
  assert attention_choice.choose("auto", "gpu", x, x, CAUSAL)[0] == name


@pytest.mark.parametrize("given, capability", [
    ("8.0", (8, 0)), ("12.1", (12, 1)), ("gfx90a", (0,))])
def test_the_gpu_says_what_it_can(
    monkeypatch: pytest.MonkeyPatch, given: str, capability: tuple[int, ...]
) -> None:
  assert kernels.cuda_capability() is None  # there is none here
  device = type("Device", (), dict(compute_capability=given))
  monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
  assert kernels.cuda_capability() == capability


def test_a_named_form_is_taken_wherever_it_can_be() -> None:
  x, odd = shaped(), shaped(length=7)
  choose = attention_choice.choose
  for name in ("reference", "dot_product", "blocks"):
    for backend in ("cpu", "gpu", "tpu"):
      assert choose(name, backend, x, x, CAUSAL) == (
          name, "named in the config")
  # A run of a TPU goes on on a laptop; a prompt has any length.
  name, why = choose("splash", "cpu", x, x, CAUSAL)
  assert name == "blocks" and why == "on cpu; not splash: it needs a TPU"
  assert choose("splash", "tpu", odd, odd, CAUSAL)[0] == "dot_product"


def model(**fields: object) -> config_lib.ModelConfig:
  return config_lib.complete_model(config_lib.ModelConfig(**dict(
      family="gpt2", d_model=64, num_layers=4, num_heads=4, vocab_size=8,
      context_length=LENGTH) | fields))


def batch_of(config: config_lib.ModelConfig, length: int = LENGTH,
             **fields: Any) -> inputs_lib.Inputs:
  tokens = np.zeros((2, length), np.int32)
  if config.architecture == "encoder_decoder":
    fields["source"] = inputs_lib.Inputs(tokens[:, :128])
  return inputs_lib.Inputs(tokens, **fields)


@pytest.mark.parametrize("fields, inputs, backend, name", [
    (dict(), dict(), "cpu", "blocks"),
    (dict(), dict(segments=SEGMENTS), "tpu", "splash"),
    (dict(), dict(), "gpu", "cudnn"),
    (dict(), dict(prefix=np.array([3, 4])), "tpu", "dot_product"),
    (dict(family="t5"), dict(), "tpu",
     "dot_product (encoder, decoder), splash (cross)"),
    (dict(family="t5"), dict(), "cpu",
     "reference (encoder, decoder), blocks (cross)"),
    (dict(family="modernbert", window=8), dict(), "gpu",
     "cudnn (encoder), dot_product (encoder in a window)")])
def test_what_is_explained_is_what_the_model_takes(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any],
    inputs: dict[str, Any], backend: str, name: str) -> None:
  config = model(**fields)
  batch = batch_of(config, **inputs)
  explained, why = attention_choice.explain(config, backend, "bfloat16", batch)
  assert explained == name and (backend in why)
  choose, taken = attention_choice.choose, set()

  def spy(*arguments):
    taken.add(choose(*arguments)[0])
    return "reference", ""
  params = jax.eval_shape(transformer.create(config).init, jax.random.key(0),
                          transformer.example_inputs(config, 1))
  monkeypatch.setattr(attention_choice, "choose", spy)
  jax.eval_shape(transformer.create(config, backend, "bfloat16").apply,
                 params, batch)
  assert taken == set(re.findall(r"[a-z_]+(?= \(|$)", name))


@pytest.mark.parametrize("fields, length, backend, says", [
    (dict(attention="splash"), LENGTH, "cpu",
     "splash cannot compute the decoder's attention on cpu: it needs a TPU; "
     "use auto, which would take blocks"),
    (dict(attention="splash"), 200, "tpu", "this is 200; use auto"),
    (dict(attention="cudnn"), LENGTH, "tpu", "needs an NVIDIA GPU"),
    (dict(attention="blocks", family="t5"), LENGTH, "cpu",
     "blocks cannot compute the encoder's attention on cpu: it has no "
     "relative position bias; use auto, which would take reference")])
def test_a_named_form_that_cannot_train_the_model_is_an_error(
    fields: dict[str, Any], length: int, backend: str, says: str) -> None:
  config = model(**fields)
  with pytest.raises(config_lib.ConfigError, match=re.escape(says)) as error:
    attention_choice.explain(config, backend, "bfloat16",
                             batch_of(config, length))
  assert error.value.key == "model.attention"


def test_every_form_is_a_choice_of_the_config() -> None:
  for name in (*attention_choice.ANYWHERE, *attention_choice.PER_SHARD):
    config = config_lib.default()
    config_lib.override(config, {"model.size": "3k", "duration.steps": 1,
                                 "model.attention": name})
    assert config_lib.resolve(config).model.attention == name


def test_the_module_runs_the_form_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch) -> None:
  config = model()
  module = attention.Attention(config, "tpu", causal=True)
  x = np.random.default_rng(0).standard_normal((2, LENGTH, 64)).astype("f4")
  context = layers.Context(segments=SEGMENTS)
  monkeypatch.setitem(attention_choice.PER_SHARD, "splash", SPLASH)
  init = jax.jit(module.init)
  params = init(jax.random.key(0), x, context)
  text = str(jax.make_jaxpr(module.apply)(params, x, context))
  assert "pallas_call" in text
  other = attention.Attention(config, "cpu", causal=True)
  np.testing.assert_allclose(
      jax.jit(module.apply)(params, x, context),
      jax.jit(other.apply)(params, x, context), atol=1e-5)


# --- A TPU that is not here --------------------------------------------------

_COMPILE = """
import jax, numpy as np
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import Mesh
from tfjax.models import attention_shards, kernels, masks
from tfjax.train import sharding
topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2")
mesh = Mesh(np.array(topology.devices).reshape(1, 1, 2, 2),
            sharding.MESH_AXES)
def run(q, k, v, dout):
  out, pull = jax.vjp(lambda *x: attention_shards.attend(
      kernels.splash, *x, masks.Mask(causal=True), 0.1), q, k, v)
  return out, *pull(dout)
with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.rules()):
  spec = jax.NamedSharding(mesh, nn.logical_to_mesh_axes(
      ("batch", "heads", "length", None)))
  x = jax.ShapeDtypeStruct((2, 4, 1024, 64), "bfloat16", sharding=spec)
  print(jax.jit(run).lower(x, x, x, x).compile().as_text())
"""


def test_splash_compiles_for_a_tpu_pod_slice() -> None:
  """Forwards and backwards, heads and sequences cut, by libtpu's compiler."""
  pytest.importorskip("libtpu")
  done = subprocess.run(
      [sys.executable, "-c", _COMPILE], capture_output=True, text=True,
      check=False, env=os.environ | dict(
          TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"))
  assert done.returncode == 0, done.stderr[-2000:]
  for part in ("fwd_residuals", "dq_no_residuals", "dkv_no_residuals"):
    assert f"splash_mha_{part}" in done.stdout
  assert "all-to-all" in done.stdout
