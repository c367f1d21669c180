# SPDX-License-Identifier: Apache-2.0
"""Examples in batches, as a function of the step.

An example is a window of text, or a pair of source and target where the store
holds those. Window i of a split is tokens [i T, i T + T + 1), so that no token
is predicted in two windows. Which windows form a batch depends on the shuffle
seed and the step alone; there is no state to save, and a host reads its own
rows of a batch whose content does not depend on the number of hosts.

Shapes: B examples a step over all hosts, L of them on this one, T context, S
source.
"""

from collections.abc import Sequence
import hashlib
from typing import NamedTuple

import grain
import numpy as np

from tfjax import config as config_lib
from tfjax.data import store as store_lib

# grain computes each place of an order when it is read, in no memory, by
# walking through a domain of at least 2^16: a millisecond a place when the
# order is very short. Shorter orders are therefore drawn whole.
_SHORT_ORDER = 1 << 16


class Pairs(NamedTuple):
  """int32 [L, S] and [L, T]: each side with its end, then -1, no token."""

  source: np.ndarray
  target: np.ndarray


class TextWindows:
  """The windows of a stream; what is left at its end is not used."""

  def __init__(self, tokens: np.ndarray, context_length: int):
    self._tokens = tokens
    self._context_length = context_length
    self.num_tokens = len(self) * context_length

  def __len__(self) -> int:
    return windows(len(self._tokens), self._context_length)

  def read(self, window_L: Sequence[int]) -> np.ndarray:
    """int32 [L, T + 1]."""
    starts_L1 = np.asarray(window_L, np.int64)[:, None] * self._context_length
    return self._tokens[
        starts_L1 + np.arange(self._context_length + 1)].astype(np.int32)


class PairWindows:
  """The pairs of a stream, each side ended by the separator, then cut.

  What is cut has lost its end too: a target that goes on does not teach a
  model to stop.

  Attributes:
    num_tokens: in all pairs as they are read, with ends, without padding.
    cut_sources, cut_targets: sides that are too long.
  """

  def __init__(self, tokens: np.ndarray, separator: int, source_length: int,
               target_length: int):
    self._tokens = tokens
    self._separator = separator
    self._lengths = (source_length, target_length)
    starts = np.flatnonzero(tokens == separator) + 1
    sizes = np.diff(starts, append=len(tokens) + 1)  # ends included
    self._start_W2 = starts.reshape(-1, 2)
    self._size_W2 = sizes.reshape(-1, 2)
    self.num_tokens = int(np.minimum(self._size_W2, self._lengths).sum())
    self.cut_sources, self.cut_targets = (
        self._size_W2 > self._lengths).sum(0).tolist()

  def __len__(self) -> int:
    return len(self._start_W2)

  def read(self, window_L: Sequence[int]) -> Pairs:
    return Pairs(*(self._side(np.asarray(window_L), side) for side in (0, 1)))

  def _side(self, window_L: np.ndarray, side: int) -> np.ndarray:
    place = np.arange(self._lengths[side])
    start_L1 = self._start_W2[window_L, side, None]
    size_L1 = self._size_W2[window_L, side, None]
    # The last text of the stream has nothing behind it.
    index = np.minimum(start_L1 + place, len(self._tokens) - 1)
    tokens = self._tokens[index].astype(np.int32)
    tokens[place == size_L1 - 1] = self._separator
    tokens[place >= size_L1] = -1
    return tokens


def windows(num_tokens: int, context_length: int) -> int:
  """How many windows a stream of text holds."""
  return max(0, (num_tokens - 1) // context_length)


def open_windows(
    store: store_lib.TokenStore, split: str, context_length: int,
    source_length: int | None = None) -> TextWindows | PairWindows:
  """The examples of "train" or "validation"; source_length is for pairs, and
  by default context_length.

  Raises:
    ConfigError: the split is shorter than a window.
  """
  tokens = getattr(store, split)
  if store.pairs:
    return PairWindows(tokens, store.separator_id,
                       source_length or context_length, context_length)
  if windows(len(tokens), context_length) == 0:
    name = {"train": "training"}.get(split, split)
    remedy = (" or raise data.validation_fraction"
              if split == "validation" else "")
    raise config_lib.ConfigError(
        "model.context_length", f"a window of {context_length} + 1 tokens is "
        f"longer than the {name} split, which has {len(tokens):,}; use at most "
        f"{len(tokens) - 1}, more text{',' * bool(remedy)}{remedy}")
  return TextWindows(tokens, context_length)


class Batches:
  """batches[step]: int32 [L, T + 1] or pairs, epoch after epoch without end.

  Attributes:
    rows: of the batch over all hosts, those that are read here.
  """

  def __init__(self, windows: TextWindows | PairWindows, *, used: int,
               shuffle_seed: int, batch_size: int, rows: Sequence[int]):
    self.rows = rows
    self._windows = windows
    self._used = used  # windows, the first of the first epoch's order
    self._shuffle_seed = shuffle_seed
    self._batch_size = batch_size
    self._first = _permutation(len(windows), shuffle_seed, 0)
    self._later: dict[int, Sequence[int]] = {}

  def __getitem__(self, step: int) -> np.ndarray | Pairs:
    if step < 0:
      raise IndexError(f"there is no step {step}")
    first = int(step) * self._batch_size
    return self._windows.read([self._window(first + r) for r in self.rows])

  def _window(self, place: int) -> int:
    """The window at a place in the endless sequence of epochs."""
    epoch, index = divmod(place, self._used)
    if epoch:
      if epoch not in self._later:
        # A batch may lie across two epochs, and no step needs more.
        self._later = {e: order for e, order in self._later.items()
                       if e == epoch - 1}
        self._later[epoch] = _permutation(
            self._used, self._shuffle_seed, epoch)
      index = self._later[epoch][index]
    return self._first[index]


def training_batches(
    store: store_lib.TokenStore,
    data: config_lib.DataConfig,
    *,
    context_length: int,
    batch_size: int,
    source_length: int | None = None,
    rows: Sequence[int] | None = None,
) -> Batches:
  """The batches of a run, of which this host reads `rows` (None: all).

  The first epoch goes through the windows in one order that the seed
  determines for the whole split; data.unique_tokens is a prefix of it, as is
  every shorter run. Each later epoch has an order of its own.

  Raises:
    ConfigError: the split is shorter than a window or than
      data.unique_tokens.
  """
  found = open_windows(store, "train", context_length, source_length)
  return Batches(
      found, used=used_windows(found, data.unique_tokens),
      shuffle_seed=data.shuffle_seed, batch_size=batch_size,
      rows=range(batch_size) if rows is None else rows)


def used_windows(found: TextWindows | PairWindows,
                 unique_tokens: int | None) -> int:
  """As many of the windows as hold `unique_tokens`; None: all.

  Of pairs this is the mean's worth: which ones a seed picks does not matter.
  """
  if unique_tokens is None:
    return len(found)
  if unique_tokens > found.num_tokens:
    raise config_lib.ConfigError(
        "data.unique_tokens", f"{unique_tokens:,} is more than the "
        f"{found.num_tokens:,} tokens in the {len(found):,} examples of the "
        "training split; set that or less, or None for all")
  return -(-unique_tokens * len(found) // found.num_tokens)


class EvaluationBatches(Sequence[tuple[np.ndarray | Pairs, np.ndarray]]):
  """Tuples of int32 [L, T + 1] or pairs, and float32 [L], their weights."""

  def __init__(self, windows: TextWindows | PairWindows, window_W: np.ndarray,
               batch_size: int, rows: Sequence[int]):
    self._windows = windows
    self._window_W = window_W
    self._batch_size = batch_size
    self._rows = rows

  def __len__(self) -> int:
    return -(-len(self._window_W) // self._batch_size)

  def __getitem__(self, index: int
                  ) -> tuple[np.ndarray | Pairs, np.ndarray]:
    place_L = self._places(index)
    real_L = place_L < len(self._window_W)
    return (self._windows.read(self.windows(index)),
            real_L.astype(np.float32))

  def windows(self, index: int) -> np.ndarray:
    """Which windows of the split a batch holds, [L]."""
    # Padding repeats the last window, at weight 0.
    return self._window_W[
        np.minimum(self._places(index), len(self._window_W) - 1)]

  def _places(self, index: int) -> np.ndarray:
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} is not among the {len(self)}")
    return index * self._batch_size + np.asarray(self._rows)


def evaluation_batches(
    store: store_lib.TokenStore,
    *,
    context_length: int,
    batch_size: int,
    tokens: int | None = None,
    source_length: int | None = None,
    rows: Sequence[int] | None = None,
) -> EvaluationBatches:
  """The held-out windows in order, or `tokens` of them, spread evenly.

  `tokens` is rounded up to whole windows; all are used when there are fewer.

  Raises:
    ConfigError: the split is shorter than a window.
  """
  found = open_windows(store, "validation", context_length, source_length)
  used = used_windows(found, min(tokens or found.num_tokens, found.num_tokens))
  window_W = np.arange(used) * len(found) // used
  return EvaluationBatches(
      found, window_W, batch_size,
      range(batch_size) if rows is None else rows)


def _permutation(length: int, shuffle_seed: int, epoch: int) -> Sequence[int]:
  """A random order of range(length) for an epoch of a run."""
  digest = hashlib.blake2b(f"{shuffle_seed} {epoch}".encode(), digest_size=4)
  seed = int.from_bytes(digest.digest(), "little")
  if length <= _SHORT_ORDER:
    return np.random.default_rng(seed).permutation(length)
  return grain.MapDataset.range(length).shuffle(seed=seed)
