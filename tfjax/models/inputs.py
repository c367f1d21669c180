# SPDX-License-Identifier: Apache-2.0
"""What a model is given: token ids, and which of them see each other.

Shape letters: B batch, T length.
"""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class Inputs:
  """The tokens of a decoder, or of an encoder that stands alone.

  Attributes:
    tokens: ids.
    segments: tokens see only those of their own segment; 0 is padding. A
      target sees the source's tokens of its own segment. None: all are one.
    positions: of each token; None: 0, 1, 2, ...
    token_types: rows of the token type embedding; None: all 0.
    prefix: tokens of each sequence that a decoder sees without causality
      (prefix-LM); None: none.
    source: an encoder-decoder's encoder's own tokens.
  """

  tokens: Int[Array, "B T"]
  segments: Int[Array, "B T"] | None = None
  positions: Int[Array, "B T"] | None = None
  token_types: Int[Array, "B T"] | None = None
  prefix: Int[Array, "B"] | None = None
  source: Inputs | None = None
