# SPDX-License-Identifier: Apache-2.0
"""Attention by other people's kernels: cuDNN's on GPUs, splash on TPUs.

They see one device's own sequences and heads (attention_shards.py). What each
cannot do is said by `cudnn_problem` and `splash_problem`, from shapes alone;
what neither can (a bias, a prefix, a cache) by attention_choice.py, which sends
such calls to another form.

Shape letters: B batch, N heads, K heads of keys and values, T length, S keys,
H head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tfjax.models import masks

# A TPU's vector registers are so wide; splash's blocks are multiples of it.
_LANES = 128


# --- cuDNN -------------------------------------------------------------------


def cuda_capability() -> tuple[int, ...] | None:
  """The GPU's compute capability, (9, 0) of Hopper; None: there is none to
  ask. A GPU that is not NVIDIA's has (0,)."""
  try:
    device = jax.local_devices(backend="gpu")[0]
  except RuntimeError:
    return None
  try:
    return tuple(int(x) for x in device.compute_capability.split("."))
  except (AttributeError, ValueError):
    return (0,)


def cudnn_problem(
    backend: str, q_BNTH: jax.ShapeDtypeStruct | Array, mask: masks.Mask,
    capability: tuple[int, ...] | None) -> str | None:
  """Why cuDNN cannot compute it, as JAX and cuDNN document it; None: it can.

  Where the GPU is not known, what all since Ampere can do.
  """
  width, dtype = q_BNTH.shape[-1], jnp.dtype(q_BNTH.dtype).name
  if backend != "gpu" or (capability is not None and capability < (8, 0)):
    return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later"
  if dtype not in ("bfloat16", "float16"):
    return f"it computes in bfloat16 or float16, and train.dtype is {dtype}"
  widest = 256 if capability is not None and capability >= (9, 0) else 128
  if width % 8 or width > widest:
    return (f"it needs a head_dim that is a multiple of 8 and at most {widest}"
            f", and this is {width}")
  if mask.segments is not None:
    return "it would need a T x T mask for separate documents or padding"
  if mask.window and not mask.causal:
    return "its windows are causal"
  return None


def cudnn(
    q_BNTH: Float[Array, "B N T H"], k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"], mask: masks.Mask, scale: float = 1.0,
) -> Float[Array, "B N T H"]:
  """cuDNN's flash attention, forwards and backwards; softmax in float32.

  Never run: no GPU was at hand. Tests check what is passed to it.
  """
  q, k, v = (x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSH))
  return jax.nn.dot_product_attention(
      q, k, v, scale=scale, is_causal=mask.causal, implementation="cudnn",
      local_window_size=mask.reach() if mask.window else None).swapaxes(1, 2)


# --- Splash ------------------------------------------------------------------


def splash_problem(
    backend: str, q_BNTH: jax.ShapeDtypeStruct | Array,
    k_BKSH: jax.ShapeDtypeStruct | Array) -> str | None:
  """Why splash attention cannot compute it; None: it can."""
  if backend != "tpu":
    return "it needs a TPU"
  for length in (q_BNTH.shape[2], k_BKSH.shape[2]):
    if length % _LANES:
      return f"it needs lengths that {_LANES} divides, and this is {length}"
  return None


def splash(
    q_BNTH: Float[Array, "B N T H"], k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"], mask: masks.Mask, scale: float = 1.0,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
  """Splash attention, a Pallas kernel of JAX; softmax in float32.

  Blocks that causality or the window exclude are not computed. `interpret`
  runs it on a CPU, as tests do; it has been compiled for TPUs, not run on one.
  """
  # Imported here, as it takes 0.2 s, for nothing where there is no TPU.
  # pylint: disable-next=import-outside-toplevel
  from jax.experimental.pallas.ops.tpu import splash_attention
  kernel = splash_attention.make_splash_mha(
      splash_mask(mask, q_BNTH.shape[1], q_BNTH.shape[2], k_BKSH.shape[2]),
      block_sizes=splash_attention.BlockSizes(
          **splash_blocks(q_BNTH.shape[2], k_BKSH.shape[2])),
      head_shards=1, q_seq_shards=1, interpret=interpret)
  segments = None
  if mask.segments is not None:
    segments = splash_attention.SegmentIds(mask.segments, mask.key_segments)
  return jax.vmap(kernel)(q_BNTH * scale, k_BKSH, v_BKSH, segments)


def splash_mask(mask: masks.Mask, heads: int, length: int, keys: int) -> Any:
  """A mask in splash's own terms, but for its segments."""
  # pylint: disable-next=import-outside-toplevel
  from jax.experimental.pallas.ops.tpu import splash_attention
  shape = (length, keys)
  if mask.window:
    one = splash_attention.LocalMask(shape, mask.reach(), offset=0)
  elif mask.causal:
    one = splash_attention.CausalMask(shape)
  else:
    one = splash_attention.FullMask(shape)
  return splash_attention.MultiHeadMask([one] * heads)


def splash_blocks(length: int, keys: int) -> dict[str, int]:
  """The largest of a few powers of two that divide: 512 fills a v5e's
  matrix units, and its scores fit beside the rest in fast memory."""
  q, kv = (next(size for size in (512, 256, _LANES) if n % size == 0)
           for n in (length, keys))
  return dict(
      block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q,
      block_kv_dkv=kv, block_kv_dkv_compute=kv, block_q_dq=q, block_kv_dq=kv)
