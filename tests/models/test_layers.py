# SPDX-License-Identifier: Apache-2.0
"""Named axes, projections, norms, feed-forward, initial weights, positions."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import layers

CONFIG = config_lib.complete_model(config_lib.ModelConfig(
    family="gpt2", d_model=12, num_layers=3, num_heads=2, d_ff=20,
    context_length=8, vocab_size=11, init_std=0.5))


def change(**fields: object) -> config_lib.ModelConfig:
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


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms_are_those_of_torch(norm: str) -> None:
  torch = pytest.importorskip("torch")
  x, scale, bias = 3 * normal(0, 2, 5, 12) + 2, normal(1, 12), normal(2, 12)
  config = change(norm=norm, norm_epsilon=1e-3)
  params = {"scale": scale} | ({"bias": bias} if norm == "layer_norm" else {})
  tensors = [torch.from_numpy(np.array(a)) for a in (x, *params.values())]
  functional = torch.nn.functional
  expected = (functional.layer_norm if norm == "layer_norm"
              else functional.rms_norm)(tensors[0], (12,), *tensors[1:],
                                        eps=1e-3)
  np.testing.assert_allclose(
      layers.Norm(config).apply({"params": params}, x), expected, atol=2e-6)


def test_a_layer_norm_may_have_no_bias() -> None:
  made = layers.Norm(change(use_bias=False)).init(
      jax.random.key(0), jnp.ones((1, 1, 12)))["params"]
  assert set(made) == {"scale"}


def test_nonlinearities_are_those_of_torch() -> None:
  torch = pytest.importorskip("torch")
  functional = torch.nn.functional
  x = jnp.linspace(-6, 6, 101)
  expected = {
      "gelu": functional.gelu,
      "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
      "relu": functional.relu,
      "silu": functional.silu,
  }
  assert set(expected) == set(layers.ACTIVATIONS)
  for name, function in expected.items():
    np.testing.assert_allclose(
        layers.ACTIVATIONS[name](x), function(torch.from_numpy(np.array(x))),
        atol=1e-6, err_msg=name)
  # The two forms of GELU differ, and by less than a thousandth.
  difference = jnp.abs(layers.ACTIVATIONS["gelu"](x) -
                       layers.ACTIVATIONS["gelu_tanh"](x)).max()
  assert 1e-4 < float(difference) < 1e-3


def test_a_gated_feed_forward_by_hand() -> None:
  module = layers.FeedForward(
      change(activation="silu", gated=True, use_bias=False), "cpu")
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


def test_a_plain_feed_forward_by_hand() -> None:
  module = layers.FeedForward(change(activation="relu"), "cpu")
  x = normal(0, 2, 3, 12)
  params = {"up": {"kernel": normal(1, 12, 20), "bias": normal(2, 20)},
            "down": {"kernel": normal(3, 20, 12), "bias": normal(4, 12)}}
  up, down = params["up"], params["down"]
  expected = np.maximum(np.asarray(x) @ up["kernel"] + up["bias"], 0) @ down[
      "kernel"] + down["bias"]
  np.testing.assert_allclose(module.apply({"params": params}, x), expected,
                             atol=1e-4)


# --- Initial weights ---------------------------------------------------------


def initial_stds(config: config_lib.ModelConfig) -> dict[str, float]:
  """Of a wide feed-forward; 65,536 draws know their deviation to 0.3%."""
  wide = dataclasses.replace(config, d_model=128, d_ff=512)
  params = nn.meta.unbox(layers.FeedForward(wide, "cpu").init(
      jax.random.key(0), jnp.zeros((1, 1, 128)))["params"])
  if config.use_bias:
    assert not np.asarray(params["up"]["bias"]).any()
  return {k: float(v["kernel"].std()) for k, v in params.items()}


def test_projections_into_a_pre_norm_stream_start_smaller() -> None:
  """By sqrt(2 layers), of which CONFIG has three."""
  assert initial_stds(CONFIG) == pytest.approx(
      {"up": 0.5, "down": 0.5 / 6 ** 0.5}, rel=0.015)
  assert initial_stds(change(norm_position="post")) == pytest.approx(
      {"up": 0.5, "down": 0.5}, rel=0.015)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_fan_in_scales_by_the_inputs_alone(norm_position: str) -> None:
  config = change(initializer="fan_in", gated=True,
                  norm_position=norm_position)
  assert initial_stds(config) == pytest.approx(
      {"up": 128 ** -0.5, "gate": 128 ** -0.5, "down": 512 ** -0.5},
      rel=0.015)


# --- Positions ---------------------------------------------------------------


def test_rotary_by_hand() -> None:
  # Width 4: the pairs (0, 2) and (1, 3) turn by t and by t / 100.
  x = jnp.array([[[[1.0, 1.0, 0.0, 0.0]] * 3]])
  rotated = layers.rotate(x, None, 10_000.0)[0, 0]
  for t in range(3):
    np.testing.assert_allclose(
        rotated[t], [np.cos(t), np.cos(t / 100), np.sin(t), np.sin(t / 100)],
        atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
  q, k = normal(0, 8), normal(1, 8)
  length = 40
  everywhere = lambda x: jnp.broadcast_to(x, (1, 1, length, 8))
  scores = np.asarray(jnp.einsum(
      "bnth,bnsh->ts", layers.rotate(everywhere(q), None, 100.0),
      layers.rotate(everywhere(k), None, 100.0)))
  for distance in (0, 1, 7, -5):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
  assert abs(scores[0, 0] - scores[1, 0]) > 1e-3
  np.testing.assert_allclose(scores[0, 0], float(q @ k), atol=1e-5)


def test_rotary_leaves_lengths_as_they_are() -> None:
  x = normal(3, 2, 2, 9, 6)
  np.testing.assert_allclose(
      jnp.linalg.norm(layers.rotate(x, None, 50.0), axis=-1),
      jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rotary_goes_by_the_positions_given() -> None:
  x = jnp.broadcast_to(normal(0, 8), (2, 3, 6, 8))
  positions = np.array([[5, 0, 2, 2, 1, 3], [0, 1, 2, 3, 4, 5]])
  in_order = np.asarray(layers.rotate(x, None, 100.0))
  got = layers.rotate(x, positions, 100.0)
  for b in range(2):
    np.testing.assert_array_equal(got[b], in_order[b][:, positions[b]])


def test_rotary_is_that_of_transformers() -> None:
  torch = pytest.importorskip("torch")
  llama = pytest.importorskip("transformers.models.llama.modeling_llama")
  x, places = np.array(normal(4, 2, 3, 7, 8)), np.arange(7)
  angles = np.outer(places, 500.0 ** (-np.arange(0, 8, 2) / 8)).astype("f4")
  angles = torch.from_numpy(np.concatenate([angles, angles], -1))[None]
  expected, _ = llama.apply_rotary_pos_emb(
      torch.from_numpy(x), torch.from_numpy(x), angles.cos(), angles.sin())
  np.testing.assert_allclose(layers.rotate(x, None, 500.0), expected,
                             atol=1e-5)


def test_sinusoids_by_hand() -> None:
  """Width 4: by t and by t / 100, sine then cosine."""
  positions = np.array([[0, 1, 5], [300, 2, 2]])
  got = np.asarray(layers.sinusoids(positions, 4))
  assert got.shape == (2, 3, 4)
  for index in np.ndindex(2, 3):
    t = positions[index]
    np.testing.assert_allclose(
        got[index],
        [np.sin(t), np.cos(t), np.sin(t / 100), np.cos(t / 100)], atol=1e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, distance", [
    (32, 128), (32, 20), (8, 16), (10, 64), (32, 512), (64, 100), (4, 9),
    (12, 100)])
def test_relative_buckets_are_those_of_t5(
    buckets: int, distance: int, bidirectional: bool) -> None:
  torch = pytest.importorskip("torch")
  t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
  offsets = torch.arange(-600, 601)
  # pylint: disable-next=protected-access
  expected = t5.T5Attention._relative_position_bucket(
      offsets, bidirectional, buckets, distance).numpy()
  got = layers.relative_buckets(601, buckets, distance,
                                bidirectional=bidirectional)
  np.testing.assert_array_equal(got, expected)


def test_relative_buckets_by_hand() -> None:
  """Eight buckets to 16: 0, 1, 2, 3, then from 4, 4 sqrt 2, 8, 8 sqrt 2."""
  got = layers.relative_buckets(20, 8, 16, bidirectional=False)
  assert list(got[19::-1]) == [
      0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, *[7] * 8]
  assert not got[20:].any()  # keys ahead
  # Half of sixteen each way, and the second half is for keys ahead.
  both = layers.relative_buckets(20, 16, 16, bidirectional=True)
  np.testing.assert_array_equal(both[:20], got[:20])
  np.testing.assert_array_equal(both[20:], 8 + got[18::-1])
