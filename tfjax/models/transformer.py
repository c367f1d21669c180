# SPDX-License-Identifier: Apache-2.0
"""The decoder: tokens -> hidden states -> logits, and its parameter counts.

What is predicted from what, and the loss, are in `tfjax.objectives`.

Shape letters: B batch, T length, D model width, V vocabulary.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tfjax import config as config_lib
from tfjax.models import attention
from tfjax.models import layers

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
  """Pre-norm attention and feed-forward, each added to the stream."""

  config: config_lib.ModelConfig
  backend: str

  @nn.compact
  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config, backend = self.config, self.backend
    x_BTD += attention.Attention(config, backend, name="attention")(
        layers.Norm(config, name="attention_norm")(x_BTD))
    x_BTD += layers.FeedForward(config, backend, name="feed_forward")(
        layers.Norm(config, name="feed_forward_norm")(x_BTD))
    return layers.constrain(x_BTD, "batch", "length", "embed")


class Decoder(nn.Module):
  """A GPT-style decoder (Radford et al. 2019 and its variations).

  `backend` is the platform that will run it ("cpu", "gpu", "tpu"): forms that
  are fast on one are slow on another. Results agree to rounding.
  """

  config: config_lib.ModelConfig
  backend: str = "cpu"
  dtype: str = "float32"

  def setup(self) -> None:
    config = self.config
    self.token_embedding = Embedding(
        config.vocab_size, "vocab", config.d_model, config.init_std)
    if config.positions == "learned":
      self.position_embedding = Embedding(
          config.context_length, "position", config.d_model, config.init_std)
    block = _ScanBlock if config.scan_layers else Block
    if config.remat != "none":
      block = nn.remat(block, policy=REMAT_POLICIES[config.remat],
                       prevent_cse=not config.scan_layers)
    if config.scan_layers:
      self.blocks = nn.scan(
          block, variable_axes={"params": 0}, split_rngs={"params": True},
          length=config.num_layers,
          metadata_params={nn.PARTITION_NAME: "layers"})(
              config, self.backend)
    else:
      self.blocks = [block(config, self.backend, name=f"block_{i}")
                     for i in range(config.num_layers)]
    self.final_norm = layers.Norm(config)
    if not config.tie_embedding:
      self.head = Embedding(
          config.vocab_size, "vocab", config.d_model, config.init_std)

  def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits, in float32."""
    x_BTD = self.hidden(tokens_BT)
    return jnp.einsum("btd,vd->btv", x_BTD,
                      self.head_kernel().astype(x_BTD.dtype),
                      preferred_element_type=jnp.float32)

  def hidden(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The normalised last hidden states, to be multiplied by the head."""
    length = tokens_BT.shape[1]
    if length > self.config.context_length:
      raise ValueError(f"{length} tokens do not fit model.context_length "
                       f"{self.config.context_length}")
    dtype = jnp.dtype(self.dtype)
    x_BTD = self.token_embedding()[tokens_BT].astype(dtype)
    if self.config.positions == "learned":
      x_BTD += self.position_embedding()[:length].astype(dtype)
    x_BTD = layers.constrain(x_BTD, "batch", "length", "embed")
    if self.config.scan_layers:
      x_BTD, _ = self.blocks(x_BTD, None)
    else:
      for block in self.blocks:
        x_BTD = block(x_BTD)
    return self.final_norm(x_BTD)

  def head_kernel(self) -> Float[Array, "V D"]:
    """What hidden states are multiplied by to give logits."""
    if self.config.tie_embedding:
      return self.token_embedding()
    return self.head()


class Embedding(nn.Module):
  """A table of vectors; a call returns the table."""

  rows: int
  axis: str
  width: int
  std: float

  @nn.compact
  def __call__(self) -> Float[Array, "V D"]:
    return layers.parameter(self, "embedding", nn.initializers.normal(self.std),
                            (self.rows, self.width), (self.axis, "embed"))


class _ScanBlock(nn.Module):
  """A block in the carry form that nn.scan wants."""

  config: config_lib.ModelConfig
  backend: str

  @nn.compact
  def __call__(self, x_BTD: Array, _: None) -> tuple[Array, None]:
    return Block(self.config, self.backend, name="block")(x_BTD), None


MODELS = {"decoder": Decoder}


def create(config: config_lib.ModelConfig, backend: str = "cpu",
           dtype: str = "float32") -> nn.Module:
  """The module of a config whose vocabulary is known."""
  if config.vocab_size is None:
    raise config_lib.ConfigError(
        "model.vocab_size", "is not known yet; take it from the tokenizer")
  return MODELS[config.family](config, backend, dtype)


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
  """How many parameters there are, by the part of the model they sit in.

  A tied head counts as embedding; `head` is then 0. `total` is the sum.
  """

  embedding: int
  non_embedding: int
  head: int

  @property
  def total(self) -> int:
    return self.embedding + self.non_embedding + self.head


def abstract_parameters(module: nn.Module) -> dict:
  """Shapes and logical axes of the parameters; nothing is computed."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]


@functools.lru_cache(maxsize=256)
def count_parameters(config: config_lib.ModelConfig) -> ParameterCounts:
  """The split, from the shapes that the module would make."""
  sizes = dict(embedding=0, non_embedding=0, head=0)
  parameters = nn.meta.unbox(abstract_parameters(create(config)))
  for name, subtree in parameters.items():
    kind = ("embedding" if name in ("token_embedding", "position_embedding")
            else "head" if name == "head" else "non_embedding")
    sizes[kind] += sum(leaf.size for leaf in jax.tree.leaves(subtree))
  return ParameterCounts(**sizes)
