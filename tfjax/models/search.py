# SPDX-License-Identifier: Apache-2.0
"""How the next tokens are chosen: greedily, by sampling, or by beam search.

Here are the settings of generation and, given logits, the choice; what makes
the logits is in decoding.py. A search (`Samples`, `Beams`) is what has been
chosen so far, `advance` appends a token to every sequence.

Shape letters: B batch, M beams, R rows of the decoder (B M), C candidates,
G new tokens, V vocabulary.
"""

import dataclasses
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from tfjax import schema

# What a beam that must not be chosen is set back by.
_OUT = -1e9


class GenerationError(ValueError):
  """What cannot be generated; the message names the setting or the prompt."""

  def __init__(self, key: str, problem: str):
    super().__init__(f"{key}: {problem}")
    self.key = key


@dataclasses.dataclass(frozen=True)
class Settings:
  """How tokens are chosen.

  Attributes:
    max_new_tokens: at most so many a prompt, a stop token included.
    num_beams: sequences that beam search keeps; 1: none is searched.
    temperature: of the distribution to sample from; None or 0: the likeliest
      token is taken (greedy).
    top_k: sample from so many of the likeliest tokens.
    top_p: sample from the fewest likeliest tokens that hold this much
      probability (nucleus: Holtzman et al. 2020), of those that top_k leaves.
    length_penalty: beams are ranked by log-probability / length ** this; the
      larger, the longer the answers.
    early_stopping: when beam search ends, with num_beams sequences finished.
      True: at once. False: when the best running beam, ranked as if it ended
      now, is not above the worst finished. "never": likewise, but ranked as
      if it ended at its best length, max_new_tokens with a penalty above 0.
    stop_tokens: any of them ends a sequence, and is its last token.
    pad_token: fills up ended sequences, and what the model does not see.
    start_token: an encoder-decoder's first decoder token.
    prefix_lm: the model sees a prompt whole, as one that is trained with
      objective.prefix_lm does.
    seed: of the sampling.
  """

  max_new_tokens: int
  num_beams: int = 1
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  length_penalty: float = 1.0
  early_stopping: bool | str = False
  stop_tokens: tuple[int, ...] = ()
  pad_token: int = 0
  start_token: int | None = None
  prefix_lm: bool = False
  seed: int = 0

  def __post_init__(self) -> None:
    check("max_new_tokens", self.max_new_tokens, int, schema.at_least(1))
    check("num_beams", self.num_beams, int, schema.at_least(1))
    check("length_penalty", self.length_penalty, float)
    check("pad_token", self.pad_token, int, schema.at_least(0))
    check("seed", self.seed, int, schema.within(0, 2**32 - 1))
    for key, kind, valid in (
        ("temperature", float, schema.at_least(0)),
        ("top_k", int, schema.at_least(1)),
        ("top_p", float, schema.within(1e-6, 1)),
        ("start_token", int, schema.at_least(0))):
      if getattr(self, key) is not None:
        check(key, getattr(self, key), kind, valid)
    if not isinstance(self.stop_tokens, tuple):
      raise GenerationError("stop_tokens", "must be a tuple of token ids, not "
                            f"{self.stop_tokens!r}")
    for token in self.stop_tokens:
      check("stop_tokens", token, int, schema.at_least(0))
    if self.early_stopping not in (True, False, "never"):
      raise GenerationError("early_stopping", "must be True, False or 'never', "
                            f"not {self.early_stopping!r}")
    if self.num_beams > 1 and self.samples:
      raise GenerationError("temperature", "beam search does not sample; leave "
                            "it unset, or set num_beams to 1")
    for key in () if self.samples else ("top_k", "top_p"):
      if getattr(self, key) is not None:
        raise GenerationError(key, "is for sampling; set a temperature")
    for key, default in (("length_penalty", 1.0), ("early_stopping", False)):
      if self.num_beams == 1 and getattr(self, key) != default:
        raise GenerationError(key, "is for beam search; set num_beams above 1")

  @property
  def samples(self) -> bool:
    return bool(self.temperature)


def check(key: str, value: Any, kind: type,
          valid: schema.Check | None = None) -> None:
  """Raises unless the value is of the kind, finite and valid."""
  kinds = (int, float) if kind is float else kind
  if isinstance(value, bool) or not isinstance(value, kinds) or (
      not math.isfinite(value)):
    name = "a number" if kind is float else "a whole number"
    raise GenerationError(key, f"must be {name}, not {value!r}")
  if valid and (problem := valid(value)):
    raise GenerationError(key, f"{problem}, not {value!r}")


def _is_stop(settings: Settings, tokens: Array) -> Array:
  return jnp.isin(tokens, jnp.array(settings.stop_tokens, jnp.int32))


# --- Greedy and sampling -----------------------------------------------------


@struct.dataclass
class Samples:
  """One sequence a prompt."""

  tokens: Int[Array, "B G"]
  lengths: Int[Array, "B"]
  scores: Float[Array, "B"]
  done: Bool[Array, "B"]

  @classmethod
  def start(cls, settings: Settings, batch: int) -> "Samples":
    return cls(
        jnp.full((batch, settings.max_new_tokens), settings.pad_token),
        jnp.zeros(batch, jnp.int32), jnp.zeros(batch), jnp.zeros(batch, bool))

  def last(self, step: Array) -> Int[Array, "B"]:
    return jax.lax.dynamic_index_in_dim(self.tokens, step - 1, 1, False)

  def ended(self) -> Bool[Array, ""]:
    return self.done.all()

  def best(self) -> tuple[Array, Array, Array]:
    return self.tokens, self.lengths, self.scores

  def advance(self, settings: Settings, step: Array, logits_BV: Array,
              key: Array) -> tuple["Samples", None]:
    if settings.samples:
      values, tokens = candidates(logits_BV, settings)
      chosen = jax.random.categorical(key, values)
      token_B = jnp.take_along_axis(tokens, chosen[:, None], 1)[:, 0]
    else:
      token_B = _likeliest(logits_BV)
    score_B = jnp.take_along_axis(logits_BV, token_B[:, None], 1)[:, 0] - (
        jax.nn.logsumexp(logits_BV, -1))
    token_B = jnp.where(self.done, settings.pad_token, token_B)
    return self.replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(
            self.tokens, token_B[:, None], step, 1),
        lengths=self.lengths + ~self.done,
        scores=self.scores + jnp.where(self.done, 0.0, score_B),
        done=self.done | _is_stop(settings, token_B)), None


def candidates(
    logits_BV: Float[Array, "B V"], settings: Settings,
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
  """The tokens that may be sampled and their logits; -inf: not this one."""
  logits_BV = logits_BV / settings.temperature
  vocab = logits_BV.shape[-1]
  if settings.top_k is None and settings.top_p is None:
    return logits_BV, jnp.broadcast_to(jnp.arange(vocab), logits_BV.shape)
  values_BC, tokens_BC = jax.lax.top_k(
      logits_BV, min(settings.top_k or vocab, vocab))
  if settings.top_p is not None:
    p_BC = jax.nn.softmax(values_BC, -1)
    before_BC = jnp.cumsum(p_BC, -1) - p_BC
    values_BC = jnp.where(before_BC < settings.top_p, values_BC, -jnp.inf)
  return values_BC, tokens_BC


def _likeliest(logits_BV: Array) -> Array:
  """argmax, the first of equals, in two reductions that a CPU vectorises."""
  vocab = logits_BV.shape[-1]
  best_B1 = logits_BV.max(-1, keepdims=True)
  return jnp.where(logits_BV == best_B1, jnp.arange(vocab), vocab).min(-1)


# --- Beam search -------------------------------------------------------------


@struct.dataclass
class Beams:
  """Running beams, best first, and the best that have ended so far.

  Attributes:
    tokens, scores: of running beams; scores are log-probabilities.
    ended_tokens, ended_lengths, ended_scores: likewise, best first; scores are
      over length ** length_penalty.
    is_ended: which of these there are yet.
    improvable: a running beam of the row may still get in there.
    over: all have ended.
  """

  tokens: Int[Array, "B M G"]
  scores: Float[Array, "B M"]
  ended_tokens: Int[Array, "B M G"]
  ended_lengths: Int[Array, "B M"]
  ended_scores: Float[Array, "B M"]
  is_ended: Bool[Array, "B M"]
  improvable: Bool[Array, "B"]
  over: Bool[Array, ""]

  @classmethod
  def start(cls, settings: Settings, batch: int) -> "Beams":
    shape = (batch, settings.num_beams)
    tokens = jnp.full((*shape, settings.max_new_tokens), settings.pad_token)
    # All beams are the prompt: only the first of them may be continued.
    scores = jnp.full(shape, _OUT).at[:, 0].set(0.0)
    return cls(tokens, scores, tokens, jnp.zeros(shape, jnp.int32),
               jnp.full(shape, _OUT), jnp.zeros(shape, bool),
               jnp.ones(batch, bool), jnp.array(False))

  def last(self, step: Array) -> Int[Array, "R"]:
    return jax.lax.dynamic_index_in_dim(
        self.tokens, step - 1, 2, False).reshape(-1)

  def ended(self) -> Bool[Array, ""]:
    return self.over

  def best(self) -> tuple[Array, Array, Array]:
    return (self.ended_tokens[:, 0], self.ended_lengths[:, 0],
            self.ended_scores[:, 0])

  def advance(self, settings: Settings, step: Array, logits_RV: Array,
              key: Array) -> tuple["Beams", Array]:
    """The best continuations of all beams; which beams they continue.

    The order of events is that of transformers' beam search, whose output
    this equals: https://huggingface.co/docs/transformers/generation_strategies
    """
    del key
    batch, beams = self.scores.shape
    vocab = logits_RV.shape[-1]
    scores_BMV = jax.nn.log_softmax(logits_RV).reshape(
        batch, beams, vocab) + self.scores[..., None]
    # So many that, whatever of them are stop tokens, enough beams run on.
    count = max(2, 1 + len(settings.stop_tokens)) * beams
    score_BC, index_BC = jax.lax.top_k(scores_BMV.reshape(batch, -1), count)
    parent_BC, token_BC = index_BC // vocab, index_BC % vocab
    tokens_BCG = _take(self.tokens, parent_BC).at[:, :, step].set(token_BC)
    ends_BC = _is_stop(settings, token_BC) | (
        step + 1 == settings.max_new_tokens)

    running_BM, kept_BM = jax.lax.top_k(
        score_BC + _OUT * ends_BC, beams)

    # Only the best `num_beams` candidates may end; the others were reserves.
    may_end_BC = ends_BC & (jnp.arange(count) < beams)
    may_end_BC &= self.improvable[:, None]
    if settings.early_stopping is True:
      may_end_BC &= ~self.is_ended.all(1, keepdims=True)
    penalties = jnp.asarray(np.arange(1.0, settings.max_new_tokens + 1) **
                            settings.length_penalty, jnp.float32)
    ended_scores, chosen_BM = jax.lax.top_k(jnp.concatenate(
        [self.ended_scores, score_BC / penalties[step] + _OUT * ~may_end_BC],
        1), beams)

    def merged(old, new):
      return _take(jnp.concatenate([old, new], 1), chosen_BM)
    is_ended = merged(self.is_ended, may_end_BC)
    hopeful = settings.early_stopping == "never" and settings.length_penalty > 0
    best_B1 = running_BM[:, :1] / penalties[-1 if hopeful else step]
    worst_BM = jnp.where(is_ended, ended_scores.min(1, keepdims=True), _OUT)
    improvable = self.improvable & (best_B1 > worst_BM).any(1)
    over = ~improvable.any() | ends_BC.all()
    if settings.early_stopping is True:
      over |= is_ended.all()
    parent_BM = _take(parent_BC, kept_BM)
    return Beams(
        tokens=_take(tokens_BCG, kept_BM), scores=running_BM,
        ended_tokens=merged(self.ended_tokens, tokens_BCG),
        ended_lengths=merged(self.ended_lengths, jnp.broadcast_to(
            step + 1, token_BC.shape)),
        ended_scores=ended_scores, is_ended=is_ended, improvable=improvable,
        over=over), (
            parent_BM + beams * jnp.arange(batch)[:, None]).reshape(-1)


def _take(x: Array, index_BM: Array) -> Array:
  """Of each row of the batch the entries with these numbers."""
  return jax.vmap(lambda row, index: row[index])(x, index_BM)
