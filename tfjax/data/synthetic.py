# SPDX-License-Identifier: Apache-2.0
"""A Markov source of text whose entropy rate is known exactly.

The next symbol depends on the `order` symbols before it, through conditional
distributions drawn once from a symmetric Dirichlet. A fitted irreducible loss
can be checked against `MarkovSource.entropy_rate`.

Shapes: K states (num_symbols ** order, base-num_symbols numbers whose last
digit is the latest symbol), S symbols, D documents made side by side.
"""

from collections.abc import Iterator
import functools

import numpy as np

from tfjax import config as config_lib

# Probability spread evenly over all symbols, so that every state is reachable
# and the stationary distribution unique, however small the concentration.
UNIFORM_SHARE = 1e-3
MAX_TABLE_ENTRIES = 1 << 22
MAX_ITERATIONS = 20_000
BLOCK_BYTES = 1 << 20


class MarkovSource:
  """The source that a SyntheticConfig describes, and its text."""

  def __init__(self, config: config_lib.SyntheticConfig):
    symbols, order = config.num_symbols, config.order
    if symbols ** (order + 1) > MAX_TABLE_ENTRIES:
      largest = max(k for k in range(1, order + 1)
                    if symbols ** (k + 1) <= MAX_TABLE_ENTRIES)
      raise config_lib.ConfigError(
          "data.synthetic.order", f"{symbols} symbols at order {order} need a "
          f"table of {symbols ** (order + 1):,} probabilities, more than "
          f"{MAX_TABLE_ENTRIES:,}; order {largest} or fewer num_symbols fit")
    self._config = config
    random = self._random(0)
    drawn_KS = random.dirichlet(
        np.full(symbols, config.concentration), size=symbols ** order)
    self.conditional_KS = (
        (1 - UNIFORM_SHARE) * drawn_KS + UNIFORM_SHARE / symbols)

  def _random(self, *stream: int) -> np.random.Generator:
    return np.random.default_rng([self._config.seed, *stream])

  @functools.cached_property
  def stationary_K(self) -> np.ndarray:
    """How often each state occurs in an endless text."""
    symbols = self._config.num_symbols
    pi_K = np.full(len(self.conditional_KS), 1 / len(self.conditional_KS))
    for _ in range(MAX_ITERATIONS):
      # State (s1 s2..sk) goes to (s2..sk x): sum over the oldest symbol s1.
      moved_KS = pi_K[:, None] * self.conditional_KS
      next_K = moved_KS.reshape(symbols, -1).sum(0)
      # Half a step: the same fixed point, but no oscillation when the source
      # is close to periodic.
      next_K = (next_K + pi_K) / 2
      next_K /= next_K.sum()
      change = np.abs(next_K - pi_K).sum()
      pi_K = next_K
      if change < 1e-13:
        return pi_K
    raise config_lib.ConfigError(
        "data.synthetic.concentration", f"{self._config.concentration} makes a "
        "source so close to deterministic that its stationary distribution "
        "does not settle; a larger value does")

  @functools.cached_property
  def entropy_rate(self) -> float:
    """Nats a symbol: sum over states of pi(state) H(next symbol | state)."""
    entropy_K = -(self.conditional_KS * np.log(self.conditional_KS)).sum(1)
    return float(self.stationary_K @ entropy_K)

  def documents(self) -> Iterator[str]:
    """num_bytes of text in documents of document_bytes, the last shorter.

    Each document starts from the stationary distribution, so that every
    position of every document has the same marginal distribution.
    """
    config = self._config
    length = min(config.document_bytes, config.num_bytes)
    block = max(1, BLOCK_BYTES // length)
    num_documents = -(-config.num_bytes // length)
    for index, first in enumerate(range(0, num_documents, block)):
      # Whole blocks are drawn even when fewer documents are wanted, so that a
      # longer corpus begins with a shorter one's text.
      text_DL = self._generate(self._random(1, index), block, length)
      for row, document_L in enumerate(text_DL[:num_documents - first]):
        left = config.num_bytes - (first + row) * length
        yield document_L[:left].tobytes().decode("ascii")

  def _generate(self, random: np.random.Generator, num_documents: int,
                length: int) -> np.ndarray:
    symbols, order = self._config.num_symbols, self._config.order
    cumulative_KS = np.cumsum(self.conditional_KS, axis=1)
    # Rounding must not leave a gap above the last symbol.
    cumulative_KS[:, -1] = 1.0
    cumulative_K = np.cumsum(self.stationary_K)
    state_D = np.searchsorted(
        cumulative_K / cumulative_K[-1], random.random(num_documents),
        side="right")
    text_LD = np.empty((max(length, order), num_documents), np.uint8)
    for place in range(order):
      text_LD[place] = state_D // symbols ** (order - 1 - place) % symbols
    keep = symbols ** (order - 1)
    for place in range(order, length):
      draw_D = random.random(num_documents)
      symbol_D = (draw_D[:, None] >= cumulative_KS[state_D]).sum(1)
      text_LD[place] = symbol_D
      state_D = state_D % keep * symbols + symbol_D
    return np.ascontiguousarray(text_LD[:length].T + np.uint8(ord("a")))
