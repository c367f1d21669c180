# SPDX-License-Identifier: Apache-2.0
"""Every form of attention, under every mask, against the formula in NumPy.

Shape letters as in tfjax.models.attention.
"""

import dataclasses
import functools
from typing import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import attention
from tfjax.models import attention_forms
from tfjax.models import blocks
from tfjax.models import layers
from tfjax.models import masks
from tfjax.train import sharding

# Two sequences of packed documents, the second one padded.
SHARES = ((0.3, 0.35, 0.35), (0.6, 0.25))


def segments(length: int) -> np.ndarray:
  """1, 1, ..., 2, 2, ..., and 0 where a sequence's shares do not reach."""
  rows = []
  for shares in SHARES:
    row = [i + 1 for i, share in enumerate(shares)
           for _ in range(round(share * length))]
    rows.append((row + [0] * length)[:length])
  return np.array(rows, np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
  """A mask in words; `sees` says what it means."""

  causal: bool = False
  window: int = 0
  packed: bool = False
  prefixed: bool = False
  start: int = 0
  cross: bool = False  # as many keys as half the queries, and a few
  bias: bool = False
  groups: int = 4  # heads of keys, to four of queries

  def keys(self, length: int) -> int:
    if self.cross:
      return length // 2 + 7
    return length + self.start

  def prefix(self, length: int) -> np.ndarray:
    return np.array([length // 2 + 3, 0], np.int32)

  def mask(self, length: int) -> masks.Mask:
    packed = {} if not self.packed else dict(
        segments=segments(length), key_segments=segments(self.keys(length)))
    return masks.Mask(
        causal=self.causal, window=self.window,
        prefix=self.prefix(length) if self.prefixed else None,
        start=jnp.int32(self.start) if self.start else None, **packed)

  @functools.cache
  def sees(self, length: int) -> np.ndarray:
    """[B, T, S], pair by pair."""
    own, theirs = segments(length), segments(self.keys(length))
    seen = np.zeros((2, length, self.keys(length)), bool)
    for b, i, s in np.ndindex(*seen.shape):
      t = i + self.start
      ok = not self.packed or own[b, i] == theirs[b, s]
      if self.causal:
        ok &= s <= t or (self.prefixed and s < self.prefix(length)[b])
      if self.window and self.causal:
        ok &= abs(t - s) < self.window
      elif self.window:
        ok &= abs(t - s) <= self.window // 2
      seen[b, i, s] = ok
    return seen


CASES = {
    "full": Case(),
    "causal": Case(causal=True),
    "prefix": Case(causal=True, prefixed=True),
    "window": Case(causal=True, window=9),
    "wide window": Case(causal=True, window=80),
    "window of one": Case(causal=True, window=1),
    "window both ways": Case(window=10),
    "wide window both ways": Case(window=150),
    "prefix in a window": Case(causal=True, prefixed=True, window=20),
    "packed": Case(packed=True),
    "packed causal": Case(causal=True, packed=True, groups=2),
    "packed prefix": Case(causal=True, packed=True, prefixed=True),
    "packed window": Case(causal=True, packed=True, window=9, groups=1),
    "packed window both ways": Case(packed=True, window=10, groups=2),
    "cross": Case(cross=True, groups=2),
    "packed cross": Case(cross=True, packed=True),
    "started": Case(causal=True, start=5, groups=2),
    "started window": Case(causal=True, start=5, window=9),
    "bias": Case(bias=True, causal=True, groups=2),
    "packed bias": Case(bias=True, packed=True),
}
FORMS = {
    "reference": attention_forms.reference,
    "dot_product": attention_forms.dot_product,
    "banded": attention_forms.banded,
    "blocks": blocks.blocks,
}


PLAIN = ("full", "causal", "prefix", "window", "window both ways",
         "packed causal", "packed cross", "started", "started window", "bias",
         "packed bias")
# What each form has code of its own for, and where it hands over.
OWN = {
    "reference": PLAIN,
    "dot_product": PLAIN,
    "blocks": [case for case in CASES if "bias" not in case],
    "banded": [case for case in CASES
               if "window" in case and "started" not in case],
}
PAIRS = [(name, case) for name, cases in OWN.items() for case in cases]


@functools.cache
def heads(case: Case, length: int, dtype: str = "float32",
          scale: float = 1.0) -> tuple[list[jax.Array], jax.Array]:
  """Queries, keys, values and perhaps a bias; and a cotangent."""
  random = np.random.default_rng(length)
  keys, width = case.keys(length), 8
  shapes = [(2, 4, length, width), *[(2, case.groups, keys, width)] * 2]
  if case.bias:
    shapes.append((4, length, keys))
  made = [(scale * random.standard_normal(shape)).astype(np.float32)
          for shape in shapes]
  dout = random.standard_normal(shapes[0]).astype(np.float32)
  # The bias stays float32, as parameters do.
  return ([jnp.asarray(x, dtype if i < 3 else None)
           for i, x in enumerate(made)], jnp.asarray(dout, dtype))


SCALE = 0.3


@functools.cache
def by_hand(case: Case, length: int, dtype: str = "float32"
            ) -> list[np.ndarray]:
  """Output and gradients in float64, from the derivative of a softmax."""
  inputs, dout = heads(case, length, dtype)
  q, k, v, *bias = (np.asarray(x, np.float64) for x in inputs)
  dout = np.asarray(dout, np.float64)
  k, v = (x.repeat(4 // case.groups, 1) for x in (k, v))
  scores = SCALE * np.einsum("bnth,bnsh->bnts", q, k)
  if bias:
    scores += bias[0]
  scores = np.where(case.sees(length)[:, None], scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = np.einsum("bnth,bnsh->bnts", dout, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True))

  def of_groups(x):  # repeated heads: their gradients add
    return x.reshape(2, case.groups, -1, *x.shape[2:]).sum(2)
  results = [
      np.einsum("bnts,bnsh->bnth", p, v),
      SCALE * np.einsum("bnts,bnsh->bnth", ds, k),
      of_groups(SCALE * np.einsum("bnts,bnth->bnsh", ds, q)),
      of_groups(np.einsum("bnts,bnth->bnsh", p, dout))]
  return results + [ds.sum(0)] if bias else results


def attend(name: str, mask: masks.Mask, q: jax.Array, k: jax.Array,
           v: jax.Array, *bias: jax.Array) -> jax.Array:
  return FORMS[name](q, k, v, mask, *bias, scale=SCALE)


@functools.partial(jax.jit, static_argnums=0)
def out_and_gradients(name: str, mask: masks.Mask,
                      inputs: list[jax.Array], dout: jax.Array):
  out, pull = jax.vjp(functools.partial(attend, name, mask), *inputs)
  return out, *pull(dout)


@functools.partial(jax.jit, static_argnums=0)
def gradients_and_reach(name: str, mask: masks.Mask,
                        inputs: list[jax.Array], dout: jax.Array,
                        queries: np.ndarray):
  """The same; and whether the output of each of some queries has a gradient
  in each key, and in each value: [B, queries, S]."""
  out, pull = jax.vjp(functools.partial(attend, name, mask), *inputs)

  def of_query(t):
    _, dk, dv, *_ = pull(jnp.where(
        (jnp.arange(out.shape[2]) == t)[:, None], dout, 0.0))
    return (dk != 0).any((1, 3)), (dv != 0).any((1, 3))
  return (out, *pull(dout)), jax.vmap(of_query, out_axes=1)(queries)


# --- The formula -------------------------------------------------------------


@pytest.mark.parametrize("name, case", PAIRS)
def test_values_and_gradients_are_the_formulas(name: str, case: str) -> None:
  """And gradients reach what is seen and nothing else, with strict zeros:
  not later tokens, other documents, or what lies out of reach."""
  length = 130  # three blocks of 64, the last one of two
  inputs, dout = heads(CASES[case], length)
  queries = np.array([0, 1, 38, 39, 40, 62, 63, 64, 77, 80, 127, 128, 129])
  got, (of_key, of_value) = gradients_and_reach(
      name, CASES[case].mask(length), inputs, dout, queries)
  for x, expected in zip(got, by_hand(CASES[case], length), strict=True):
    assert x.dtype == jnp.float32 and x.shape == expected.shape
    np.testing.assert_allclose(x, expected, atol=2e-5)
  seen = CASES[case].sees(length)[:, queries]
  np.testing.assert_array_equal(of_value, seen)
  # A query's only key gets weight 1 whatever it is.
  assert not np.any(np.asarray(of_key) & ~seen)
  several = seen & (seen.sum(-1, keepdims=True) > 1)
  assert np.all(np.asarray(of_key)[several])


# Around the sizes of blocks (64, and 128 from 257 on), and far from them.
@pytest.mark.parametrize("name, case, length", [
    *(("blocks", "causal", n) for n in (1, 63, 64, 65, 256)),
    *(("blocks", case, 300) for case in (
        "packed causal", "wide window both ways", "packed cross")),
    ("banded", "window", 1), ("banded", "window", 65),
    ("banded", "window both ways", 8),
    ("banded", "wide window both ways", 300)])
def test_any_length_will_do(name: str, case: str, length: int) -> None:
  inputs, dout = heads(CASES[case], length)
  got = out_and_gradients(name, CASES[case].mask(length), inputs, dout)
  for x, expected in zip(got, by_hand(CASES[case], length), strict=True):
    np.testing.assert_allclose(x, expected, atol=5e-5)


@pytest.mark.parametrize("name, case", [
    ("reference", "causal"), ("blocks", "packed causal"),
    ("blocks", "packed window"), ("blocks", "cross"),
    ("dot_product", "packed causal"), ("dot_product", "packed bias"),
    ("banded", "packed window")])
def test_bfloat16_is_as_close_as_its_eight_bits(name: str, case: str) -> None:
  length = 65
  inputs, dout = heads(CASES[case], length, "bfloat16")
  got = out_and_gradients(name, CASES[case].mask(length), inputs, dout)
  for x, given, expected in zip(
      got, [inputs[0], *inputs], by_hand(CASES[case], length, "bfloat16"),
      strict=True):
    assert x.dtype == given.dtype
    error = np.abs(np.asarray(x, np.float64) - expected).max()
    # A few roundings of 2^-9 on sums of this size; wrong is of order 1.
    assert error < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("name", FORMS)
def test_large_scores_do_not_overflow(name: str) -> None:
  """Scores of some hundreds: each row is then nearly one of the values."""
  case, length = CASES["window"], 70
  inputs, dout = heads(case, length, scale=40.0)
  got = out_and_gradients(name, case.mask(length), inputs, dout)
  assert all(bool(jnp.isfinite(x).all()) for x in got)
  q, k, v = (np.asarray(x) for x in inputs)
  scores = SCALE * np.einsum("bnth,bnsh->bnts", q, k)
  scores = np.where(case.sees(length)[:, None], scores, -np.inf)
  best = np.take_along_axis(v, scores.argmax(-1)[..., None], axis=2)
  ordered = np.sort(scores, -1)
  clear = ordered[..., -1] - ordered[..., -2] > 100
  assert clear.mean() > 0.5
  np.testing.assert_allclose(np.asarray(got[0])[clear], best[clear], atol=1e-3)


@pytest.mark.parametrize("name", FORMS)
def test_a_query_that_sees_nothing_gets_numbers(name: str) -> None:
  """And takes nothing from the others, which see what they saw."""
  case, length = Case(window=10, packed=True), 40
  inputs, dout = heads(case, length)
  mask = case.mask(length)
  alone = mask.replace(segments=mask.segments.copy())
  alone.segments[:, 20] = 9
  got = out_and_gradients(name, alone, inputs, dout)
  assert all(bool(jnp.isfinite(x).all()) for x in got)
  rest = np.arange(length) != 20
  np.testing.assert_allclose(np.asarray(got[0])[:, :, rest],
                             by_hand(case, length)[0][:, :, rest], atol=2e-5)


# --- Memory ------------------------------------------------------------------


def largest(jaxpr) -> int:
  """Elements of the largest array that a computation makes on its way."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [x.aval.size for x in equation.outvars]
    for value in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda x: isinstance(x, (jax.extend.core.Jaxpr,
                                         jax.extend.core.ClosedJaxpr))):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        sizes.append(largest(inner))
  return max(sizes)


@pytest.mark.parametrize("name, factor", [
    ("banded", 3), ("dot_product", 3), ("blocks", 3), ("reference", None)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_needs_no_square_of_scores(
    name: str, factor: int | None, causal: bool) -> None:
  """Forwards and backwards: at most `factor` windows for each token."""
  length, window = 2048, 128
  x = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
  mask = masks.Mask(causal=causal, window=window)
  made = largest(jax.make_jaxpr(functools.partial(out_and_gradients, name))(
      mask, [x, x, x], x).jaxpr)
  if factor is None:
    assert made >= length ** 2  # so that the measure itself is known to work
  else:
    assert made <= factor * length * window


def test_blocks_compute_nothing_that_causality_excludes() -> None:
  """Products: of T^2 pairs, half and the diagonal's blocks."""
  length, size = 1024, 128

  def products(mask):
    x = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
    text = str(jax.make_jaxpr(functools.partial(attend, "blocks"))(
        mask, x, x, x))
    return sum(f"f32[1,{size},{keys}] = dot_general" in text
               for keys in range(size, length + 1, size)), text.count(
                   f"f32[1,{size},{length}] = dot_general")
  assert products(masks.Mask(causal=True)) == (8, 1)
  assert products(masks.Mask()) == (1, 8)


# --- The module --------------------------------------------------------------


def model(**fields: object) -> config_lib.ModelConfig:
  return config_lib.complete_model(config_lib.ModelConfig(**dict(
      family="gpt2", d_model=16, num_layers=1, num_heads=4, num_kv_heads=2,
      vocab_size=8, init_std=0.4) | fields))


def module_and_inputs(length: int, batch: int = 4, **fields: object):
  module = attention.Attention(model(**fields), "cpu", causal=True)
  random = np.random.default_rng(1)
  x = random.standard_normal((batch, length, 16)).astype(np.float32)
  context = layers.Context(
      segments=np.tile(segments(length), (batch // 2, 1)),
      prefix=np.arange(batch, dtype=np.int32) * 5)
  params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))
  return module, params, x, context


def module_gradients(module: attention.Attention) -> Callable:
  def loss(params, x, context, local):
    out = module.apply(params, x, context, None, local)
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()
  return jax.value_and_grad(loss, (0, 1))


@pytest.mark.parametrize("name", ["blocks", "dot_product"])
def test_two_devices_compute_what_one_does(name: str) -> None:
  """Documents, prefixes and grouped heads are cut with the batch."""
  module, params, x, context = module_and_inputs(
      70, attention=name, window=12)
  run = jax.jit(module_gradients(module), static_argnums=3)
  alone = run(params, x, context, True)
  mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1, 1, 1),
              sharding.MESH_AXES)
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.rules()):
    cut = jax.tree.map(lambda a: jax.device_put(
        a, jax.NamedSharding(mesh, P("data"))), (x, context))
    # Another function: jit would find the one without a mesh.
    shared = jax.jit(module_gradients(module), static_argnums=3)
    text = shared.lower(params, *cut, True).as_text()
    spread = shared(params, *cut, True)
  assert ("shard_map" in text or "manual_computation" in text) == (
      name == "blocks")
  assert spread[1][1].sharding.spec[0] == "data"
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=2e-5), alone, jax.device_get(spread))


@pytest.mark.parametrize("name, positions", [
    ("reference", "learned"), ("blocks", "rotary"), ("dot_product", "rotary")])
def test_a_traced_choice_of_the_window_is_the_plain_one(
    name: str, positions: str) -> None:
  module, params, x, context = module_and_inputs(
      30, batch=2, attention=name, window=6, positions=positions,
      rotary_base_local=50.0 if positions == "rotary" else None)
  traced = jax.jit(module_gradients(module))
  plain = jax.jit(module_gradients(module), static_argnums=3)
  values = []
  for local in (True, False):
    expected = plain(params, x, context, local)
    values.append(expected[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        traced(params, x, context, jnp.array(local)), expected)
  assert abs(values[0] - values[1]) > 1e-2


@pytest.mark.parametrize("causal", [True, False])
def test_the_relative_bias_is_the_row_of_each_distance(causal: bool) -> None:
  """In a decoder all buckets are for keys behind; in an encoder half are."""
  config = model(family="t5", relative_buckets=8, relative_distance=16,
                 init_std=0.02)
  table = np.random.default_rng(0).standard_normal((8, 4)).astype("f4")
  places = np.array([3, 4, 11])  # as with a cache, not from 0 on
  got = attention.RelativeBias(config, causal).apply(
      {"params": {"embedding": table}}, places, 12)
  assert got.shape == (4, 3, 12)
  buckets = layers.relative_buckets(12, 8, 16, bidirectional=not causal)
  for i, t in enumerate(places):
    for s in range(12):
      np.testing.assert_array_equal(
          got[:, i, s], table[buckets[s - t + 11]])


def test_scores_are_scaled_or_not() -> None:
  module, params, x, context = module_and_inputs(10, batch=2)
  scaled = module.apply(params, x, context)
  plain = attention.Attention(model(scale_scores=False), "cpu", causal=True)
  params["params"]["query"] = jax.tree.map(
      lambda a: a / 2, params["params"]["query"])  # sqrt(head_dim 4)
  np.testing.assert_allclose(plain.apply(params, x, context), scaled,
                             atol=1e-5)
