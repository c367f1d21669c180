# SPDX-License-Identifier: Apache-2.0
"""Every family's model: tokens -> hidden states -> logits, and its counts.

A model is one stack of blocks, a decoder or an encoder, or both. What makes a
family is in the config (`tfjax.models.families`); what is predicted from what,
and the loss, are in `tfjax.objectives`.

Shape letters: B batch, T length, P predicted positions, S source length,
D model width, V vocabulary.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tfjax import config as config_lib
from tfjax.models import attention
from tfjax.models import inputs as inputs_lib
from tfjax.models import layers
from tfjax.models import parametrization

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(layers.PRODUCT),
}


class Block(nn.Module):
  """Attention, in decoders with an encoder cross-attention, feed-forward.

  Each is added to the stream. `local`: attention is within the window; None:
  the flag that is passed says so.
  """

  config: config_lib.ModelConfig
  backend: str
  decoder: bool
  local: bool | None = False
  first: bool = False

  @nn.compact
  def __call__(
      self, x_BTD: Float[Array, "B T D"], flag: Bool[Array, ""] | None,
      bias_NTS: Float[Array, "N T S"] | None, context: layers.Context,
  ) -> Float[Array, "B T D"]:
    config, backend = self.config, self.backend
    local = flag if self.local is None else self.local
    scale = parametrization.residual_multiplier(config)

    def add(x_BTD, sublayer, name, normed=True):
      norm = layers.Norm(config, name=f"{name}_norm") if normed else lambda x: x
      if config.norm_position == "pre":
        return x_BTD + layers.scaled(sublayer(norm(x_BTD)), scale)
      return norm(x_BTD + sublayer(x_BTD))

    x_BTD = add(x_BTD, lambda x: attention.Attention(
        config, backend, causal=self.decoder, name="attention")(
            x, context, bias_NTS, local), "attention",
                normed=config.first_norm or not self.first)
    if self.decoder and config.architecture == "encoder_decoder":
      x_BTD = add(x_BTD, lambda x: attention.Attention(
          config, backend, causal=False, cross=True, name="cross_attention")(
              x, context), "cross_attention")
    x_BTD = add(x_BTD, layers.FeedForward(
        config, backend, name="feed_forward"), "feed_forward")
    return layers.constrain(x_BTD, "batch", "length", "stream")


class _ScanBlock(nn.Module):
  """A block in the carry form that nn.scan wants."""

  config: config_lib.ModelConfig
  backend: str
  decoder: bool
  local: bool | None

  @nn.compact
  def __call__(self, x_BTD, flag, bias_NTS, context):
    block = Block(self.config, self.backend, self.decoder, self.local,
                  name="block")
    return block(x_BTD, flag, bias_NTS, context), None


class Stack(nn.Module):
  """Positions, blocks and norms of a decoder (causal) or an encoder."""

  config: config_lib.ModelConfig
  backend: str
  dtype: str
  decoder: bool

  def setup(self) -> None:
    config = self.config
    if config.positions == "learned":
      self.position_embedding = Embedding(
          config.context_length + config.position_offset, "position", config)
    if config.num_token_types:
      self.token_type_embedding = Embedding(
          config.num_token_types, "token_type", config)
    if config.embedding_norm:
      self.embedding_norm = layers.Norm(config)
    if config.positions == "relative":
      self.relative_bias = attention.RelativeBias(config, self.decoder)
    self._make_blocks()
    if config.norm_position == "pre":
      self.final_norm = layers.Norm(config)

  def _make_blocks(self) -> None:
    """`unrolled`: those with parameters of their own; `scanned`: the rest."""
    config, local = self.config, local_layers(self.config)
    local = local[:config.num_layers if self.decoder
                  else config.num_encoder_layers]
    remat = functools.partial(
        nn.remat, policy=REMAT_POLICIES.get(config.remat),
        prevent_cse=not config.scan_layers)
    wrap = remat if config.remat != "none" else lambda block: block
    # A first block without its norm has other parameters than the rest.
    alone = len(local)
    if config.scan_layers:
      alone = 0 if config.first_norm else 1
    self.unrolled = [
        wrap(Block)(config, self.backend, self.decoder, local[i], first=i == 0,
                    name=f"block_{i}") for i in range(alone)]
    rest = local[alone:]
    self.scanned, self.flags = None, None
    if rest:
      if len(set(rest)) > 1:
        self.flags = jnp.array(rest)
      self.scanned = nn.scan(
          wrap(_ScanBlock),
          variable_axes={"params": 0, "cache": 0, "intermediates": 0},
          split_rngs={"params": True}, length=len(rest),
          in_axes=(0, nn.broadcast, nn.broadcast),
          metadata_params={nn.PARTITION_NAME: "layers"})(
              config, self.backend, self.decoder,
              None if self.flags is not None else rest[0], name="blocks")

  def __call__(
      self, x_BTD: Float[Array, "B T D"], context: layers.Context,
      token_types: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Hidden states of embedded tokens, normalised if the model is pre-norm."""
    config, dtype = self.config, jnp.dtype(self.dtype)
    length = x_BTD.shape[1]
    places_T = jnp.arange(length)
    if context.start is not None:
      places_T += context.start
    positions_BT = context.positions
    if positions_BT is None:
      positions_BT = places_T[None]
    if config.positions == "learned":
      if length > config.context_length:
        raise ValueError(f"{length} tokens do not fit model.context_length "
                         f"{config.context_length}")
      x_BTD += layers.constrain(self.position_embedding(), None, "stream")[
          positions_BT + config.position_offset].astype(dtype)
    elif config.positions == "sinusoidal":
      x_BTD += layers.sinusoids(positions_BT, config.d_model).astype(dtype)
    if config.num_token_types:
      types = jnp.zeros((1, 1), jnp.int32) if token_types is None else (
          token_types)
      x_BTD += layers.constrain(
          self.token_type_embedding(), None, "stream")[types].astype(dtype)
    if config.embedding_norm:
      x_BTD = self.embedding_norm(x_BTD)
    bias_NTS = None
    if config.positions == "relative":
      keys = length
      if context.start is not None and length == 1:
        keys = context.key_segments.shape[1]
      bias_NTS = self.relative_bias(places_T, keys)
    x_BTD = layers.constrain(x_BTD, "batch", "length", "stream")
    for block in self.unrolled:
      x_BTD = block(x_BTD, None, bias_NTS, context)
    if self.scanned is not None:
      x_BTD, _ = self.scanned(x_BTD, self.flags, bias_NTS, context)
    return self.final_norm(x_BTD) if config.norm_position == "pre" else x_BTD


class Transformer(nn.Module):
  """The model of any family.

  `backend` is the platform that will run it ("cpu", "gpu", "tpu"): forms that
  are fast on one are slow on another. Results agree to rounding.
  """

  config: config_lib.ModelConfig
  backend: str = "cpu"
  dtype: str = "float32"

  def setup(self) -> None:
    config = self.config
    self.token_embedding = Embedding(config.vocab_size, "vocab", config)
    parts = (config, self.backend, self.dtype)
    if config.architecture != "decoder":
      self.encoder = Stack(*parts, decoder=False)
    if config.architecture != "encoder":
      self.decoder = Stack(*parts, decoder=True)
    square = dict(shape=(config.d_model, config.d_model),
                  axes=("embed", "mlp"))
    if config.pooler:
      self.pooler = layers.Projection(
          config, self.backend, use_bias=True, **square)
    if config.head_transform:
      self.head_dense = layers.Projection(config, self.backend, **square)
      self.head_norm = layers.Norm(config)
    if not config.tie_embedding:
      self.untied_head = Embedding(config.vocab_size, "vocab", config)
    if config.head_bias:
      self.head_bias = Bias(config.vocab_size)

  def __call__(self, inputs: inputs_lib.Inputs) -> Float[Array, "B T V"]:
    """Logits, in float32, at every position."""
    hidden_BTD = self.hidden(inputs)
    if self.config.pooler and self.is_initializing():
      self.pooled(hidden_BTD)
    return self.logits(hidden_BTD)

  def hidden(self, inputs: inputs_lib.Inputs) -> Float[Array, "B T D"]:
    """The last hidden states of the decoder, or of a lone encoder."""
    context = layers.Context(inputs.segments, inputs.positions, inputs.prefix)
    architecture = self.config.architecture
    if (inputs.source is None) == (architecture == "encoder_decoder"):
      raise ValueError(f"the architecture {architecture!r} takes "
                       f"{'a' if inputs.source is None else 'no'} source")
    if inputs.prefix is not None and architecture == "encoder":
      raise ValueError("an encoder sees everything; a prefix is for decoders")
    if architecture == "encoder":
      return self.encoder(self._embed(inputs.tokens), context,
                          inputs.token_types)
    if architecture == "encoder_decoder":
      context = context.replace(memory=self.encode(inputs.source),
                                memory_segments=inputs.source.segments)
    return self.decode(inputs.tokens, context, inputs.token_types)

  def encode(self, source: inputs_lib.Inputs) -> Float[Array, "B S D"]:
    """What an encoder-decoder's decoder attends to."""
    return self.encoder(
        self._embed(source.tokens),
        layers.Context(source.segments, source.positions), source.token_types)

  def decode(
      self, tokens_BT: Int[Array, "B T"], context: layers.Context,
      token_types: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """The decoder's hidden states; with a cache where the context says so."""
    return self.decoder(self._embed(tokens_BT), context, token_types)

  def pooled(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    """A dense layer and tanh over the first token (Devlin et al. 2019)."""
    return jnp.tanh(self.pooler(hidden_BTD[:, :1])[:, 0])

  def features(self, hidden_BPD: Float[Array, "B P D"]) -> Float[
      Array, "B P D"]:
    """What the head's kernel is applied to."""
    config = self.config
    if config.head_transform:
      hidden_BPD = self.head_norm(layers.ACTIVATIONS[config.activation](
          self.head_dense(hidden_BPD)))
    return layers.scaled(
        hidden_BPD, parametrization.head_multiplier(config))

  def head(self) -> tuple[Float[Array, "V D"], Float[Array, "V"] | None]:
    """The kernel that features are multiplied by, and the bias, if any."""
    kernel_VD = (self.token_embedding() if self.config.tie_embedding
                 else self.untied_head())
    return kernel_VD, self.head_bias() if self.config.head_bias else None

  def logits(self, hidden_BPD: Float[Array, "B P D"]) -> Float[
      Array, "B P V"]:
    """Logits, in float32, of some hidden states."""
    features_BPD = self.features(hidden_BPD)
    kernel_VD, bias_V = self.head()
    logits_BPV = jnp.einsum(
        "bpd,vd->bpv", features_BPD, kernel_VD.astype(features_BPD.dtype),
        preferred_element_type=jnp.float32)
    return logits_BPV if bias_V is None else logits_BPV + bias_V

  def _embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    x_BTD = layers.lookup(self.token_embedding(), tokens_BT).astype(
        jnp.dtype(self.dtype))
    return layers.scaled(
        x_BTD, parametrization.embedding_multiplier(self.config))


class Embedding(nn.Module):
  """A table of vectors; a call returns the table."""

  rows: int
  axis: str
  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self) -> Float[Array, "V D"]:
    return layers.parameter(
        self, "embedding", parametrization.initializer(
            self.config, (*self.path, "embedding"), self.rows),
        (self.rows, self.config.d_model), (self.axis, "embed"))


class Bias(nn.Module):
  """The head's bias; a call returns it."""

  rows: int

  @nn.compact
  def __call__(self) -> Float[Array, "V"]:
    return layers.parameter(self, "bias", nn.initializers.zeros, (self.rows,),
                            ("vocab",))


def local_layers(config: config_lib.ModelConfig) -> list[bool]:
  """Which layers attend within the window."""
  every = config.global_every
  return [bool(config.window) and (not every or i % every != 0)
          for i in range(max(config.num_layers, config.num_encoder_layers))]


def create(config: config_lib.ModelConfig, backend: str = "cpu",
           dtype: str = "float32") -> Transformer:
  """The module of a config whose fields are all set, the vocabulary too."""
  if config.vocab_size is None:
    raise config_lib.ConfigError(
        "model.vocab_size", "is not known yet; take it from the tokenizer")
  if config.architecture is None:
    raise config_lib.ConfigError(
        "model.architecture", "is not set; pass the config through "
        "tfjax.config.complete_model first")
  return Transformer(config, backend, dtype)


# --- Parameters --------------------------------------------------------------


def stack_layers(params: dict, config: config_lib.ModelConfig) -> dict:
  """Parameters of unrolled layers in the form that scan_layers has them."""
  scanned = {}
  for name, subtree in params.items():
    blocks = sorted((key for key in subtree if key.startswith("block_")),
                    key=lambda key: int(key.removeprefix("block_")))
    rest = blocks if config.first_norm else blocks[1:]
    scanned[name] = {k: v for k, v in subtree.items() if k not in rest}
    if rest:
      scanned[name]["blocks"] = {"block": jax.tree.map(
          lambda *x: jnp.stack(x), *(subtree[key] for key in rest))}
  return scanned


def unstack_layers(params: dict, config: config_lib.ModelConfig) -> dict:
  """The inverse of `stack_layers`."""
  unrolled = {}
  for name, subtree in params.items():
    unrolled[name] = {k: v for k, v in subtree.items() if k != "blocks"}
    if "blocks" in subtree:
      stacked = subtree["blocks"]["block"]
      first = 0 if config.first_norm else 1
      for i in range(len(jax.tree.leaves(stacked)[0])):
        unrolled[name][f"block_{first + i}"] = jax.tree.map(
            lambda x, i=i: x[i], stacked)
  return unrolled


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
  """How many parameters there are, by the part of the model they sit in.

  A tied head's kernel counts as embedding; `head` is what else the head has.
  `total` is the sum.
  """

  embedding: int
  non_embedding: int
  head: int

  @property
  def total(self) -> int:
    return self.embedding + self.non_embedding + self.head


def abstract_parameters(module: Transformer) -> dict:
  """Shapes and logical axes of the parameters; nothing is computed."""
  # The key as well: JAX need not begin for it, with the devices of that time.
  return jax.eval_shape(lambda: module.init(
      jax.random.key(0), example_inputs(module.config)))["params"]


def example_inputs(config: config_lib.ModelConfig, batch_size: int = 1,
                   length: int = 1) -> inputs_lib.Inputs:
  """Inputs that use every parameter."""
  tokens = jnp.zeros((batch_size, length), jnp.int32)
  source = (inputs_lib.Inputs(tokens)
            if config.architecture == "encoder_decoder" else None)
  return inputs_lib.Inputs(tokens, source=source)


_EMBEDDINGS = {"token_embedding", "position_embedding", "token_type_embedding"}
_HEADS = {"untied_head", "head_bias", "head_dense", "head_norm"}


@functools.lru_cache(maxsize=256)
def count_parameters(config: config_lib.ModelConfig) -> ParameterCounts:
  """The split, from the shapes that the module would make."""
  sizes = dict(embedding=0, non_embedding=0, head=0)

  def add(path, leaf):
    names = {key.key for key in path}
    kind = ("embedding" if names & _EMBEDDINGS
            else "head" if names & _HEADS else "non_embedding")
    sizes[kind] += leaf.size
  jax.tree_util.tree_map_with_path(
      add, nn.meta.unbox(abstract_parameters(create(config))))
  return ParameterCounts(**sizes)
