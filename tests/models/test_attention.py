# SPDX-License-Identifier: Apache-2.0
"""Every form of attention against the formula, and what causality means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import attention

# Around the sizes of blocks, and far from them.
LENGTHS = (1, 63, 64, 65, 200, 300)
FAST = ("block_causal", "dot_product")


def heads(length: int, dtype: str = "float32", width: int = 8,
          scale: float = 1.0) -> list[jax.Array]:
  """Queries, keys, values and a cotangent: 2 sequences, 3 heads."""
  keys = jax.random.split(jax.random.key(length), 4)
  return [(scale * jax.random.normal(k, (2, 3, length, width))).astype(dtype)
          for k in keys]


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Position by position, in float64."""
  out = np.zeros_like(q)
  for t in range(q.shape[2]):
    scores = np.einsum("bnh,bnsh->bns", q[:, :, t], k[:, :, :t + 1])
    weights = np.exp(scores / q.shape[-1] ** 0.5)
    weights /= weights.sum(-1, keepdims=True)
    out[:, :, t] = np.einsum("bns,bnsh->bnh", weights, v[:, :, :t + 1])
  return out


@jax.jit
def reference_and_gradients(q, k, v, dout):
  out, pull = jax.vjp(attention.reference, q, k, v)
  return out, *pull(dout)


def test_the_reference_is_the_formula() -> None:
  q, k, v, _ = heads(20)
  expected = by_hand(*(np.asarray(x, np.float64) for x in (q, k, v)))
  np.testing.assert_allclose(attention.reference(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("name, length", [
    *(("block_causal", length) for length in LENGTHS),
    ("dot_product", 1), ("dot_product", 65)])
def test_values_and_gradients_match_the_reference(
    name: str, length: int) -> None:
  *qkv, dout = heads(length)
  form = attention.IMPLEMENTATIONS[name]

  @jax.jit
  def both(q, k, v, dout):
    out, pull = jax.vjp(form, q, k, v)
    return out, *pull(dout)
  for got, expected in zip(both(*qkv, dout),
                           reference_and_gradients(*qkv, dout)):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=5e-6)


@pytest.mark.parametrize("name, length", [
    ("block_causal", 65), ("block_causal", 200), ("dot_product", 65)])
def test_bfloat16_is_as_close_as_its_eight_bits(
    name: str, length: int) -> None:
  *qkv, dout = heads(length, "bfloat16")
  exact = reference_and_gradients(*(x.astype(jnp.float32)
                                    for x in (*qkv, dout)))
  out, pull = jax.jit(lambda *x: jax.vjp(
      attention.IMPLEMENTATIONS[name], *x))(*qkv)
  for got, expected in zip((out, *pull(dout)), exact):
    assert got.dtype == jnp.bfloat16
    error = jnp.abs(got.astype(jnp.float32) - expected).max()
    # A few roundings of 2^-9 on sums of this size; wrong is of order 1.
    assert error < 0.02 * jnp.abs(expected).max()


@pytest.mark.parametrize("name", ("reference", *FAST))
def test_large_scores_do_not_overflow(name: str) -> None:
  """Scores of some hundreds: each row is then nearly one of the values."""
  q, k, v, dout = heads(70, scale=30.0)
  out, pull = jax.jit(lambda *x: jax.vjp(
      attention.IMPLEMENTATIONS[name], *x))(q, k, v)
  assert all(bool(jnp.isfinite(x).all()) for x in (out, *pull(dout)))
  scores = np.einsum("bnth,bnsh->bnts", q, k)
  scores[..., ~np.tri(70, dtype=bool)] = -np.inf
  best = np.take_along_axis(
      np.asarray(v), scores.argmax(-1)[..., None], axis=2)
  margin = np.sort(scores, -1)
  clear = margin[..., -1] - margin[..., -2] > 100
  assert clear.mean() > 0.5
  np.testing.assert_allclose(np.asarray(out)[clear], best[clear], atol=1e-3)


@pytest.mark.parametrize("name", ("reference", *FAST))
def test_no_output_depends_on_what_comes_later(name: str) -> None:
  length, cut = 130, 64
  q, k, v, _ = heads(length)
  form = attention.IMPLEMENTATIONS[name]

  def early(k, v):
    return form(q, k, v)[:, :, :cut].sum()
  for gradient in jax.jit(jax.grad(early, (0, 1)))(k, v):
    assert np.all(np.asarray(gradient)[:, :, cut:] == 0)
    assert np.all(np.abs(np.asarray(gradient)[:, :, :cut]).max((0, 1, 3)) > 0)


def test_auto_means_what_is_fast_on_the_backend() -> None:
  assert attention.choose("auto", "cpu") == "block_causal"
  assert attention.choose("auto", "gpu") == "dot_product"
  assert attention.choose("auto", "tpu") == "dot_product"
  assert attention.choose("reference", "cpu") == "reference"


def test_every_choice_of_the_config_is_there() -> None:
  for name in attention.IMPLEMENTATIONS:
    config = config_lib.default()
    config_lib.override(config, {"model.size": "3k", "duration.steps": 1,
                                 "model.attention": name})
    assert config_lib.resolve(config).model.attention == name
