# SPDX-License-Identifier: Apache-2.0
"""Generation: what follows a prompt, answers a source, or fills a mask.

`generate` serves decoders and encoder-decoders, `fill_mask` lone encoders. The
tokens of a batch are padded to a bucket, a power of two, so that one compiled
program serves every length within it; decoders' prompts are padded on the left,
so that all rows go on at one place of the cache.

Shape letters: B batch, R rows of the decoder (batch x beams), T prompt length,
S places of the cache or the source, G new tokens, P masked positions,
K answers, V vocabulary.
"""

import dataclasses
import functools
import time
from typing import Any, Sequence

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from tfjax import config as config_lib
from tfjax import schema
from tfjax.models import inputs as inputs_lib
from tfjax.models import layers
from tfjax.models import search
from tfjax.models import transformer

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Generated:
  """New tokens of each prompt, without the prompt.

  Attributes:
    tokens: `lengths` of a row are its own, the rest is padding.
    lengths: a stop token counts.
    scores: natural logarithm of the tokens' probability under the model
      (whatever they were sampled from); of beam search what it ranks by, that
      over length ** length_penalty.
    prefill_seconds: the prompts (or sources), and the first new token.
    decode_seconds: the other tokens. Both hold what had to be compiled.
  """

  tokens: Int[np.ndarray, "B G"]
  lengths: Int[np.ndarray, "B"]
  scores: Float[np.ndarray, "B"]
  prefill_seconds: float
  decode_seconds: float

  def rows(self) -> list[list[int]]:
    """Each prompt's own new tokens."""
    return [row[:length].tolist()
            for row, length in zip(self.tokens, self.lengths)]


@dataclasses.dataclass(frozen=True)
class Filled:
  """The likeliest tokens at a mask, best first, and their probabilities."""

  position: int
  tokens: tuple[int, ...]
  probabilities: tuple[float, ...]


def generate(
    module: transformer.Transformer,
    params: dict,
    prompts: Sequence[Sequence[int]],
    settings: search.Settings,
    *,
    sharding: jax.sharding.Sharding | None = None,
) -> Generated:
  """Continues prompts, or answers sources if there is an encoder.

  Compiled once for each model, settings (but the seed), number of prompts and
  bucket of their longest. `sharding` lays the batch over devices; parameters
  stay where they are.

  Raises:
    GenerationError: a prompt or a setting does not fit the model.
  """
  return _run(module, params, prompts, settings, sharding,
              settings.max_new_tokens)


def warm_up(
    module: transformer.Transformer,
    params: dict,
    prompts: Sequence[Sequence[int]],
    settings: search.Settings,
    *,
    sharding: jax.sharding.Sharding | None = None,
) -> float:
  """Compiles what `generate` will use; returns the seconds that it took."""
  begin = time.perf_counter()
  _run(module, params, prompts, settings, sharding, 2)
  return time.perf_counter() - begin


def bucket(length: int) -> int:
  """The length that so many tokens are padded to."""
  return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _run(module: transformer.Transformer, params: dict,
         prompts: Sequence[Sequence[int]], settings: search.Settings,
         sharding: jax.sharding.Sharding | None, limit: int) -> Generated:
  """`generate`, ended after `limit` tokens."""
  _check_model(module.config, settings)
  longest = _check_prompts(module.config, prompts)
  decoder = module.config.architecture == "decoder"
  size = bucket(longest)
  if module.config.positions == "learned":
    size = min(size, module.config.context_length)
    # The last new token is not read again; the start token is.
    before = longest if decoder else 1
    if before + settings.max_new_tokens - 1 > module.config.context_length:
      raise search.GenerationError(
          "max_new_tokens", f"{settings.max_new_tokens} after {before} "
          "token(s) do not fit model.context_length "
          f"{module.config.context_length}; the model has no positions beyond")
  inputs = _padded(prompts, size, settings.pad_token, left=decoder)
  if sharding is not None:
    inputs = jax.device_put(inputs, sharding)
  # The seed is data: another one is no other program.
  static = dataclasses.replace(settings, seed=0)
  key = jax.random.key(settings.seed)
  begin = time.perf_counter()
  state = jax.block_until_ready(_prefill(module, static, params, inputs, key))
  middle = time.perf_counter()
  state = jax.block_until_ready(
      _continue(module, static, params, state, key, limit))
  end = time.perf_counter()
  tokens, lengths, scores = (np.asarray(x) for x in state.search.best())
  return Generated(tokens, lengths, scores, middle - begin, end - middle)


def _padded(prompts: Sequence[Sequence[int]], size: int, pad: int,
            left: bool) -> inputs_lib.Inputs:
  """The prompts as one batch; padding is of segment 0."""
  tokens = np.full((len(prompts), size), pad, np.int32)
  segments = np.zeros_like(tokens)
  for row, prompt in enumerate(prompts):
    place = slice(size - len(prompt), None) if left else slice(len(prompt))
    tokens[row, place], segments[row, place] = prompt, 1
  positions = np.maximum(np.cumsum(segments, 1) - 1, 0, dtype=np.int32)
  return inputs_lib.Inputs(tokens, segments, positions)


# --- The program -------------------------------------------------------------


@struct.dataclass
class _State:
  """What one step hands to the next.

  Attributes:
    step: new tokens that have been chosen.
    cache: keys and values.
    seen: segments of all places of the cache: 0 is padding, which no token
      sees. Causality hides what is not written yet.
    memory_segments: the source's, of an encoder-decoder.
    positions: of each row's first new token.
    search: what has been chosen.
  """

  step: Int[Array, ""]
  cache: Any
  seen: Int[Array, "R S"]
  memory_segments: Int[Array, "R S"] | None
  positions: Int[Array, "R"]
  search: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(module: transformer.Transformer, settings: search.Settings,
             params: dict, inputs: inputs_lib.Inputs, key: Array) -> _State:
  """Reads the prompts and chooses the first token."""
  module, params = _unrolled(module, params)
  batch = inputs.tokens.shape[0]
  memory = memory_segments = None
  if module.config.architecture == "encoder_decoder":
    memory_segments = inputs.segments
    memory = module.apply({"params": params}, inputs, method="encode")
    tokens = jnp.full((batch, 1), settings.start_token, jnp.int32)
    inputs = inputs_lib.Inputs(tokens, jnp.ones_like(tokens),
                               jnp.zeros_like(tokens))
  prefix_B = None
  if settings.prefix_lm:
    prefix_B = jnp.full(batch, inputs.tokens.shape[1], jnp.int32)
  seen = jnp.pad(inputs.segments, ((0, 0), (0, settings.max_new_tokens - 1)),
                 constant_values=1)
  logits_BV, cache = _forward(
      module, params, {}, inputs.tokens, layers.Context(
          segments=inputs.segments, positions=inputs.positions,
          prefix=prefix_B, memory=memory,
          memory_segments=memory_segments, start=jnp.int32(0),
          key_segments=seen))
  state = _State(jnp.int32(0), cache, seen, memory_segments,
                 inputs.positions[:, -1] + 1, None)
  if settings.num_beams == 1:
    return _choose(settings, state.replace(
        search=search.Samples.start(settings, batch)), logits_BV, key)
  state, logits_RV = jax.tree.map(
      lambda x: jnp.repeat(x, settings.num_beams, 0) if x.ndim else x,
      (state, logits_BV))
  return _choose(settings, state.replace(
      search=search.Beams.start(settings, batch)), logits_RV, key)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _continue(module: transformer.Transformer, settings: search.Settings,
              params: dict, state: _State, key: Array,
              limit: Int[Array, ""]) -> _State:
  """Chooses the other tokens, as long as a sequence goes on."""
  module, params = _unrolled(module, params)
  prompt = state.seen.shape[1] - (settings.max_new_tokens - 1)

  def go_on(state):
    return (state.step < limit) & ~state.search.ended()

  def step(state):
    tokens_R1 = state.search.last(state.step)[:, None]
    # The newest token, of index step - 1, is behind those of the prompt.
    index = state.step - 1
    logits_RV, cache = _forward(
        module, params, state.cache, tokens_R1, layers.Context(
            segments=jnp.ones_like(tokens_R1),
            positions=(state.positions + index)[:, None],
            memory_segments=state.memory_segments, start=prompt + index,
            key_segments=state.seen))
    return _choose(settings, state.replace(cache=cache), logits_RV, key)
  return jax.lax.while_loop(go_on, step, state)


def _unrolled(module: transformer.Transformer, params: dict) -> tuple[
    transformer.Transformer, dict]:
  """The model with a block a layer: a scan would copy the cache each step."""
  config = module.config
  if config.scan_layers:
    params = transformer.unstack_layers(params, config)
  return module.clone(config=dataclasses.replace(
      config, scan_layers=False, remat="none")), params


def _forward(module: transformer.Transformer, params: dict, cache: Any,
             tokens: Array, context: layers.Context) -> tuple[Array, Any]:
  """Logits of the token after the last, and the cache with these in it."""
  def run(module):
    return module.logits(module.decode(tokens, context)[:, -1:])[:, 0]
  logits_RV, changed = module.apply(
      {"params": params, "cache": cache}, method=run, mutable=["cache"])
  return logits_RV, changed["cache"]


def _choose(settings: search.Settings, state: _State, logits_RV: Array,
            key: Array) -> _State:
  """Appends a token to every sequence."""
  chosen, parents = state.search.advance(
      settings, state.step, logits_RV, jax.random.fold_in(key, state.step))
  cache = state.cache
  if parents is not None:
    # A beam's keys and values are those of the beam that it continues. The
    # memory's are the same for all beams.
    cache = jax.tree_util.tree_map_with_path(
        lambda path, x: x if any(
            part.key == "cross_attention" for part in path) else x[parents],
        cache)
  return state.replace(step=state.step + 1, cache=cache, search=chosen)


# --- Masks -------------------------------------------------------------------


def fill_mask(
    module: transformer.Transformer,
    params: dict,
    prompts: Sequence[Sequence[int]],
    mask_token: int,
    *,
    top_k: int = 5,
) -> list[list[Filled]]:
  """The likeliest tokens at every mask of each prompt, in order.

  Raises:
    GenerationError: a prompt does not fit the model or has no mask.
  """
  config = module.config
  if config.architecture != "encoder":
    raise search.GenerationError(
        "fill_mask", "is for lone encoders; a model of architecture "
        f"{config.architecture!r} generates")
  longest = _check_prompts(config, prompts)
  search.check("top_k", top_k, int, schema.within(1, config.vocab_size))
  masks = [[i for i, token in enumerate(prompt) if token == mask_token]
           for prompt in prompts]
  if not all(masks):
    raise search.GenerationError(
        f"prompt {masks.index([])}", f"has no mask token ({mask_token})")
  size = bucket(longest)
  if config.positions == "learned":
    size = min(size, config.context_length)
  places = np.zeros((len(prompts), bucket(max(map(len, masks)))), np.int32)
  for row, mask in zip(places, masks):
    row[:len(mask)] = mask
  # Padding is not seen: any token will do.
  values_BPK, tokens_BPK = (np.asarray(x) for x in _fill(
      module, top_k, params, _padded(prompts, size, mask_token, left=False),
      places))
  return [[Filled(place, tuple(tokens_BPK[i, j].tolist()),
                  tuple(values_BPK[i, j].tolist()))
           for j, place in enumerate(mask)] for i, mask in enumerate(masks)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fill(module: transformer.Transformer, top_k: int, params: dict,
          inputs: inputs_lib.Inputs, places_BP: Array) -> tuple[Array, Array]:
  def run(module):
    hidden_BTD = module.hidden(inputs)
    return module.logits(jnp.take_along_axis(
        hidden_BTD, places_BP[..., None], 1))
  logits_BPV = module.apply({"params": params}, method=run)
  return jax.lax.top_k(jax.nn.softmax(logits_BPV, -1), top_k)


# --- Checks ------------------------------------------------------------------


def _check_model(config: config_lib.ModelConfig,
                 settings: search.Settings) -> None:
  if config.architecture == "encoder":
    raise search.GenerationError(
        "model", "an encoder generates nothing; fill_mask is what it does")
  if (settings.start_token is None) == (
      config.architecture == "encoder_decoder"):
    raise search.GenerationError(
        "start_token", "is an encoder-decoder's first decoder token, and must "
        f"be set for one alone; the architecture is {config.architecture!r}")
  if settings.prefix_lm and config.architecture != "decoder":
    raise search.GenerationError(
        "prefix_lm", "is for decoders; an encoder-decoder sees its source "
        "whole as it is")
  used = {"pad_token": (settings.pad_token,),
          "start_token": (settings.start_token or 0,),
          "stop_tokens": settings.stop_tokens}
  for key, tokens in used.items():
    if max(tokens, default=0) >= config.vocab_size:
      raise search.GenerationError(
          key, f"{max(tokens)} is not below the vocabulary's size "
          f"{config.vocab_size}")
  others = config.vocab_size - len(settings.stop_tokens)
  if 1 < settings.num_beams > others:
    raise search.GenerationError(
        "num_beams", f"{settings.num_beams} beams cannot start with as many "
        f"tokens: the vocabulary has {others} that do not stop")


def _check_prompts(config: config_lib.ModelConfig,
                   prompts: Sequence[Sequence[int]]) -> int:
  """Returns the length of the longest."""
  if not prompts:
    raise search.GenerationError("prompts", "there are none")
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise search.GenerationError(
          f"prompt {i}", "is empty; give it at least one token, such as the "
          "separator")
    wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
    if wrong:
      raise search.GenerationError(
          f"prompt {i}", f"token {wrong[0]} is not below the vocabulary's size "
          f"{config.vocab_size}")
    if config.positions == "learned" and len(prompt) > config.context_length:
      raise search.GenerationError(
          f"prompt {i}", f"{len(prompt)} tokens do not fit "
          f"model.context_length {config.context_length}")
  return max(map(len, prompts))
