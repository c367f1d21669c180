# SPDX-License-Identifier: Apache-2.0
"""The tokens that objectives and models speak of: the tokenizer's and others.

An objective may need tokens that the tokenizer lacks (a mask, sentinels).
They get the ids after the tokenizer's own, so that a store does not depend on
the objective, and one store serves all.
"""

import dataclasses

from jaxtyping import Bool, Int
import numpy as np

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.data import tokenizers

_WHITE_SPACE = (b" ", b"\t", b"\n", b"\r", b"\f", b"\v")
_FULL_STOPS = (b".", b"!", b"?")


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """Ids by their role, and what is known of every id. V is `size`.

  Attributes:
    size: rows that the embedding needs.
    separator: precedes each document, and ends each source and target.
    pad: fills up; the separator where the tokenizer has no token for it.
    start: the decoder's first input.
    mask: what a masked token or an infilled span becomes; None: not needed.
    sentinels: of the corrupted spans, in order.
    special: ids that stand for no text; never masked, never drawn.
    token_bytes: UTF-8 bytes that an id stands for, where the tokenizer gives
      back every text exactly; else None.
    word_starts: a word starts with this id: it begins with white space, or
      special; None where the tokenizer does not tell.
    sentence_ends: its text ends with a full stop, ! or ?; None likewise.
  """

  size: int
  separator: int
  pad: int
  start: int
  mask: int | None
  sentinels: tuple[int, ...]
  special: Bool[np.ndarray, "V"]
  token_bytes: Int[np.ndarray, "V"] | None
  word_starts: Bool[np.ndarray, "V"] | None
  sentence_ends: Bool[np.ndarray, "V"] | None


def of(config: config_lib.ExperimentConfig,
       tokenizer: tokenizers.Tokenizer) -> Vocabulary:
  """The vocabulary of an experiment on a tokenizer's tokens."""
  separator, size = tokenizer.separator_id, tokenizer.vocab_size
  mask, sentinels = None, []
  if _needs_mask(config.objective):
    mask = tokenizer.mask_id
    if mask is None:
      mask, size = size, size + 1
  if count := _num_sentinels(config):
    sentinels = tokenizer.sentinel_ids[:count]
    lacking = count - len(sentinels)
    sentinels += range(size, size + lacking)
    size += lacking
  pad = separator if tokenizer.pad_id is None else tokenizer.pad_id
  special = np.zeros(size, bool)
  special[tokenizer.vocab_size:] = True
  special[list(tokenizer.special_ids)] = True
  token_bytes = word_starts = sentence_ends = None
  texts = tokenizer.texts()
  if texts is not None:
    texts += [b""] * (size - len(texts))
    word_starts = special | np.array([t[:1] in _WHITE_SPACE for t in texts])
    sentence_ends = np.array([t.endswith(_FULL_STOPS) for t in texts])
    if tokenizer.is_exact:
      token_bytes = np.array([len(t) for t in texts], np.int32)
  return Vocabulary(
      size=size, separator=separator, pad=pad,
      # Models with sentinels of their own (T5) start with padding.
      start=pad if tokenizer.sentinel_ids else separator,
      mask=mask, sentinels=tuple(sentinels), special=special,
      token_bytes=token_bytes, word_starts=word_starts,
      sentence_ends=sentence_ends)


def size(config: config_lib.ExperimentConfig) -> int:
  """The `size` that the vocabulary will have, known before there is a store.

  Raises:
    ConfigError: the tokenizer's directory cannot be used, or a window is too
      short for the objective.
  """
  settings = config.data.tokenizer
  if settings.kind == "directory":
    return of(config, tokenizers.from_directory(settings)).size
  return (tokenizers.vocab_size(settings) + _needs_mask(config.objective) +
          _num_sentinels(config))


def _needs_mask(objective: config_lib.ObjectiveConfig) -> bool:
  return objective.name == "masked" or (
      objective.name == "seq2seq" and objective.corruption == "infilling")


def _num_sentinels(config: config_lib.ExperimentConfig) -> int:
  objective = config.objective
  if objective.name != "seq2seq" or objective.corruption != "spans":
    return 0
  return lengths_lib.noise_spans(objective, config.model.context_length)[1]
