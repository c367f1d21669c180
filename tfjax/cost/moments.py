# SPDX-License-Identifier: Apache-2.0
"""What one device holds at each moment of a training step that may need most.

Counts of arrays are in activations.py; what is asked from outside, and what
is checked, in memory.py.
"""

import math

import jax
import jax.numpy as jnp

from tfjax import config as config_lib
from tfjax.cost import activations
from tfjax.cost import lengths as lengths_lib
from tfjax.models import attention_choice
from tfjax.models import masks
from tfjax.models import parametrization
from tfjax.models import transformer

# What follows is decided above this room, for a step that runs; tests hold
# the two together.
PARAMETER_AXES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor",
                  "kv_heads": "tensor", "mlp": "tensor"}
CHUNK_TOKENS = {"cpu": 1024, "gpu": 2048, "tpu": 2048}


def part_tokens(runtime: config_lib.RuntimeConfig, backend: str,
                params: int) -> int | None:
  """The most tokens that a device computes at once; None: no limit."""
  if runtime.cpu_tuning == "off" or backend != "cpu":
    return None
  return 512 if 4 * params < 32 * 2**20 else 2048


class Step:
  """The sizes of one device's work, and what it holds at each moment."""

  def __init__(self, config: config_lib.ExperimentConfig,
               mesh: dict[str, int], backend: str,
               lengths: lengths_lib.Lengths):
    self.config, self.model = config, config.model
    self.mesh, self.backend, self.lengths = mesh, backend, lengths
    self.half = config.train.dtype == "bfloat16"
    self.parameters = self._count()
    self.rows = config.train.batch_size // (mesh["data"] * mesh["fsdp"])
    self.parts = self._parts()

  def _count(self, *, within: str = "", gathered: bool = False,
             kernels: bool = False, scanned: bool = False) -> int:
    """This device's parameters whose path has `within`; `gathered`: as they
    are without fsdp; `kernels`, `scanned`: of those alone."""
    total = 0
    for one in parametrization.parameters(self.model):
      cut = [PARAMETER_AXES[axis] for axis in one.axes
             if axis in PARAMETER_AXES]
      if within not in one.name or (
          kernels and one.path[-1] != "kernel") or (
              scanned and "blocks" not in one.path):
        continue
      total += math.prod(one.shape) // math.prod(
          self.mesh[axis] for axis in cut
          if not (gathered and axis == "fsdp"))
    return total

  def _parts(self) -> int:
    """In how many parts a batch is computed: what was asked for, or more."""
    parts = self.config.train.accumulation_steps
    most = part_tokens(self.config.runtime, self.backend,
                       transformer.count_parameters(self.model).total)
    tokens = self.rows * (self.lengths.encoder + self.lengths.decoder)
    while most and tokens // parts > most and self.rows % (2 * parts) == 0:
      parts *= 2
    return parts

  def batch_bytes(self) -> int:
    """As `tfjax.objectives` makes a batch: every entry takes 4 bytes."""
    lengths = self.lengths
    inputs = lengths.encoder + lengths.decoder
    entries = inputs + 2 * lengths.predicted
    if self.config.objective.name == "masked":
      entries += lengths.predicted  # the places of the predicted
    entries += inputs * self._has_segments() + self._has_prefix()
    recovery = self.config.recovery
    recent = 0 if recovery.spike_factor is None else recovery.spike_window
    # And the step, the optimizer's numbers, the recent losses.
    numbers = 10 - (self.config.optimizer.clip_norm is None)
    return 4 * (self.rows * entries + 1 + numbers + recent)

  def _has_segments(self) -> bool:
    """Documents that do not see each other, or padding."""
    objective = self.config.objective
    if objective.name == "seq2seq":
      return objective.corruption in ("infilling", "pairs")
    return objective.separate_documents

  def _has_prefix(self) -> bool:
    objective = self.config.objective
    return objective.name == "causal" and objective.prefix_lm

  # --- Moments ---------------------------------------------------------------

  def moments(self) -> list[dict[str, float]]:
    """Bytes by kind at each moment that may be the peak."""
    kept = sum(self._kept_bytes(stack) for stack in self._stacks())
    # The sums over parts live throughout; a scan lays the gradients of its
    # layers out before it begins.
    gradients = 4.0 * self._count(within="/blocks/")
    if self.parts > 1:
      gradients += 4 * self.parameters
    copies = self._copy_bytes()
    loss = dict(gradients=gradients, activations=kept + self._loss_bytes(),
                logits=self._logit_bytes() + self._table_bytes(),
                copies=copies + self._head_copy_bytes())
    # A part's gradients are beside their sums. A CPU's clipped ones are beside
    # those that they are made of; elsewhere they are fused into the update.
    clips = self.backend == "cpu" and (
        self.config.optimizer.clip_norm is not None)
    update = dict(gradients=4.0 * self.parameters * (
        2 if clips or self.parts > 1 else 1))
    return [loss, update, *(self._backward(stack, kept, gradients, copies)
                            for stack in self._stacks())]

  def _backward(self, stack: str, kept: float, gradients: float,
                copies: float) -> dict[str, float]:
    """While the last layer of a stack is at work in its backward pass; where
    that may be more than at the loss: it is scanned, or computed again."""
    if not self._layers(stack)[1] and (
        self.backend == "cpu" or self.model.remat == "none"):
      return {}
    if stack == "encoder" and self.model.architecture == "encoder_decoder":
      kept -= self._kept_bytes("decoder")
    kept -= self._final_norm_bytes(stack)
    working = self._bytes(activations.working(
        self.model, self._block(stack), self.backend), stack)
    return dict(gradients=gradients + self._table_bytes(),
                activations=kept + working,
                copies=copies + self._layer_kernel_bytes(stack))

  def _stacks(self) -> tuple[str, ...]:
    if self.model.architecture == "encoder_decoder":
      return "encoder", "decoder"
    return (self.model.architecture,)

  def _tokens(self, stack: str) -> float:
    """Tokens of a stack that this device computes at once."""
    return (self.rows // self.parts * getattr(self.lengths, stack) /
            self.mesh["sequence"])

  def _block(self, stack: str, scanned: bool = True) -> activations.Block:
    decoder = stack == "decoder"
    cross = decoder and self.model.architecture == "encoder_decoder"
    relative = self.model.positions == "relative"
    return activations.Block(
        tokens=self._tokens(stack), causal=decoder, cross=cross,
        kept_scores=self._keeps_scores(stack, stack, relative),
        kept_memory_scores=cross and self._keeps_scores(
            stack, "encoder", False), half=self.half, scanned=scanned,
        on_mesh=math.prod(self.mesh.values()) > 1)

  def _keeps_scores(self, stack: str, keys: str, bias: bool) -> bool:
    """Whether the attention that is chosen keeps scores, not log sums."""
    model, some = self.model, jax.ShapeDtypeStruct((1, 1), jnp.int32)
    segments = some if self._has_segments() else None
    def heads(count, length):
      return jax.ShapeDtypeStruct(
          (self.rows, count, getattr(self.lengths, length), model.head_dim),
          jnp.dtype(self.config.train.dtype))
    mask = masks.Mask(causal=stack == "decoder" and keys == stack,
                      segments=segments, key_segments=segments,
                      prefix=some if self._has_prefix() else None)
    name, _ = attention_choice.choose(
        model.attention, self.backend, heads(model.num_heads, stack),
        heads(model.num_kv_heads, keys), mask, bias)
    return name in attention_choice.ANYWHERE

  def _bytes(self, arrays: activations.Arrays, stack: str) -> float:
    """Bytes of a layer's arrays."""
    model, tensor = self.model, self.mesh["tensor"]
    heads = model.num_heads * model.head_dim / tensor
    tokens, source = self._tokens(stack), self._tokens("encoder")
    elements = tokens * (
        arrays.stream * model.d_model +
        arrays.feed_forward * model.d_ff / tensor + arrays.heads * heads)
    elements += source * arrays.memory * heads
    elements += tokens * model.num_heads / tensor * (
        arrays.scores * getattr(self.lengths, stack) +
        arrays.memory_scores * self.lengths.encoder)
    return elements * self._itemsize()

  def _itemsize(self) -> int:
    """Bytes of a number that is computed with. A CPU's are float32; what it
    keeps in bfloat16 is counted as less of an array."""
    return 4 if self.backend == "cpu" or not self.half else 2

  def _layers(self, stack: str) -> tuple[int, int]:
    """Layers that are unrolled, and that are scanned."""
    layers = (self.model.num_layers if stack == "decoder"
              else self.model.num_encoder_layers)
    if not self.model.scan_layers:
      return layers, 0
    # A first block without its norm stands alone.
    alone = 0 if self.model.first_norm else 1
    return alone, layers - alone

  def _kept_bytes(self, stack: str) -> float:
    found = 0.0
    for layers, scanned in zip(self._layers(stack), (False, True)):
      found += layers * self._bytes(activations.kept(
          self.model, self._block(stack, scanned), self.backend), stack)
    if self.model.embedding_norm:
      arrays = 1 if self.backend != "cpu" else activations.norm_arrays(
          self.model, self._block(stack))
      found += self._bytes(activations.Arrays(stream=arrays), stack)
    if self.model.positions == "relative":
      # All layers share one bias, and one gradient of it, float32.
      length = getattr(self.lengths, stack)
      found += 2 * 4 * (self.model.num_heads / self.mesh["tensor"] *
                        length * length / self.mesh["sequence"])
    return found + self._final_norm_bytes(stack)

  def _final_norm_bytes(self, stack: str) -> float:
    """No weight gradient wants its result transposed."""
    if self.model.norm_position == "post":
      return 0.0
    arrays = 1 if self.backend != "cpu" else activations.norm_arrays(
        self.model, self._block(stack)) - 1
    return self._bytes(activations.Arrays(stream=arrays), stack)

  def _loss_bytes(self) -> float:
    """The head's inputs and their gradients, in chunks."""
    tokens = (self.rows // self.parts * self.lengths.predicted /
              self.mesh["sequence"])
    return 2 * tokens * self.model.d_model * self._itemsize()

  def _logit_bytes(self) -> float:
    """Logits and probabilities of a chunk of tokens."""
    rows = self.rows // self.parts
    length = -(-self.lengths.predicted // self.mesh["sequence"])
    chunks = -(-length // max(1, CHUNK_TOKENS[self.backend] // rows))
    width = rows * -(-length // chunks)
    return 2 * 4 * width * self.model.vocab_size / self.mesh["tensor"]

  def _table_bytes(self) -> float:
    """The head's gradient, whole where the table is cut over fsdp; and that
    of the embedding, if that is another."""
    return self._table(4) * (1 if self.model.tie_embedding else 2)

  def _table(self, size: int) -> float:
    return size * self.model.vocab_size * self.model.d_model / (
        self.mesh["tensor"])

  def _head_copy_bytes(self) -> float:
    """The head, gathered, and in the type that is computed in."""
    if not self.half and self.mesh["fsdp"] == 1:
      return 0.0
    return self._table(self._itemsize())

  def _copy_bytes(self) -> float:
    """Copies of kernels that live from the forward to the backward pass."""
    alone = self._count(gathered=True, kernels=True) - self._count(
        within="/blocks/", gathered=True, kernels=True)
    scanned = self._count(within="/blocks/", kernels=True)
    if self.backend != "cpu":
      return 2.0 * (alone + scanned) if self.half else 0.0
    copied = alone if self.half or self.mesh["fsdp"] > 1 else 0
    # A loop that recomputes nothing has its own; in float32 of those kernels
    # alone whose heads' two dimensions are made one.
    if self.model.remat == "none":
      copied += scanned if self.half else sum(
          self._count(within=f"/{name}/kernel", scanned=True)
          for name in ("query", "key", "value"))
    return 4.0 * copied

  def _layer_kernel_bytes(self, stack: str) -> float:
    """The kernels of the layer that is at work, gathered."""
    alone, scanned = self._layers(stack)
    if not scanned and self.mesh["fsdp"] == 1:
      return 0.0
    return self._itemsize() * self._count(
        within=f"{stack}/block", gathered=True, kernels=True) / (
            alone + scanned)
