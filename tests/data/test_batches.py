# SPDX-License-Identifier: Apache-2.0
"""Batches: a function of seed and step, nested, and the same on any hosts."""

import json
from typing import Sequence

import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.data import batches as batches_lib
from tfjax.data import store as store_lib

T = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> store_lib.TokenStore:
  return store_lib.build(config_lib.DataConfig(
      corpus="synthetic", cache_dir=str(tmp_path_factory.mktemp("cache")),
      tokenizer=config_lib.TokenizerConfig(kind="byte"),
      synthetic=config_lib.SyntheticConfig(
          num_bytes=20_000, document_bytes=500),
      validation_fraction=0.2))


def training(store: store_lib.TokenStore, batch_size: int = 8,
             num_steps: int = 20, **fields) -> list[
                 np.ndarray | batches_lib.Pairs]:
  """The first batches."""
  batches = endless(store, batch_size, **fields)
  return [batches[step] for step in range(num_steps)]


def endless(store: store_lib.TokenStore, batch_size: int = 8,
            host_rows: Sequence[int] | None = None, context_length: int = T,
            **fields) -> batches_lib.Batches:
  return batches_lib.training_batches(
      store, config_lib.DataConfig(**fields), context_length=context_length,
      batch_size=batch_size, rows=host_rows)


def rows(batches: list[np.ndarray]) -> list[bytes]:
  return [row.tobytes() for batch in batches for row in batch]


def all_windows(store: store_lib.TokenStore) -> list[bytes]:
  tokens = np.asarray(store.train, np.int32)
  return [tokens[i * T:i * T + T + 1].tobytes()
          for i in range(batches_lib.windows(store.train_tokens, T))]


@pytest.mark.parametrize("num_tokens, expected", [
    (0, 0), (1, 0), (T, 0), (T + 1, 1), (2 * T, 1), (2 * T + 1, 2)])
def test_windows(num_tokens: int, expected: int) -> None:
  assert batches_lib.windows(num_tokens, T) == expected


def test_an_epoch_reads_every_window_once(store: store_lib.TokenStore) -> None:
  windows = all_windows(store)
  assert len(set(windows)) == len(windows)  # so that rows name windows
  found = rows(training(store, 1, len(windows)))
  assert found != windows and sorted(found) == sorted(windows)
  # No target is in two windows: together they are the stream's beginning.
  targets = np.concatenate([np.frombuffer(w, np.int32)[1:] for w in windows])
  np.testing.assert_array_equal(targets, store.train[1:len(targets) + 1])


def test_random_access_equals_reading_in_order(
    store: store_lib.TokenStore) -> None:
  # Over many epochs, and stopping anywhere: a resume needs the step only.
  make = lambda: endless(store, unique_tokens=50 * T)
  in_order = training(store, num_steps=300, unique_tokens=50 * T)
  assert in_order[0].shape == (8, T + 1) and in_order[0].dtype == np.int32
  one = make()
  for step in np.random.default_rng(0).permutation(300):
    np.testing.assert_array_equal(one[step], in_order[step])
    np.testing.assert_array_equal(make()[int(step)], in_order[step])


def test_there_is_no_step_before_the_first(store: store_lib.TokenStore
                                           ) -> None:
  with pytest.raises(IndexError, match="no step -1"):
    endless(store)[-1]


def test_seeds_give_different_orders(store: store_lib.TokenStore) -> None:
  windows = len(all_windows(store))
  def epochs(seed: int) -> tuple[bytes, bytes]:
    found = rows(training(store, 1, 2 * windows, shuffle_seed=seed))
    return b"".join(found[:windows]), b"".join(found[windows:])
  orders = [order for seed in range(4) for order in epochs(seed)]
  # Nor is one seed's second epoch another seed's first.
  assert len(set(orders)) == len(orders)


def test_data_sizes_are_nested(store: store_lib.TokenStore) -> None:
  order = rows(training(store, 1, len(all_windows(store))))
  for unique in (1, 10 * T, 10 * T + 1, 200 * T):
    used = -(-unique // T)
    batches = training(store, 4, 3 * used, unique_tokens=unique)
    found = rows(batches)
    assert found[:used] == order[:used]
    for epoch in range(12):  # every one, whole, and of these windows only
      assert (sorted(found[epoch * used:(epoch + 1) * used]) ==
              sorted(order[:used]))
  # A shorter run reads a prefix of a longer one, with any batch size.
  assert rows(training(store, 5, 6)) == rows(training(store, 10, 20))[:30]


def test_epochs_have_orders_of_their_own(store: store_lib.TokenStore) -> None:
  found = rows(training(store, 40, 5, unique_tokens=40 * T))
  orders = [tuple(found[i:i + 40]) for i in range(0, 200, 40)]
  assert len(set(orders)) == 5


def test_batches_lie_across_epochs(store: store_lib.TokenStore) -> None:
  # 3 windows in batches of 8: more than two epochs in one batch.
  found = rows(training(store, 8, 6, unique_tokens=3 * T))
  assert len(found) == 48
  assert all(len(set(found[i:i + 3])) == 3 for i in range(0, 48, 3))


# One after the other, alternating, and two hosts that read the same.
@pytest.mark.parametrize("shares", [
    [range(8)], [range(4), range(4, 8)], [range(0, 8, 2), range(1, 8, 2)],
    [[0, 1, 6, 7], [2, 3, 4, 5], [2, 3, 4, 5]]])
def test_hosts_share_the_same_batches(
    store: store_lib.TokenStore, shares: list[Sequence[int]]) -> None:
  whole = training(store, unique_tokens=50 * T)
  parts = [training(store, unique_tokens=50 * T, host_rows=rows)
           for rows in shares]
  for step, batch in enumerate(whole):
    for part, rows in zip(parts, shares):
      np.testing.assert_array_equal(part[step], batch[list(rows)])


def test_long_splits_are_permuted_as_they_are_read(
    monkeypatch: pytest.MonkeyPatch, store: store_lib.TokenStore) -> None:
  """The order that is not drawn whole obeys the same rules."""
  monkeypatch.setattr(batches_lib, "_SHORT_ORDER", 0)
  windows = all_windows(store)
  order = rows(training(store, 1, 2 * len(windows)))
  assert sorted(order[:len(windows)]) == sorted(windows)
  assert sorted(order[len(windows):]) == sorted(windows)
  assert order[:len(windows)] != order[len(windows):]
  found = rows(training(store, 4, 30, unique_tokens=40 * T))
  assert found[:40] == order[:40]
  assert sorted(found[40:80]) == sorted(order[:40])
  assert found[40:80] != found[80:120]


# --- Evaluation --------------------------------------------------------------


def evaluation(store: store_lib.TokenStore, batch_size: int = 8,
               **arguments) -> batches_lib.EvaluationBatches:
  return batches_lib.evaluation_batches(
      store, context_length=T, batch_size=batch_size, **arguments)


def weighted(batches: batches_lib.EvaluationBatches) -> np.ndarray:
  return np.concatenate([tokens[weights == 1] for tokens, weights in batches])


def test_evaluation_reads_every_window_once_in_order(
    store: store_lib.TokenStore) -> None:
  windows = batches_lib.windows(store.validation_tokens, T)
  batch_size = next(b for b in (7, 8) if windows % b)
  batches = evaluation(store, batch_size)
  for tokens, weights in batches:
    assert tokens.shape == (batch_size, T + 1) and tokens.dtype == np.int32
    assert weights.shape == (batch_size,) and weights.dtype == np.float32
  weights = np.concatenate([weights for _, weights in batches])
  assert len(weights) == -(-windows // batch_size) * batch_size
  assert weights.sum() == windows and set(weights) == {0, 1}
  found = weighted(batches)
  np.testing.assert_array_equal(
      found[:, 1:].ravel(), store.validation[1:windows * T + 1])
  np.testing.assert_array_equal(found[:, 0], store.validation[:windows * T:T])


def test_evaluation_on_fewer_tokens_is_spread_evenly(
    store: store_lib.TokenStore) -> None:
  whole = [w.tobytes() for w in weighted(evaluation(store))]
  found = weighted(evaluation(store, tokens=10 * T - 1))
  assert len(found) == 10
  places = [whole.index(w.tobytes()) for w in found]
  gaps = np.diff([*places, len(whole)])
  assert places[0] == 0 and set(gaps) <= {len(whole) // 10,
                                         len(whole) // 10 + 1}
  assert len(weighted(evaluation(store, tokens=10 ** 9))) == len(whole)


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_evaluation_is_shared_by_hosts(
    store: store_lib.TokenStore, num_hosts: int) -> None:
  parts = [evaluation(store, rows=list(rows)) for rows in
           np.split(np.arange(8), num_hosts)]
  for index, (tokens, weights) in enumerate(evaluation(store)):
    np.testing.assert_array_equal(
        np.concatenate([part[index][0] for part in parts]), tokens)
    np.testing.assert_array_equal(
        np.concatenate([part[index][1] for part in parts]), weights)


# --- Pairs -------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> store_lib.TokenStore:
  """Sources of 1 to 10 bytes, targets of 10 to 1."""
  path = tmp_path_factory.mktemp("pairs") / "a.jsonl"
  path.write_text("".join(json.dumps({
      "text": f"{i:010}"[-1 - i % 10:], "target": f"{i:010}"[i % 10:]}) + "\n"
                          for i in range(100)))
  return store_lib.build(config_lib.DataConfig(
      corpus="files", files=(str(path),), target_field="target",
      cache_dir=str(path.parent), validation_fraction=0.2,
      tokenizer=config_lib.TokenizerConfig(kind="byte"), deduplicate=False))


def text(row: np.ndarray) -> str:
  """Digits, . for the end, - for padding."""
  return "".join({256: ".", -1: "-"}.get(i, chr(max(i, 0)))
                 for i in row.tolist())


def test_pairs_are_padded_and_end(pairs: store_lib.TokenStore) -> None:
  found = batches_lib.open_windows(pairs, "train", 11, 12)
  rows = found.read(range(len(found)))
  assert rows.source.shape == (len(found), 12)
  assert rows.target.shape == (len(found), 11)
  assert rows.source.dtype == rows.target.dtype == np.int32
  for source, target in zip(map(text, rows.source), map(text, rows.target)):
    number = max(int(side.rstrip("-.")) for side in (source, target))
    digit = number % 10
    assert source == f"{number:010}"[-1 - digit:] + "." + "-" * (10 - digit)
    assert target == f"{number:010}"[digit:] + "." + "-" * digit
  # 11 characters and two ends in each.
  assert found.num_tokens == 13 * len(found) == pairs.train_tokens
  assert found.cut_sources == found.cut_targets == 0
  assert len(found) + pairs.num_validation_documents == 100


def test_long_sides_are_cut_and_counted(pairs: store_lib.TokenStore) -> None:
  found = batches_lib.open_windows(pairs, "train", 11, 4)
  whole = batches_lib.open_windows(pairs, "train", 11)
  every = range(len(found))
  np.testing.assert_array_equal(
      found.read(every).source, whole.read(every).source[:, :4])
  cut = sum(len(text(row).rstrip("-")) > 4 for row in whole.read(every).source)
  assert 0 < cut == found.cut_sources < len(found)
  assert found.cut_targets == 0
  # What is cut has no end.
  assert sum("." not in text(row) for row in found.read(every).source) == cut
  assert found.num_tokens == sum(
      (row >= 0).sum() for side in found.read(every) for row in side)


def test_pairs_in_batches(pairs: store_lib.TokenStore) -> None:
  count = len(batches_lib.open_windows(pairs, "train", 11))
  batches = training(pairs, 1, 2 * count, context_length=11)
  found = [text(np.concatenate(batch, 1)[0]) for batch in batches]
  assert len(set(found)) == count
  assert sorted(found[:count]) == sorted(found[count:]) != found[:count]
  # A pair is 13 tokens here: 27 are 3 pairs.
  some = training(pairs, 1, 30, context_length=11, unique_tokens=27)
  assert [text(np.concatenate(b, 1)[0]) for b in some][:3] == found[:3]
  assert len({b.source.tobytes() + b.target.tobytes() for b in some}) == 3
  with pytest.raises(config_lib.ConfigError, match=f"{13 * count:,} tokens"):
    training(pairs, context_length=11, unique_tokens=13 * count + 1)


def test_evaluation_on_pairs(pairs: store_lib.TokenStore) -> None:
  batches = batches_lib.evaluation_batches(
      pairs, context_length=11, source_length=12, batch_size=8, tokens=40)
  (rows, weights), = batches
  assert rows.source.shape == (8, 12) and weights.sum() == 4
  np.testing.assert_array_equal(batches.windows(0)[3:], batches.windows(0)[3])


# --- Errors ------------------------------------------------------------------


def test_more_unique_tokens_than_there_are(
    store: store_lib.TokenStore) -> None:
  most = len(all_windows(store)) * T
  training(store, unique_tokens=most)
  with pytest.raises(config_lib.ConfigError, match=f"{most:,} tokens") as info:
    training(store, unique_tokens=most + 1)
  assert info.value.key == "data.unique_tokens"


def test_a_split_shorter_than_a_window(store: store_lib.TokenStore) -> None:
  training(store, context_length=store.train_tokens - 1)
  with pytest.raises(config_lib.ConfigError, match="training split") as info:
    training(store, context_length=store.train_tokens)
  assert info.value.key == "model.context_length"
  with pytest.raises(config_lib.ConfigError,
                     match=f"at most {store.validation_tokens - 1}.*"
                     "data.validation_fraction"):
    batches_lib.evaluation_batches(
        store, context_length=store.validation_tokens, batch_size=2)
