# SPDX-License-Identifier: Apache-2.0
"""Generation: the cache, the choice of tokens, padding, masks."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.models import decoding
from tfjax.models import inputs as inputs_lib
from tfjax.models import layers
from tfjax.models import search
from tfjax.models import transformer

VOCAB = 37
SHAPE = dict(d_model=16, num_layers=2, num_heads=4, d_ff=24, vocab_size=VOCAB,
             context_length=48)
# Every kind of decoder: positions, windows, shared keys, tied heads or not.
DECODERS = {
    "gpt2": dict(family="gpt2", tie_embedding=False),
    "gpt3": dict(family="gpt3", window=3),
    "llama": dict(family="llama", num_kv_heads=2),
    "local": dict(family="llama", window=4, global_every=2,
                  rotary_base_local=50.0),
    "relative": dict(family="gpt2", positions="relative"),
    "transformer": dict(family="transformer", tie_embedding=False),
    "t5": dict(family="t5", relative_buckets=8, relative_distance=12,
               tie_embedding=False),
    "bart": dict(family="bart"),
}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [30]]


@functools.cache
def model(name: str, **changes) -> tuple[transformer.Transformer, dict]:
  """A model with random weights, large enough for decided outputs."""
  config = config_lib.complete_model(config_lib.ModelConfig(
      **SHAPE | DECODERS[name] | changes))
  module = transformer.create(config)
  random = np.random.default_rng(1)
  return module, jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.float32(0.5 * random.standard_normal(x.shape) +
                                  (path[-1].key == "scale")),
      nn.meta.unbox(transformer.abstract_parameters(module)))


@functools.cache
def apply(module: transformer.Transformer):
  """The model without generation, compiled once a shape."""
  return jax.jit(lambda params, inputs: module.apply(
      {"params": params}, inputs))


def settings(module: transformer.Transformer, **fields) -> search.Settings:
  start = 2 if module.config.architecture == "encoder_decoder" else None
  return search.Settings(
      **dict(max_new_tokens=7, start_token=start) | fields)


def full_logits(module: transformer.Transformer, params: dict,
                prompts: list[list[int]], new: np.ndarray) -> np.ndarray:
  """Logits that each of the `new` tokens is chosen by, without a cache and
  with the padding on the right."""
  tokens = np.zeros((len(prompts), 16 + new.shape[1]), np.int32)
  if module.config.architecture == "encoder_decoder":
    source, segments = np.zeros((2, len(prompts), 16), np.int32)
    for row, prompt in enumerate(prompts):
      source[row, :len(prompt)], segments[row, :len(prompt)] = prompt, 1
    before = [1] * len(prompts)
    tokens[:, 0] = 2
    inputs = inputs_lib.Inputs(
        tokens, np.ones_like(tokens),
        source=inputs_lib.Inputs(source, segments))
  else:
    before = [len(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
      tokens[row, :len(prompt)] = prompt
    inputs = inputs_lib.Inputs(tokens)
  for row, start in enumerate(before):
    tokens[row, start:start + new.shape[1]] = new[row]
  logits = np.asarray(apply(module)(params, inputs))
  return np.stack([row[start - 1:start - 1 + new.shape[1]]
                   for row, start in zip(logits, before)])


def test_a_prefix_is_read_whole() -> None:
  """Greedy tokens against the whole forward pass with the prompt as prefix."""
  module, params = model("gpt2")
  made = decoding.generate(module, params, PROMPTS, search.Settings(
      max_new_tokens=4, prefix_lm=True))
  causal = decoding.generate(module, params, PROMPTS, search.Settings(
      max_new_tokens=4))
  assert not np.array_equal(made.scores, causal.scores)
  for row, prompt in enumerate(PROMPTS):
    tokens = np.array([[*prompt, *made.tokens[row]]], np.int32)
    logits = np.asarray(apply(module)(params, inputs_lib.Inputs(
        tokens, prefix=np.array([len(prompt)], np.int32))))
    np.testing.assert_array_equal(
        logits[0, len(prompt) - 1:-1].argmax(-1), made.tokens[row])


@pytest.mark.parametrize("name", DECODERS)
def test_the_cache_changes_no_logits(name: str) -> None:
  """Token by token, with left padding, against the whole at once."""
  module, params = model(name)
  steps = 6
  new = np.random.default_rng(0).integers(0, VOCAB, (3, steps)).astype(np.int32)
  expected = full_logits(module, params, PROMPTS, new)
  tokens, segments = np.zeros((2, 3, 11), np.int32)
  context = dict()
  if module.config.architecture == "encoder_decoder":
    source = np.zeros_like(tokens)
    memory_segments = np.zeros_like(tokens)
    for row, prompt in enumerate(PROMPTS):
      source[row, :len(prompt)], memory_segments[row, :len(prompt)] = prompt, 1
    memory = jax.jit(functools.partial(module.apply, method="encode"))(
        {"params": params}, inputs_lib.Inputs(source, memory_segments))
    context = dict(memory=memory, memory_segments=memory_segments)
    tokens, segments = np.full((3, 1), 2, np.int32), np.ones((3, 1), np.int32)
  else:
    for row, prompt in enumerate(PROMPTS):
      tokens[row, -len(prompt):], segments[row, -len(prompt):] = prompt, 1
  length = tokens.shape[1]
  positions = np.maximum(segments.cumsum(1) - 1, 0)
  seen = np.concatenate([segments, np.ones_like(new)], 1)

  @jax.jit
  def run(cache, tokens, context):
    return module.apply(
        {"params": params, "cache": cache}, mutable=["cache"],
        method=lambda m: m.logits(m.decode(tokens, context))[:, -1])
  logits, changed = run({}, tokens, layers.Context(
      segments=segments, positions=positions, start=jnp.int32(0),
      key_segments=seen, **context))
  context.pop("memory", None)
  for i in range(steps):
    np.testing.assert_allclose(logits, expected[:, i], atol=3e-5, rtol=1e-4)
    logits, changed = run(changed["cache"], new[:, i:i + 1], layers.Context(
        segments=np.ones((3, 1), np.int32),
        positions=positions[:, -1:] + 1 + i, start=jnp.int32(length + i),
        key_segments=seen, **context))


@pytest.mark.parametrize("name", ["gpt2", "local", "t5"])
def test_greedy_takes_the_likeliest_and_scores_it(name: str) -> None:
  module, params = model(name)
  made = decoding.generate(module, params, PROMPTS, settings(module))
  logits = full_logits(module, params, PROMPTS, made.tokens)
  np.testing.assert_array_equal(logits.argmax(-1), made.tokens)
  assert np.unique(made.tokens).size >= 5
  chosen = np.take_along_axis(
      np.asarray(jax.nn.log_softmax(logits)), made.tokens[..., None], 2)
  np.testing.assert_allclose(made.scores, chosen.sum((1, 2)), rtol=1e-4)
  assert made.lengths.tolist() == [7, 7, 7]


def test_beam_search_of_all_beams_finds_the_best() -> None:
  """37 beams, 2 tokens of a vocabulary of 37: all pairs are searched."""
  module, params = model("gpt2")
  made = decoding.generate(module, params, PROMPTS[:2], settings(
      module, max_new_tokens=2, num_beams=VOCAB, length_penalty=2.0))
  for row, prompt in enumerate(PROMPTS[:2]):
    tokens = np.array([[*prompt, first, 0] for first in range(VOCAB)], np.int32)
    tokens = np.pad(tokens, ((0, 0), (0, 13 - tokens.shape[1])))
    logs = np.asarray(jax.nn.log_softmax(apply(module)(
        params, inputs_lib.Inputs(tokens))))[:, len(prompt) - 1:]
    pairs = logs[0, 0][:, None] + logs[:, 1]
    best = np.unravel_index(pairs.argmax(), pairs.shape)
    assert made.tokens[row].tolist() == list(best)
    assert made.scores[row] == pytest.approx(pairs.max() / 2 ** 2, rel=1e-5)


def beam_search(table: np.ndarray, settings: search.Settings) -> tuple[
    list[int], float]:
  """One row by hand: table[t, i, j] is log p(j) at step t after token i, and
  token 2 comes first."""
  beams, length = settings.num_beams, settings.max_new_tokens
  running, ended = [(0.0, [])], []
  for step in range(1, length + 1):
    candidates = sorted(
        ((score + log_p, [*tokens, token]) for score, tokens in running
         for token, log_p in enumerate(table[step - 1, (tokens or [2])[-1]])),
        reverse=True)[:beams * (1 + len(settings.stop_tokens))]
    ends = [step == length or tokens[-1] in settings.stop_tokens
            for _, tokens in candidates]
    ended += [(score / step ** settings.length_penalty, tokens)
              for (score, tokens), end in zip(candidates[:beams], ends) if end]
    ended = sorted(ended, reverse=True)[:beams]
    running = [c for c, end in zip(candidates, ends) if not end][:beams]
    if len(ended) == beams and running:
      ahead = (length if settings.early_stopping == "never" and
               settings.length_penalty > 0 else step)
      if settings.early_stopping is True or ended[-1][0] >= (
          running[0][0] / ahead ** settings.length_penalty):
        break
  return ended[0][1], ended[0][0]


@pytest.mark.parametrize("fields", [
    dict(), dict(early_stopping=True), dict(length_penalty=2.0),
    dict(length_penalty=2.0, early_stopping="never"),
    dict(length_penalty=-0.5, stop_tokens=(0, 5))])
def test_beam_search_by_hand(fields: dict) -> None:
  """64 chains whose likeliest sequences are long and short."""
  how = search.Settings(**dict(
      max_new_tokens=9, num_beams=3, stop_tokens=(0,), pad_token=6) | fields)
  logits = np.random.default_rng(0).normal(0, 1.5, (64, 9, 7, 7))
  tables = np.asarray(jax.nn.log_softmax(logits))

  @jax.jit
  def run(tables):
    def step(i, beams):
      last = jnp.where(i == 0, 2, beams.last(i)).reshape(64, 3)
      rows = jnp.take_along_axis(tables[:, i], last[..., None], 1)
      after, _ = beams.advance(how, i, rows.reshape(-1, 7), None)
      return jax.tree.map(lambda a, b: jnp.where(beams.over, a, b), beams,
                          after)
    return jax.lax.fori_loop(0, 9, step, search.Beams.start(how, 64)).best()
  tokens, lengths, scores = (np.asarray(x) for x in run(tables))
  assert len(set(lengths.tolist())) > 1
  for row, table in enumerate(tables):
    expected, score = beam_search(table, how)
    assert tokens[row].tolist() == expected + [6] * (9 - len(expected))
    assert lengths[row] == len(expected)
    assert scores[row] == pytest.approx(score, rel=1e-5)


def test_one_beam_is_greedy() -> None:
  settings_1 = search.Settings(max_new_tokens=5, stop_tokens=(3,))
  logits = np.random.default_rng(0).standard_normal((5, 2, 9)).astype("f")
  logits[:, :, 3] = -9.0
  logits[2, 0, 3] = 9.0

  @jax.jit
  def run(search, logits):
    for step in range(5):
      search, _ = search.advance(settings_1, jnp.int32(step), logits[step],
                                 jax.random.key(0))
    return search.best()
  greedy, one = (run(kind.start(settings_1, 2), logits)
                 for kind in (search.Samples, search.Beams))
  np.testing.assert_array_equal(greedy[0], one[0])
  np.testing.assert_array_equal(greedy[1], [3, 5])
  np.testing.assert_array_equal(greedy[1], one[1])
  np.testing.assert_allclose(greedy[2] / greedy[1], one[2], rtol=1e-6)


# --- Padding, stops, programs ------------------------------------------------


@pytest.mark.parametrize("name, beams", [("gpt2", 1), ("t5", 3)])
def test_others_in_the_batch_change_nothing(name: str, beams: int) -> None:
  module, params = model(name)
  how = settings(module, num_beams=beams)
  longer = list(range(20))  # another bucket
  together = decoding.generate(module, params, [*PROMPTS, longer], how)
  assert len({tuple(row) for row in together.rows()}) == 4
  for row, prompt in enumerate(PROMPTS[:2]):
    alone = decoding.generate(module, params, [prompt], how)
    assert alone.rows()[0] == together.rows()[row]
    assert alone.scores[0] == pytest.approx(together.scores[row], rel=1e-4)


def test_a_stop_token_ends_a_row_and_is_its_last() -> None:
  module, params = model("gpt2")
  free = decoding.generate(module, params, PROMPTS, settings(module))
  stops = (int(free.tokens[0, 2]), int(free.tokens[1, 4]))
  made = decoding.generate(module, params, PROMPTS, settings(
      module, stop_tokens=stops, pad_token=36))
  for row, (tokens, length) in enumerate(zip(made.tokens, made.lengths)):
    places = [i for i, t in enumerate(free.tokens[row]) if t in stops]
    assert length == (places[0] + 1 if places else 7)
    assert tokens[:length].tolist() == free.tokens[row, :length].tolist()
    assert set(tokens[length:].tolist()) <= {36}
  assert made.lengths[0] <= 3
  assert made.rows()[0] == made.tokens[0, :made.lengths[0]].tolist()


def test_nothing_is_computed_once_all_rows_have_ended() -> None:
  module, params = model("gpt2")
  how = settings(module, max_new_tokens=30, stop_tokens=tuple(range(VOCAB)))
  inputs = decoding._padded(PROMPTS, 16, 0, left=True)
  key = jax.random.key(0)
  state = decoding._prefill(module, how, params, inputs, key)
  assert int(decoding._continue(module, how, params, state, key, 30).step) == 1


def test_one_program_for_all_lengths_of_a_bucket_and_all_seeds() -> None:
  assert [decoding.bucket(n) for n in (1, 16, 17, 32, 33)] == [
      16, 16, 32, 32, 64]
  module, params = model("gpt2")

  def programs():
    return (decoding._prefill._cache_size(), decoding._continue._cache_size())

  def run(length, seed):
    decoding.generate(module, params, [[1] * length, [2], [3]], settings(
        module, temperature=9.0, seed=seed))
  run(16, 0)
  before = programs()
  for length, seed in ((1, 0), (2, 1), (9, 2), (16, 3)):
    run(length, seed)
  assert programs() == before
  run(17, 0)
  assert programs() == (before[0] + 1, before[1] + 1)


def test_learned_positions_are_used_to_the_last() -> None:
  """The bucket of 33 is 64, the model has 48 positions."""
  module, params = model("gpt2")
  prompt = [i % VOCAB for i in range(33)]
  how = settings(module, max_new_tokens=16)
  made = decoding.generate(module, params, [prompt], how)
  tokens = np.array([prompt + made.tokens[0, :-1].tolist()], np.int32)
  logits = apply(module)(params, inputs_lib.Inputs(tokens))
  assert tokens.shape == (1, 48)
  np.testing.assert_array_equal(np.asarray(logits)[:, 32:].argmax(-1),
                                made.tokens)
  with pytest.raises(search.GenerationError, match="17 after 33 token"):
    decoding.generate(module, params, [prompt], settings(
        module, max_new_tokens=17))


@pytest.mark.parametrize("name", ["gpt3", "t5"])
def test_scanned_layers_generate_the_same(name: str) -> None:
  module, params = model(name)
  scanned, _ = model(name, scan_layers=True)
  made = decoding.generate(
      scanned, transformer.stack_layers(params, module.config), PROMPTS,
      settings(module))
  expected = decoding.generate(module, params, PROMPTS, settings(module))
  np.testing.assert_array_equal(made.tokens, expected.tokens)


def test_eight_devices_share_a_batch() -> None:
  module, params = model("t5")
  mesh = jax.make_mesh((8,), ("data",), axis_types=(
      jax.sharding.AxisType.Auto,))
  prompts = [[i, i + 1, i + 2][:1 + i % 3] for i in range(16)]
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  made = decoding.generate(module, jax.device_put(params, everywhere), prompts,
                           settings(module), sharding=rows)
  expected = decoding.generate(module, params, prompts, settings(module))
  np.testing.assert_array_equal(made.tokens, expected.tokens)


# --- Sampling ----------------------------------------------------------------

PROBABILITIES = np.array([[0.05, 0.4, 0.15, 0.3, 0.1]], np.float32)


@pytest.mark.parametrize("fields, kept", [
    (dict(), {0, 1, 2, 3, 4}),
    (dict(top_k=1), {1}),
    (dict(top_k=3), {1, 3, 2}),
    (dict(top_k=9), {0, 1, 2, 3, 4}),
    (dict(top_p=0.39), {1}),  # the first is always kept
    (dict(top_p=0.6), {1, 3}),
    (dict(top_p=0.71), {1, 3, 2}),  # 0.4 + 0.3 do not reach it
    (dict(top_p=1.0), {0, 1, 2, 3, 4}),
    # Of the three that top_k leaves 0.4 / 0.85 are 0.47, with 0.3 0.82.
    (dict(top_k=3, top_p=0.8), {1, 3}),
    # At temperature 0.5 probabilities go by their squares: 0.58, 0.33, 0.08.
    (dict(top_p=0.85, temperature=0.5), {1, 3}),
    (dict(top_p=0.92, temperature=0.5), {1, 3, 2}),
])
def test_candidates_by_hand(fields: dict, kept: set[int]) -> None:
  how = search.Settings(**dict(max_new_tokens=1, temperature=1.0) | fields)
  values, tokens = search.candidates(np.log(PROBABILITIES), how)
  assert set(tokens[0, np.isfinite(values[0])].tolist()) == kept
  p = np.asarray(jax.nn.softmax(values))[0]
  by_hand = PROBABILITIES[0, tokens[0]] ** (1 / how.temperature)
  by_hand = np.where(np.isfinite(values[0]), by_hand, 0)
  np.testing.assert_allclose(p, by_hand / by_hand.sum(), rtol=1e-5)


@pytest.mark.parametrize("fields", [
    dict(temperature=8.0), dict(temperature=8.0, top_k=4, top_p=0.8)])
def test_samples_follow_the_distribution(fields: dict) -> None:
  module, params = model("gpt2")
  draws = 1 << 12
  made = decoding.generate(module, params, [PROMPTS[0]] * draws, settings(
      module, max_new_tokens=1, **fields))
  logits = full_logits(module, params, PROMPTS[:1], made.tokens[:1])[:, 0]
  values, tokens = search.candidates(logits, settings(module, **fields))
  expected = np.zeros(VOCAB)
  expected[np.asarray(tokens[0])] = np.asarray(jax.nn.softmax(values))[0]
  share = np.bincount(made.tokens[:, 0], minlength=VOCAB) / draws
  assert np.all(share[expected == 0] == 0)
  assert 1 < (expected > 0.02).sum()
  # Five standard deviations of a share, the largest being 1 / 2 sqrt(draws).
  np.testing.assert_allclose(share, expected, atol=2.5 / draws ** 0.5)
  # What is scored is the model's own distribution.
  np.testing.assert_allclose(
      made.scores, np.asarray(jax.nn.log_softmax(logits))[0, made.tokens[:, 0]],
      rtol=1e-3, atol=1e-4)


def test_the_seed_decides() -> None:
  module, params = model("gpt2")
  one, two, other = (decoding.generate(module, params, PROMPTS, settings(
      module, temperature=9.0, seed=seed)).tokens for seed in (5, 5, 6))
  np.testing.assert_array_equal(one, two)
  assert not np.array_equal(one, other)
  # Rows of one prompt differ, and so do a row's steps.
  same = decoding.generate(module, params, [[1]] * 3, settings(
      module, temperature=9.0)).tokens
  assert len({tuple(row) for row in same}) == 3 and len(set(same[0])) > 3


# --- Masks -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_masks_are_filled_with_the_likeliest(family: str) -> None:
  config = config_lib.complete_model(config_lib.ModelConfig(
      family=family, **SHAPE))
  module = transformer.create(config)
  random = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: jnp.float32(random.standard_normal(x.shape)),
      nn.meta.unbox(transformer.abstract_parameters(module)))
  mask = 36
  prompts = [[1, mask, 3, 4, mask, mask], [mask, 2]]
  made = decoding.fill_mask(module, params, prompts, mask, top_k=3)
  for prompt, filled in zip(prompts, made):
    # Padding is to be hidden: here there is none.
    logits = apply(module)(params, inputs_lib.Inputs(np.array([prompt])))
    p = np.asarray(jax.nn.softmax(logits))[0]
    assert [one.position for one in filled] == [
        i for i, token in enumerate(prompt) if token == mask]
    for one in filled:
      order = np.argsort(-p[one.position])[:3]
      assert one.tokens == tuple(order.tolist())
      np.testing.assert_allclose(one.probabilities, p[one.position, order],
                                 rtol=1e-3)
  with pytest.raises(search.GenerationError, match="prompt 1: has no mask"):
    decoding.fill_mask(module, params, [[mask], [1]], mask)
  with pytest.raises(search.GenerationError, match="model: an encoder"):
    decoding.generate(module, params, prompts,
                      search.Settings(max_new_tokens=1))


# --- What is refused ---------------------------------------------------------


@pytest.mark.parametrize("fields, message", [
    (dict(max_new_tokens=0), "max_new_tokens: must be at least 1, not 0"),
    (dict(max_new_tokens=1.5), "max_new_tokens: must be a whole number"),
    (dict(num_beams=True), "num_beams: must be a whole number, not True"),
    (dict(temperature=-1.0), "temperature: must be at least 0"),
    (dict(temperature=float("nan")), "temperature: must be a number"),
    (dict(temperature=1.0, top_k=0), "top_k: must be at least 1"),
    (dict(temperature=1.0, top_p=1.1), "top_p: must lie between"),
    (dict(top_p=0.9), "top_p: is for sampling; set a temperature"),
    (dict(temperature=0, top_k=2), "top_k: is for sampling"),
    (dict(num_beams=2, temperature=1.0), "temperature: beam search does not"),
    (dict(length_penalty=2.0), "length_penalty: is for beam search"),
    (dict(early_stopping=True), "early_stopping: is for beam search"),
    (dict(num_beams=2, early_stopping="late"), "early_stopping: must be True"),
    (dict(stop_tokens=[3]), "stop_tokens: must be a tuple"),
    (dict(stop_tokens=(-3,)), "stop_tokens: must be at least 0"),
    (dict(seed=-1), "seed: must lie between"),
])
def test_settings_that_cannot_be(fields: dict, message: str) -> None:
  with pytest.raises(search.GenerationError, match=message):
    search.Settings(**dict(max_new_tokens=3) | fields)


@pytest.mark.parametrize("name, prompts, fields, message", [
    ("gpt2", [], {}, "prompts: there are none"),
    ("gpt2", [[1], []], {}, "prompt 1: is empty"),
    ("gpt2", [[1, 37]], {}, "prompt 0: token 37 is not"),
    ("gpt2", [[1] * 49], {}, "prompt 0: 49 tokens do not fit"),
    ("gpt2", [[1]], dict(stop_tokens=(1, 40)), "stop_tokens: 40 is not below"),
    ("gpt2", [[1]], dict(pad_token=37), "pad_token: 37 is not below"),
    ("gpt2", [[1]], dict(start_token=1), "start_token: is an encoder-decoder"),
    ("t5", [[1]], dict(start_token=None), "start_token: is an encoder-decoder"),
    ("t5", [[1]], dict(prefix_lm=True), "prefix_lm: is for decoders"),
    ("bart", [[1]], dict(max_new_tokens=49), "max_new_tokens: 49 after 1 "),
    ("gpt2", [[1]], dict(num_beams=36, stop_tokens=(1, 2)), "num_beams: 36 "),
])
def test_what_does_not_fit_the_model(
    name: str, prompts: list, fields: dict, message: str) -> None:
  module, params = model(name)
  with pytest.raises(search.GenerationError, match=message):
    decoding.generate(module, params, prompts, settings(module, **fields))
