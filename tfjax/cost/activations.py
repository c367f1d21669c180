# SPDX-License-Identifier: Apache-2.0
"""What a step keeps of a batch between the passes, in arrays of each width.

The counts are of the arrays that XLA's buffer assignment has at the peak of
a step, put down by the module that makes them; what is done with them, and
what else takes memory, is in memory.py. Biases and what is as long as a batch
but has no width (log sums, means) is left out.

CPU counts were read from XLA's own listings (jaxlib 0.10.2). Two habits of
that compiler are in them. It schedules breadth first: whatever can be computed
is computed at once. Unrolled layers are therefore recomputed before the
backward pass needs them, and remat saves next to nothing there; in a scan the
loop keeps it from that. And it keeps the transposed left operand of each
weight gradient rather than the operand.

Shape letters: T queries, S keys, D model width, F feed-forward width, N heads.
"""

import dataclasses

from tfjax import config as config_lib

# Rows of tokens from which the CPU's compiler hands sums over a row to a
# library (YNNPACK), which wants both factors as whole arrays.
_LIBRARY_ROWS = 4096

# In bfloat16 a CPU multiplies in float32 and keeps most operands so. So many
# arrays fewer, in float32's bytes, are kept: in the feed-forward half of one,
# of a gated one half of four; in attention half of queries, keys and values.
_HALF_FEED_FORWARD = {False: 0.5, True: 2.0}
_HALF_HEADS = 1.5


@dataclasses.dataclass(frozen=True)
class Arrays:
  """How many arrays there are of each width.

  Attributes:
    stream: of d_model.
    feed_forward: of d_ff.
    heads: of all heads' widths together.
    memory: of the same, but for the tokens of an encoder's output.
    scores: of a query's scores of all keys, of all heads.
    memory_scores: of all of the encoder's output.
  """

  stream: float = 0.0
  feed_forward: float = 0.0
  heads: float = 0.0
  memory: float = 0.0
  scores: float = 0.0
  memory_scores: float = 0.0

  def __add__(self, other: "Arrays") -> "Arrays":
    return Arrays(*(a + b for a, b in zip(
        dataclasses.astuple(self), dataclasses.astuple(other))))

  def __sub__(self, other: "Arrays") -> "Arrays":
    return Arrays(*(a - b for a, b in zip(
        dataclasses.astuple(self), dataclasses.astuple(other))))


@dataclasses.dataclass(frozen=True)
class Block:
  """What decides on a block's arrays.

  Attributes:
    tokens: that a device computes at once.
    causal: it is a decoder's.
    cross: it attends to an encoder's output too.
    kept_scores: its attention to itself keeps scores; else log sums alone.
    kept_memory_scores: the same of its cross-attention.
    half: activations are bfloat16.
    scanned: it is one of those that a loop goes over.
    on_mesh: there are other devices.
  """

  tokens: int
  causal: bool
  cross: bool
  kept_scores: bool
  kept_memory_scores: bool
  half: bool
  scanned: bool
  on_mesh: bool


def kept(model: config_lib.ModelConfig, block: Block,
         backend: str) -> Arrays:
  """What is kept of one layer from its forward to its backward pass."""
  if backend == "cpu":
    return (_cpu_scanned(model, block) if block.scanned
            else _cpu_unrolled(model, block))
  return _accelerator(model, block)


def norms(block: Block) -> int:
  return 3 if block.cross else 2


def norm_arrays(model: config_lib.ModelConfig, block: Block) -> int:
  """Arrays of a norm on a CPU: its input (without the mean, if that is
  taken), that over the deviation, and the transposed result. A layer norm
  keeps the input as it was, too; the library wants scale and deviation as
  whole arrays, and then not that."""
  if block.tokens >= _LIBRARY_ROWS:
    return 5
  return 4 if model.norm == "layer_norm" else 3


# --- CPUs --------------------------------------------------------------------


def _cpu_unrolled(model: config_lib.ModelConfig, block: Block) -> Arrays:
  # Up, what the derivative needs, the product; of a gated one both branches.
  feed_forward = 5 if model.gated else 2 if model.activation == "relu" else 3
  if model.gated and model.remat != "none":
    feed_forward = 4
  found = Arrays(stream=norms(block) * norm_arrays(model, block),
                 feed_forward=(
                     feed_forward - _HALF_FEED_FORWARD[model.gated] *
                     block.half))
  # Queries, keys, values, outputs, the last transposed, too. The blocks' loop
  # has its three results laid out from the start.
  if block.kept_scores:
    # A mask, or a mesh, spares the scores' copy in another order.
    found += Arrays(heads=4, scores=2 if block.causal or block.on_mesh else 3)
  else:
    found += Arrays(heads=8 - _HALF_HEADS * block.half)
  if block.cross:
    found += (Arrays(heads=2, memory=2, memory_scores=3)
              if block.kept_memory_scores else Arrays(heads=4, memory=4))
  return found


def _cpu_scanned(model: config_lib.ModelConfig, block: Block) -> Arrays:
  if model.remat == "full":
    return Arrays(stream=1)
  if model.remat == "dots":
    # The products; the last is not needed but by a norm after it.
    groups = 2 * model.num_kv_heads / model.num_heads
    return Arrays(
        stream=norms(block) + (model.norm_position == "post"),
        feed_forward=2 if model.gated else 1, heads=(
            1 + groups + (1 if block.cross else 0)),
        memory=groups if block.cross else 0)
  return _by_rule(model, block) + Arrays(
      heads=0 if block.kept_scores else 1)


def _by_rule(model: config_lib.ModelConfig, block: Block) -> Arrays:
  """What differentiation by rule keeps of a scanned layer: a loop's body is
  not fused with that of its backward pass."""
  feed_forward = {"relu": 1.25, "gelu": 4, "gelu_tanh": 5, "silu": 5}[
      model.activation]
  found = Arrays(stream=4 * norms(block), heads=4,
                 feed_forward=6 if model.gated else feed_forward,
                 scores=2 if block.kept_scores else 0)
  if block.cross:
    found += Arrays(heads=2 if block.kept_memory_scores else 3, memory=2,
                    memory_scores=2 if block.kept_memory_scores else 0)
  return found


def working(model: config_lib.ModelConfig, block: Block,
            backend: str) -> Arrays:
  """What the backward pass of one layer has beside what is kept."""
  if backend == "cpu":
    return _cpu_working(model, block)
  # What is not kept is computed again; gradients take its place.
  if model.remat == "none":
    return Arrays(stream=1, feed_forward=1)
  whole = _accelerator(dataclasses.replace(model, remat="none"),
                       dataclasses.replace(block, scanned=False))
  return whole - _accelerator(model, block) + Arrays(stream=1)


def _cpu_working(model: config_lib.ModelConfig, block: Block) -> Arrays:
  """In a scan: the slice of what is kept, or what is computed again; gradients;
  the results of the attention's loop, laid out."""
  post, half = model.norm_position == "post", block.half
  heads = 4 if block.kept_scores else 8 - _HALF_HEADS * half
  attention = Arrays(heads=heads, scores=(
      3 if model.remat != "none" else 2) if block.kept_scores else 0)
  if block.cross:
    attention += Arrays(heads=4, memory=4)
  more = norms(block) - 2
  if model.remat == "none":
    return attention + Arrays(stream=(6 if post else 9) + 4 * more,
                              feed_forward=3 if model.gated else 2)
  if model.remat == "dots":
    feed_forward = 1 if model.activation == "relu" else (
        2 if post or model.gated else 3)
    # In float32 the norms around a GELU are computed again late.
    stream = norms(block) * norm_arrays(model, block)
    if not post:
      late = model.activation.startswith("gelu") and not (model.gated or half)
      stream += -2 if late else 2
    return attention + Arrays(stream=stream,
                              feed_forward=feed_forward + 0.5 * half)
  # All of an unrolled layer's, and the gradients of its feed-forward.
  whole = _cpu_unrolled(dataclasses.replace(model, remat="none"), block)
  gradients = {"silu": 2, "relu": 0}.get(
      model.activation, 0 if model.gated else 1)
  return attention + Arrays(
      stream=whole.stream + (0 if post else 2),
      feed_forward=whole.feed_forward + (0 if post else gradients))


# --- Accelerators ------------------------------------------------------------


def _accelerator(model: config_lib.ModelConfig, block: Block) -> Arrays:
  """The operands of the matrix products, which the gradients of weights need
  (Korthikanti et al. 2022, §4.1), but of a norm its input alone: elementwise
  operations are computed again within the fusions that use them. Kernels keep
  a query's log sum instead of its scores (Dao et al. 2022)."""
  if model.remat == "full":
    return Arrays(stream=1)
  none = model.remat == "none"
  if none and block.scanned:
    # Norms compute in float32.
    found = _by_rule(model, block)
    return dataclasses.replace(
        found, stream=found.stream * (2 if block.half else 1))
  groups = 2 * model.num_kv_heads / model.num_heads
  found = Arrays(
      stream=norms(block),
      # Into the nonlinearity, and out of it.
      feed_forward=(2 if model.gated else 1) + none,
      heads=1 + groups + none,
      scores=1 if none and block.kept_scores else 0)
  if block.cross:
    found += Arrays(
        heads=1 + none, memory=groups,
        memory_scores=1 if none and block.kept_memory_scores else 0)
  return found
