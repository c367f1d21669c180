# SPDX-License-Identifier: Apache-2.0
"""Training FLOPs from the shapes of the matrix products, by component.

Only matrix products count (a multiplication and an addition are 2), as in
Kaplan et al. 2020 §2.1, Hoffmann et al. 2022 appendix F and Chowdhery et al.
2022 appendix B. Embedding look-ups, norms and softmax are left out.
"""

import dataclasses

from tfjax import config as config_lib

# Attention counts the full T x T scores whatever the mask skips, as PaLM's
# MFU and Chinchilla's appendix F do.
CONVENTION = "matmul+attention_full"


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of some work: dense products, attention scores and values, head,
  and what rematerialisation computes again (not part of `total`)."""

  matmul: float
  attention: float
  head: float
  recompute: float

  @property
  def total(self) -> float:
    """What the model needs, however it is computed."""
    return self.matmul + self.attention + self.head

  def __mul__(self, factor: float) -> "Flops":
    return Flops(*(factor * getattr(self, entry.name)
                   for entry in dataclasses.fields(self)))


def training_flops_per_token(model: config_lib.ModelConfig) -> Flops:
  """Forward and backward (twice the forward) at the full context length."""
  d_model, length = model.d_model, model.context_length
  projections = 4 * d_model * d_model
  feed_forward = (3 if model.activation == "swiglu" else 2) * (
      d_model * model.d_ff)
  matmul = 2 * model.num_layers * (projections + feed_forward)
  attention = 2 * model.num_layers * 2 * length * d_model
  head = 2 * d_model * model.vocab_size
  recompute = {"none": 0, "dots": attention, "full": matmul + attention}
  return Flops(3.0 * matmul, 3.0 * attention, 3.0 * head,
               float(recompute[model.remat]))
