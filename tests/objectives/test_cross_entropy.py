# SPDX-License-Identifier: Apache-2.0
"""Chunked cross-entropy against the one written out, and its memory."""

import functools
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfjax.objectives import cross_entropy

BATCH, LENGTH, WIDTH, VOCAB = 3, 20, 8, 37


def inputs(dtype: str = "float32", weighted: bool = True
           ) -> tuple[jax.Array, ...]:
  random = np.random.default_rng(0)
  hidden = jnp.asarray(random.standard_normal((BATCH, LENGTH, WIDTH)), dtype)
  head = jnp.asarray(random.standard_normal((VOCAB, WIDTH)), jnp.float32)
  targets = jnp.asarray(random.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
  weights = random.uniform(0, 2, (BATCH, LENGTH)).astype(np.float32)
  weights[0, 5:9] = 0  # padding within a sequence,
  weights[2] = 0  # and a sequence of nothing else
  if not weighted:
    weights[:] = 1
  bias = jnp.asarray(random.standard_normal(VOCAB), jnp.float32)
  return hidden, head, bias, targets, jnp.asarray(weights)


loss_sum = functools.partial(cross_entropy.loss_sum, "cpu")


def plain_sum(*arrays: jax.Array) -> jax.Array:
  return cross_entropy.reference(*arrays).sum()


def gradients(function: Callable[..., jax.Array]):
  # Three times the loss, so that the cotangent is not 1.
  return jax.jit(jax.value_and_grad(
      lambda *x: 3 * function(*x), argnums=(0, 1, 2)))


def test_the_reference_by_hand() -> None:
  # Logits (0, ln 3): probabilities 1/4 and 3/4.
  hidden = jnp.ones((1, 2, 1))
  head = jnp.array([[0.0], [np.log(3.0)]])
  got = cross_entropy.reference(
      hidden, head, None, jnp.array([[0, 1]]), jnp.array([[1.0, 2.0]]))
  np.testing.assert_allclose(got, [[np.log(4), 2 * np.log(4 / 3)]], rtol=1e-6)
  got = cross_entropy.reference(
      hidden, 0 * head, head[:, 0], jnp.array([[0, 1]]), jnp.ones((1, 2)))
  np.testing.assert_allclose(got, [[np.log(4), np.log(4 / 3)]], rtol=1e-6)


# 60 tokens: one chunk; chunks that divide; ones that do not (7 a sequence);
# fewer than the sequences, so one token of each at a time.
@pytest.mark.parametrize("chunk_tokens", [1024, 30, 21, 2])
@pytest.mark.parametrize("weighted", [True, False])
def test_value_and_gradients_match_the_reference(
    chunk_tokens: int, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(cross_entropy.CHUNK_TOKENS, "cpu", chunk_tokens)
  arrays = inputs(weighted=weighted)
  value, (dhidden, dhead, dbias) = gradients(loss_sum)(*arrays)
  expected, (dhidden_plain, dhead_plain, dbias_plain) = gradients(plain_sum)(
      *arrays)
  np.testing.assert_allclose(value, expected, rtol=2e-6)
  np.testing.assert_allclose(dhidden, dhidden_plain, atol=2e-5)
  np.testing.assert_allclose(dhead, dhead_plain, atol=5e-5)
  np.testing.assert_allclose(dbias, dbias_plain, atol=2e-5)
  if weighted:
    assert np.all(np.asarray(dhidden)[2] == 0)
    assert np.all(np.asarray(dhidden)[0, 5:9] == 0)
  np.testing.assert_allclose(
      cross_entropy.losses("cpu", *arrays), cross_entropy.reference(*arrays),
      atol=2e-6)
  np.testing.assert_allclose(loss_sum(*arrays), expected / 3,
                             rtol=2e-6)


def test_a_prime_length_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(cross_entropy.CHUNK_TOKENS, "cpu", 12)
  hidden, head, _, targets, weights = inputs()
  arrays = hidden[:, :19], head, None, targets[:, :19], weights[:, :19]
  np.testing.assert_allclose(loss_sum(*arrays),
                             plain_sum(*arrays), rtol=2e-6)


def test_bfloat16_hidden_states_are_as_close_as_their_bits() -> None:
  hidden, head, bias, targets, weights = inputs("bfloat16")
  value, (dhidden, dhead, dbias) = gradients(loss_sum)(
      hidden, head, bias, targets, weights)
  expected, exact = gradients(plain_sum)(
      hidden.astype(jnp.float32), head, bias, targets, weights)
  assert (dhidden.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(value, expected, rtol=5e-3)
  for got, right in zip((dhidden, dhead, dbias), exact, strict=True):
    error = jnp.abs(got.astype(jnp.float32) - right).max()
    assert error < 0.02 * jnp.abs(right).max()


def test_large_logits_do_not_overflow() -> None:
  hidden, *others = inputs()
  value, pull = gradients(loss_sum)(100 * hidden, *others)
  assert np.isfinite(value) and value > 0
  assert all(np.isfinite(x).all() for x in pull)


def test_the_logits_are_never_all_in_memory() -> None:
  batch, length, width, vocab = 8, 512, 32, 8192
  shapes = (
      jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
      jax.ShapeDtypeStruct((vocab, width), jnp.float32),
      jax.ShapeDtypeStruct((vocab,), jnp.float32),
      jax.ShapeDtypeStruct((batch, length), jnp.int32),
      jax.ShapeDtypeStruct((batch, length), jnp.float32))

  def temporary(function):
    compiled = gradients(function).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes
  logits = batch * length * vocab * 4
  chunk = cross_entropy.CHUNK_TOKENS["cpu"] * vocab * 4
  assert temporary(plain_sum) > logits
  assert temporary(loss_sum) < 3.2 * chunk < logits
