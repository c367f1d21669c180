# SPDX-License-Identifier: Apache-2.0
"""Lengths: published ones, and what a config cannot have."""

from typing import Any

import pytest

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib

T5 = {"model.family": "t5"}
BART = {"model.family": "bart", "objective.corruption": "infilling"}
PAIRS = {"model.family": "t5", "objective.corruption": "pairs",
         "data.corpus": "files", "data.files": ("unread.jsonl",),
         "data.target_field": "target"}


@pytest.mark.parametrize("changes, expected", [
    # Raffel et al. 2020's code: 568 tokens for inputs of 512, targets of 114.
    (T5 | {"model.context_length": 568}, (568, 512, 114, 114, 114)),
    ({"model.context_length": 512}, (512, 0, 512, 512, 512)),
    # Prefixes of 1, 2 or 3 tokens leave 4, 3 or 2 of 4.
    ({"model.context_length": 4, "objective.prefix_lm": True},
     (4, 0, 4, 4, 3, True)),
    # Devlin et al. 2019's code: 77 predictions of 512.
    ({"model.family": "bert", "model.context_length": 512},
     (512, 512, 0, 77, 77)),
    ({"model.family": "bert", "model.context_length": 2},
     (2, 2, 0, 1, 1)),
    ({"model.family": "bert", "model.context_length": 512,
      "objective.whole_words": True}, (512, 512, 0, 77, None)),
    (BART | {"model.context_length": 512}, (512, 512, 512, 512, 512)),
    (PAIRS | {"model.context_length": 64}, (128, 64, 64, 64, None)),
    (PAIRS | {"model.context_length": 64, "objective.source_length": 100},
     (164, 100, 64, 64, None)),
])
def test_lengths(make_config, changes: dict[str, Any], expected) -> None:
  assert lengths_lib.of(make_config(changes)) == lengths_lib.Lengths(*expected)


@pytest.mark.parametrize("changes, key", [
    (T5 | {"objective.noise_density": 0.9}, "objective.noise_density"),
    (T5 | {"model.context_length": 1}, "objective.noise_density"),
    ({"model.context_length": 1, "objective.prefix_lm": True},
     "objective.prefix_lm"),
    (T5 | {"model.positions": "learned", "objective.mean_span": 1.0},
     "objective.mean_span"),
    (PAIRS | {"model.positions": "learned", "model.context_length": 64,
              "objective.source_length": 65}, "objective.source_length"),
])
def test_windows_that_are_too_short(
    make_config, changes: dict[str, Any], key: str) -> None:
  with pytest.raises(config_lib.ConfigError) as info:
    lengths_lib.of(make_config(changes))
  assert info.value.key == key
  assert "model.context_length" in str(info.value)
