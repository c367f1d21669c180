# SPDX-License-Identifier: Apache-2.0
"""Data: corpus -> tokenizer -> token store -> batches[step].

`corpora` yields documents, `synthetic` is the corpus of known entropy,
`tokenizers` turns text into tokens and back, `vocabulary` adds what an
objective needs to theirs, `store` tokenises once into memory-mapped files,
`batches` reads those as a function of the step.
"""

from tfjax.data.corpora import DataError

__all__ = ("DataError",)
