# SPDX-License-Identifier: Apache-2.0
"""Lists of overrides: checked when they are made, the same on any machine."""

import collections
import math
from typing import Any

import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import algebra

RATE, SEED = "optimizer.learning_rate", "seed"


def test_product_varies_the_last_fastest() -> None:
  cells = sweep.product(sweep.axis(SEED, [1, 2]),
                        sweep.axis("model.size", ["3k", "6k"]))
  assert cells == [{SEED: 1, "model.size": "3k"}, {SEED: 1, "model.size": "6k"},
                   {SEED: 2, "model.size": "3k"}, {SEED: 2, "model.size": "6k"}]


def test_zip_pairs_and_refuses_different_lengths() -> None:
  assert sweep.zip(sweep.axis(SEED, [1, 2]), sweep.axis(RATE, [0.3, 0.4])) == [
      {SEED: 1, RATE: 0.3}, {SEED: 2, RATE: 0.4}]
  with pytest.raises(ValueError, match=r"\[2, 1\]"):
    sweep.zip(sweep.axis(SEED, [1, 2]), sweep.axis(RATE, [0.3]))


def test_chain_appends_copies() -> None:
  one = sweep.axis(SEED, [1])
  cells = sweep.chain(one, sweep.axis(RATE, [0.2]))
  cells[0][RATE] = 3.0
  assert cells == [{SEED: 1, RATE: 3.0}, {RATE: 0.2}] and one == [{SEED: 1}]


def test_combining_one_key_twice_is_refused() -> None:
  with pytest.raises(ValueError, match="both set seed"):
    sweep.product(sweep.axis(SEED, [1]), sweep.axis(SEED, [2]))


def test_where_keeps_cells_and_says_what_a_condition_lacks() -> None:
  cells = sweep.product(sweep.axis(SEED, range(4)), [{RATE: 0.1}])
  assert sweep.where(cells, lambda cell: cell[SEED] % 3 == 0) == [
      {SEED: 0, RATE: 0.1}, {SEED: 3, RATE: 0.1}]
  assert len(sweep.where(cells, lambda cell: np.float64(cell[RATE]) < 1)) == 4
  with pytest.raises(ValueError, match="'model.size', which cell 1 does not"):
    sweep.where(cells, lambda cell: cell["model.size"] == "3k")
  with pytest.raises(ValueError, match="True or False, not None"):
    sweep.where(cells, lambda cell: None)


@pytest.mark.parametrize("key, value, kept", [
    (SEED, np.int64(3), 3), (RATE, np.float32(0.5), 0.5), (RATE, 1, 1.0),
    ("model.d_ff", None, None), ("model.scan_layers", np.bool_(True), True),
    ("tracking.tags", ["a", np.str_("b")], ("a", "b"))])
def test_values_become_those_of_the_config(key: str, value: Any,
                                           kept: Any) -> None:
  (cell,) = sweep.axis(key, [value])
  assert cell == {key: kept} and type(cell[key]) is type(kept)


@pytest.mark.parametrize("key, value, said", [
    ("model.sise", "3k", "config.model.sise: no such key; did you mean 'size'"),
    (SEED, 1.5, "config.seed: must be int, not float 1.5"),
    (RATE, "fast", "config.optimizer.learning_rate: must be float"),
    (RATE, float("nan"), "must be a finite number"),
    ("optimizer", 1, "is a group; set a key below it"),
    ("train.dtype", None, "must be str, not None")])
def test_bad_keys_and_values_are_named_at_once(key: str, value: Any,
                                               said: str) -> None:
  with pytest.raises(config_lib.ConfigError) as caught:
    sweep.axis(key, [value])
  assert said in str(caught.value)


def test_one_text_is_no_list_of_values() -> None:
  with pytest.raises(ValueError, match=r"such as \['3k'\]"):
    sweep.axis("model.size", "3k")


# --- Samples -----------------------------------------------------------------

SPACE = {RATE: sweep.log_uniform(1e-4, 1e-2), SEED: sweep.integers(0, 3)}


def test_samples_are_the_same_everywhere() -> None:
  # u is the first 53 bits of sha256("7:optimizer.learning_rate:0") over 2^53,
  # and so on: worked out apart, as 10^(-4 + 2 u) and floor(4 u).
  cells = sweep.sample(SPACE, 2, seed=7)
  assert cells == [{RATE: 0.000697305, SEED: 0}, {RATE: 0.000249782, SEED: 0}]
  assert sweep.sample(SPACE, 5, seed=7)[:2] == cells
  assert sweep.sample({RATE: SPACE[RATE]}, 2, seed=7) == [
      {RATE: cell[RATE]} for cell in cells]
  assert sweep.sample(SPACE, 2, seed=8) != cells


def test_distributions_stay_within_their_ends_and_reach_them() -> None:
  cells = sweep.sample({
      RATE: sweep.log_uniform(1e-4, 1e-2), SEED: sweep.integers(2, 4),
      "optimizer.weight_decay": sweep.uniform(0.1, 0.3),
      "model.size": sweep.choice(["3k", "6k"])}, 2000)
  rates = [math.log10(cell[RATE]) for cell in cells]
  # 2000 uniform numbers over 2 decades: the mean is -3 to 2 / sqrt(12 x 2000).
  assert abs(sum(rates) / 2000 + 3) < 4 * 2 / math.sqrt(12 * 2000)
  assert -4 <= min(rates) < -3.99 and -2.01 < max(rates) <= -2
  decays = [cell["optimizer.weight_decay"] for cell in cells]
  assert 0.1 <= min(decays) < 0.101 and 0.299 < max(decays) <= 0.3
  for key, values in ((SEED, (2, 3, 4)), ("model.size", ("3k", "6k"))):
    counts = collections.Counter(cell[key] for cell in cells)
    assert set(counts) == set(values)
    mean = 2000 / len(values)
    assert all(abs(count - mean) < 4 * math.sqrt(mean)
               for count in counts.values())


def test_sobol_points_fill_every_box() -> None:
  keys = ("optimizer.beta1", "optimizer.beta2")
  points = sweep.sample(dict.fromkeys(keys, lambda u: u), 64, seed=3,
                        method="sobol")
  # 64 points of two dimensions are a (0, 6, 2)-net: one in each of 8 x 8
  # boxes. A shift modulo 1 moves them across borders, but in one dimension
  # they stay even: 4 in each of 16 parts, give or take the part it cuts.
  for key in keys:
    counts = collections.Counter(int(16 * point[key]) for point in points)
    assert len(counts) == 16 and set(counts.values()) <= {3, 4, 5}
  boxes = collections.Counter((int(4 * point[keys[0]]), int(4 * point[keys[1]]))
                              for point in points)
  assert len(boxes) == 16 and max(boxes.values()) <= 7
  assert points[:5] == sweep.sample(dict.fromkeys(keys, lambda u: u), 5, seed=3,
                                    method="sobol")


def test_a_sample_of_a_sweep_is_a_part_of_it_in_its_order() -> None:
  cells = sweep.axis(SEED, range(50))
  some = sweep.sample(cells, 10, seed=1)
  numbers = [cell[SEED] for cell in some]
  assert len(set(numbers)) == 10 and numbers == sorted(numbers)
  more = sweep.sample(cells, 20, seed=1)
  assert set(numbers) <= {cell[SEED] for cell in more}
  assert sweep.sample(cells, 10, seed=2) != some
  assert sweep.sample(cells, 50) == cells


@pytest.mark.parametrize("make, said", [
    (lambda: sweep.sample([{SEED: 1}], 2), "2 of 1 cells"),
    (lambda: sweep.sample(SPACE, 0), "at least 1, not 0"),
    (lambda: sweep.sample({SEED: 3}, 1), r"seed needs a distribution"),
    (lambda: sweep.sample(SPACE, 1, method="grid"), "'random', 'sobol'"),
    (lambda: sweep.log_uniform(0, 1), "more than 0"),
    (lambda: sweep.uniform(2, 1), "less than the second"),
    (lambda: sweep.integers(0, 1.5), "whole numbers"),
    (lambda: sweep.choice([]), "no values")])
def test_samples_that_cannot_be_say_why(make: Any, said: str) -> None:
  with pytest.raises(ValueError, match=said):
    make()


def test_rounding_keeps_six_digits() -> None:
  assert algebra.rounded(0.00123456789) == 0.00123457
