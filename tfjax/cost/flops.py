# SPDX-License-Identifier: Apache-2.0
"""Training FLOPs from the shapes of the matrix products, by component.

Only matrix products count (a multiplication and an addition are 2), as in
Kaplan et al. 2020 §2.1, Hoffmann et al. 2022 appendix F and Chowdhery et al.
2022 appendix B. Embedding look-ups, norms and softmax are left out.
"""

import dataclasses

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.models import transformer

# Attention counts the full square of queries and keys whatever causality
# skips, as PaLM's MFU and Chinchilla's appendix F do; layers with a window
# count the keys that a query may see. The head counts where it runs.
CONVENTION = "matmul+attention_full"


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of some work.

  By kind: dense products, attention scores and values, head, and what
  rematerialisation computes again (not part of `total`). By place: encoder
  and decoder, which make up matmul + attention.
  """

  matmul: float
  attention: float
  head: float
  recompute: float
  encoder: float
  decoder: float

  @property
  def total(self) -> float:
    """What the model needs, however it is computed."""
    return self.matmul + self.attention + self.head

  def __mul__(self, factor: float) -> "Flops":
    return Flops(*(factor * getattr(self, entry.name)
                   for entry in dataclasses.fields(self)))


def training_flops_per_token(model: config_lib.ModelConfig,
                             lengths: lengths_lib.Lengths) -> Flops:
  """Forward and backward (twice the forward), over the tokens that are read.

  For objectives that read more tokens than they compute on or predict, this
  is the work of an example over the length of its window.
  """
  inner = model.num_heads * model.head_dim
  kv_inner = model.num_kv_heads * model.head_dim
  projections = model.d_model * 2 * inner  # queries and outputs
  kv_projections = model.d_model * 2 * kv_inner
  feed_forward = (3 if model.gated else 2) * model.d_model * model.d_ff

  def stack(layers: int, length: int, bidirectional: bool):
    """Dense and attention multiplications of a stack over its input."""
    dense = layers * length * (projections + kv_projections + feed_forward)
    seen = model.window // 2 * 2 + 1 if bidirectional else model.window
    keys = sum(min(length, seen) if local else length
               for local in transformer.local_layers(model)[:layers])
    return dense, 2 * length * keys * inner

  encoder, encoder_attention = stack(
      model.num_encoder_layers, lengths.encoder, bidirectional=True)
  decoder, decoder_attention = stack(
      model.num_layers, lengths.decoder, bidirectional=False)
  if model.architecture == "encoder_decoder":
    decoder += model.num_layers * (lengths.decoder * projections +
                                   lengths.encoder * kv_projections)
    decoder_attention += model.num_layers * (
        2 * lengths.decoder * lengths.encoder * inner)
  head = model.d_model * model.vocab_size
  if model.head_transform:
    head += model.d_model ** 2
  matmul, attention = encoder + decoder, encoder_attention + decoder_attention
  recompute = {"none": 0, "dots": attention, "full": matmul + attention}
  # A multiplication and an addition, forward and twice backward.
  once, training = 2 / lengths.window, 6 / lengths.window
  return Flops(
      matmul=training * matmul, attention=training * attention,
      head=training * lengths.predicted * head,
      recompute=once * recompute[model.remat],
      encoder=training * (encoder + encoder_attention),
      decoder=training * (decoder + decoder_attention))
