# SPDX-License-Identifier: Apache-2.0
"""Named axes, projections, norms, feed-forward, rotary positions."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import layers

CONFIG = config_lib.ModelConfig(
    d_model=12, num_layers=3, num_heads=2, d_ff=20, context_length=8,
    vocab_size=11, init_std=0.5)


def change(**fields) -> config_lib.ModelConfig:
  return dataclasses.replace(CONFIG, **fields)


def normal(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


class Odd(nn.Module):
  axes: tuple[str, ...]

  @nn.compact
  def __call__(self):
    return layers.parameter(self, "kernel", nn.initializers.ones, (2, 3),
                            self.axes)


class Outer(nn.Module):
  axes: tuple[str, ...]

  @nn.compact
  def __call__(self):
    return Odd(self.axes, name="inner")()


@pytest.mark.parametrize("axes", [("embed", "mpl"), ("embed",),
                                  ("embed", "mlp", "mlp"), ("batch", "mlp")])
def test_an_axis_outside_the_vocabulary_raises_and_names_the_parameter(
    axes: tuple[str, ...]) -> None:
  with pytest.raises(ValueError, match="parameter inner/kernel .*'vocab'"):
    Outer(axes).init(jax.random.key(0))
  boxed = Outer(("embed", "mlp")).init(jax.random.key(0))["params"]
  assert boxed["inner"]["kernel"].names == ("embed", "mlp")


def test_an_activation_axis_outside_the_vocabulary_raises() -> None:
  x = jnp.zeros((2, 3))
  for axes in (("batch", "lenght"), ("batch",)):
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*'length'"):
      layers.constrain(x, *axes)
  np.testing.assert_array_equal(layers.constrain(x, "batch", None), x)


# Narrow to wide and wide to narrow take different ways backwards.
@pytest.mark.parametrize("inputs, outputs", [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_projections_gradient_is_that_of_the_plain_product(
    inputs: int, outputs: int, dtype: str) -> None:
  x, kernel = normal(0, 2, 6, inputs).astype(dtype), normal(1, inputs, outputs)
  dout = normal(2, 2, 6, outputs)

  def run(backend):
    out, pull = jax.vjp(
        lambda x, k: layers.project(x, k, backend), x, kernel)
    return out, *pull(dout.astype(out.dtype))
  tolerance = 1e-5 if dtype == "float32" else 0.05
  out, dx, dkernel = run("cpu")
  assert (out.dtype, dx.dtype, dkernel.dtype) == (
      x.dtype, x.dtype, jnp.float32)
  for got, expected in zip((out, dx, dkernel), run("tpu")):
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected.astype(jnp.float32),
        atol=tolerance, rtol=tolerance)
  if dtype == "float32":
    np.testing.assert_allclose(
        dkernel, np.einsum("btd,btf->df", x, dout), atol=1e-5)


def test_layer_norm_by_hand() -> None:
  x = jnp.array([[[1.0, 2.0, 3.0, 6.0]]])
  module = layers.Norm(change(norm_epsilon=0.5))
  params = {"scale": jnp.array([1.0, 2.0, 1.0, 1.0]),
            "bias": jnp.array([0.0, 0.0, 10.0, 0.0])}
  # Mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5, so the divisor is 2.
  np.testing.assert_allclose(
      module.apply({"params": params}, x)[0, 0], [-1, -1, 10, 1.5], rtol=1e-6)


def test_rms_norm_by_hand() -> None:
  x = jnp.array([[[1.0, 1.0, 3.0, 5.0]]])
  module = layers.Norm(change(norm="rms_norm", norm_epsilon=7.0))
  params = module.init(jax.random.key(0), x)["params"]
  assert set(params) == {"scale"}
  # Mean square 36 / 4 = 9, and with the epsilon 16.
  np.testing.assert_allclose(
      module.apply({"params": params}, x)[0, 0], [0.25, 0.25, 0.75, 1.25],
      rtol=1e-6)


def test_a_norm_computes_in_float32() -> None:
  x = (1000 + normal(0, 1, 4, 12)).astype(jnp.bfloat16)
  module = layers.Norm(CONFIG)
  params = module.init(jax.random.key(0), x)
  got = module.apply(params, x)
  exact = module.apply(params, x.astype(jnp.float32))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_gelu_is_the_tanh_form() -> None:
  x = jnp.linspace(-6, 6, 101)
  np.testing.assert_allclose(
      layers.gelu(x), jax.nn.gelu(x, approximate=True), atol=1e-6)


def test_swiglu_by_hand() -> None:
  module = layers.FeedForward(change(activation="swiglu", use_bias=False),
                              "cpu")
  x = normal(0, 2, 3, 12)
  params = nn.meta.unbox(module.init(jax.random.key(1), x)["params"])
  assert {k: v["kernel"].shape for k, v in params.items()} == {
      "up": (12, 20), "gate": (12, 20), "down": (20, 12)}
  up, gate, down = (np.asarray(params[name]["kernel"], np.float64)
                    for name in ("up", "gate", "down"))
  gated = np.asarray(x, np.float64) @ gate
  expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
  np.testing.assert_allclose(module.apply({"params": params}, x), expected,
                             atol=1e-4)


def test_the_residual_projections_start_smaller() -> None:
  assert layers.residual_std(CONFIG) == pytest.approx(0.5 / 6 ** 0.5)
  wide = change(d_model=256, d_ff=256)
  params = nn.meta.unbox(layers.FeedForward(wide, "cpu").init(
      jax.random.key(0), jnp.zeros((1, 1, 256)))["params"])
  # 65,536 draws know their deviation to 0.3%: 5 of those are 1.5%.
  assert float(params["up"]["kernel"].std()) == pytest.approx(0.5, rel=0.015)
  assert float(params["down"]["kernel"].std()) == pytest.approx(
      0.5 / 6 ** 0.5, rel=0.015)
  assert not np.asarray(params["up"]["bias"]).any()


def test_rotary_by_hand() -> None:
  # Width 4: the pairs (0, 2) and (1, 3) turn by t and by t / 100.
  x = jnp.array([[[[1.0, 1.0, 0.0, 0.0]] * 3]])
  rotated = layers.rotate(x, 10_000.0)[0, 0]
  for t in range(3):
    np.testing.assert_allclose(
        rotated[t], [np.cos(t), np.cos(t / 100), np.sin(t), np.sin(t / 100)],
        atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
  q, k = normal(0, 8), normal(1, 8)
  length = 40
  everywhere = lambda x: jnp.broadcast_to(x, (1, 1, length, 8))
  scores = np.asarray(jnp.einsum(
      "bnth,bnsh->ts", layers.rotate(everywhere(q), 100.0),
      layers.rotate(everywhere(k), 100.0)))
  for distance in (0, 1, 7, -5):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
  assert abs(scores[0, 0] - scores[1, 0]) > 1e-3
  np.testing.assert_allclose(scores[0, 0], float(q @ k), atol=1e-5)


def test_rotary_leaves_lengths_as_they_are() -> None:
  x = normal(3, 2, 2, 9, 6)
  np.testing.assert_allclose(
      jnp.linalg.norm(layers.rotate(x, 50.0), axis=-1),
      jnp.linalg.norm(x, axis=-1), rtol=1e-5)
