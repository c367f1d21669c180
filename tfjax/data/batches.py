# SPDX-License-Identifier: Apache-2.0
"""Token windows in batches, as a function of the step.

Window i of a split is tokens [i T, i T + T + 1): T inputs and T targets, so
that no target occurs in two windows. Which windows form a batch depends on the
shuffle seed and the step alone; there is no state to save, and a host reads
its own rows of a batch whose content does not depend on the number of hosts.

Shapes: B sequences a step over all hosts, L of them on this one, T context.
"""

from collections.abc import Sequence
import hashlib

import grain
import numpy as np

from tfjax import config as config_lib
from tfjax.data import store as store_lib

# grain computes each place of an order when it is read, in no memory, by
# walking through a domain of at least 2^16: a millisecond a place when the
# order is very short. Shorter orders are therefore drawn whole.
_SHORT_ORDER = 1 << 16


def windows(num_tokens: int, context_length: int) -> int:
  """How many windows a stream holds; what is left at its end is not used."""
  return max(0, (num_tokens - 1) // context_length)


class Batches(Sequence[np.ndarray]):
  """batches[step]: int32 [L, T + 1], for 0 <= step < len(batches)."""

  def __init__(self, tokens: np.ndarray, context_length: int, *,
               num_windows: int, used: int, shuffle_seed: int,
               batch_size: int, rows: range, num_steps: int):
    self._tokens = tokens
    self._context_length = context_length
    self._used = used  # windows, the first of the first epoch's order
    self._shuffle_seed = shuffle_seed
    self._batch_size = batch_size
    self._rows = rows
    self._num_steps = num_steps
    self._first = _permutation(num_windows, shuffle_seed, 0)
    self._later: dict[int, Sequence[int]] = {}

  def __len__(self) -> int:
    return self._num_steps

  def __getitem__(self, step: int) -> np.ndarray:
    if not 0 <= step < len(self):
      raise IndexError(f"step {step} is not among the {len(self)} steps")
    first = int(step) * self._batch_size
    return _gather(self._tokens, [self._window(first + r) for r in self._rows],
                   self._context_length)

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
    num_steps: int,
    host_index: int = 0,
    num_hosts: int = 1,
) -> Batches:
  """The batches of a run, of which this host reads its rows.

  The first epoch goes through the windows in one order that the seed
  determines for the whole split; data.unique_tokens is a prefix of it, as is
  every shorter run. Each later epoch has an order of its own.

  Raises:
    ConfigError: the split is shorter than a window or than
      data.unique_tokens, or the hosts do not divide the batch.
  """
  num_windows = _checked_windows(store.train_tokens, context_length, "training")
  rows = _host_rows(batch_size, host_index, num_hosts, "train.batch_size")
  used = num_windows
  if data.unique_tokens is not None:
    used = -(-data.unique_tokens // context_length)
    if used > num_windows:
      raise config_lib.ConfigError(
          "data.unique_tokens", f"{data.unique_tokens:,} is more than the "
          f"{num_windows * context_length:,} tokens in the {num_windows:,} "
          f"windows of {context_length} of the training split; set that or "
          "less, or None for all")
  return Batches(
      store.train, context_length, num_windows=num_windows, used=used,
      shuffle_seed=data.shuffle_seed, batch_size=batch_size, rows=rows,
      num_steps=num_steps)


class EvaluationBatches(Sequence[tuple[np.ndarray, np.ndarray]]):
  """Pairs of int32 [L, T + 1] and float32 [L], the weight of each sequence."""

  def __init__(self, tokens: np.ndarray, window_W: np.ndarray,
               context_length: int, batch_size: int, rows: range):
    self._tokens = tokens
    self._window_W = window_W
    self._context_length = context_length
    self._batch_size = batch_size
    self._rows = rows

  def __len__(self) -> int:
    return -(-len(self._window_W) // self._batch_size)

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} is not among the {len(self)}")
    place_L = index * self._batch_size + np.asarray(self._rows)
    real_L = place_L < len(self._window_W)
    # Padding repeats the last window, at weight 0.
    place_L = np.minimum(place_L, len(self._window_W) - 1)
    tokens = _gather(self._tokens, self._window_W[place_L],
                     self._context_length)
    return tokens, real_L.astype(np.float32)


def evaluation_batches(
    store: store_lib.TokenStore,
    *,
    context_length: int,
    batch_size: int,
    tokens: int | None = None,
    host_index: int = 0,
    num_hosts: int = 1,
) -> EvaluationBatches:
  """The held-out windows in order, or `tokens` of them, spread evenly.

  `tokens` is rounded up to whole windows; all are used when there are fewer.

  Raises:
    ConfigError: the split is shorter than a window, or the hosts do not divide
      the batch.
  """
  num_windows = _checked_windows(
      store.validation_tokens, context_length, "validation")
  used = num_windows
  if tokens is not None:
    used = min(used, -(-tokens // context_length))
  window_W = np.arange(used) * num_windows // used
  return EvaluationBatches(
      store.validation, window_W, context_length, batch_size,
      _host_rows(batch_size, host_index, num_hosts, "evaluation.batch_size"))


def _checked_windows(num_tokens: int, context_length: int, split: str) -> int:
  found = windows(num_tokens, context_length)
  if found == 0:
    remedy = (" or raise data.validation_fraction"
              if split == "validation" else "")
    raise config_lib.ConfigError(
        "model.context_length", f"a window of {context_length} + 1 tokens is "
        f"longer than the {split} split, which has {num_tokens:,}; use at most "
        f"{num_tokens - 1}, more text{',' * bool(remedy)}{remedy}")
  return found


def _host_rows(batch_size: int, host_index: int, num_hosts: int,
               key: str) -> range:
  """The rows of a global batch that a host reads."""
  if batch_size % num_hosts:
    raise config_lib.ConfigError(
        key, f"{batch_size} sequences cannot be shared evenly by {num_hosts} "
        f"hosts; use a multiple of {num_hosts}")
  if not 0 <= host_index < num_hosts:
    raise ValueError(f"host_index {host_index} is not below num_hosts "
                     f"{num_hosts}")
  local = batch_size // num_hosts
  return range(host_index * local, (host_index + 1) * local)


def _permutation(length: int, shuffle_seed: int, epoch: int) -> Sequence[int]:
  """A random order of range(length) for an epoch of a run."""
  digest = hashlib.blake2b(f"{shuffle_seed} {epoch}".encode(), digest_size=4)
  seed = int.from_bytes(digest.digest(), "little")
  if length <= _SHORT_ORDER:
    return np.random.default_rng(seed).permutation(length)
  return grain.MapDataset.range(length).shuffle(seed=seed)


def _gather(tokens: np.ndarray, window_L: Sequence[int],
            context_length: int) -> np.ndarray:
  starts_L1 = np.asarray(window_L, np.int64)[:, None] * context_length
  return tokens[starts_L1 + np.arange(context_length + 1)].astype(np.int32)
