# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model directory <-> a ModelConfig and parameters.

What is in config.json is in settings.py, which tensor is which parameter in
mappings.py; here both are put to use.

Shape letters: B batch, T length.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
from typing import Any, Callable, Mapping
import warnings

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from tfjax import config as config_lib
from tfjax.hub import errors
from tfjax.hub import mappings
from tfjax.hub import settings as settings_lib
from tfjax.hub import weights
from tfjax.models import inputs as inputs_lib
from tfjax.models import parametrization
from tfjax.models import transformer

# What of a directory a tokenizer may consist of.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")

Index = tuple[slice, ...]


def load(
    directory: str | os.PathLike[str],
    *,
    shardings: Callable[[dict], Any] | None = None,
    scan_layers: bool = False,
    dtype: Any = jnp.float32,
    allow_pickle: bool = False,
) -> tuple[config_lib.ModelConfig, dict]:
  """The model of a directory with config.json and safetensors.

  A bare model (BertModel) gets its embedding for a head, without transform
  and bias. Parts of a model that only other heads use are left out with a
  warning (BERT's sentence head).

  Args:
    directory: where config.json, and model.safetensors or its shards are.
    shardings: the parameters with their logical axes -> a sharding each, as
      `tfjax.train.sharding.parameter_shardings` gives; None: the first
      device. Every device's part is read on its own, so that host memory
      holds the parts of one parameter at a time.
    scan_layers: parameters in the form of config.scan_layers.
    dtype: of the parameters, however they are stored.
    allow_pickle: read pytorch_model.bin where there are no safetensors.

  Raises:
    HubError: an architecture or option that is not supported; unknown,
      missing, misshapen or contradictory tensors.
  """
  found = _inspect(pathlib.Path(directory), scan_layers, allow_pickle)
  targets = (None if shardings is None else
             traverse_util.flatten_dict(shardings(found.boxed), sep="/"))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = {
      path: jax.make_array_from_callback(
          shape, here if targets is None else targets[path],
          functools.partial(read_slice, found.stored, found.names,
                            found.rows[path], shape, np.dtype(dtype)))
      for path, shape in shapes_of(found.boxed).items()}
  return found.config, traverse_util.unflatten_dict(params, sep="/")


def read_config(directory: str | os.PathLike[str], *,
                allow_pickle: bool = False) -> config_lib.ModelConfig:
  """The config that `load` would give; no weights are kept.

  Raises:
    HubError: as `load`.
  """
  return _inspect(pathlib.Path(directory), False, allow_pickle).config


def save(
    config: config_lib.ModelConfig,
    params: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    token_ids: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a directory that transformers loads, weights as safetensors.

  Those of a model that is parametrized by width or depth are written as a
  standard one's (`parametrization.fold`), which computes the same.

  Args:
    config: complete, as `load` or `tfjax.config.complete_model` gives it.
    params: its parameters, of scanned layers or not as the config says.
    directory: new, or without a model.
    tokenizer: a directory whose tokenizer files are copied.
    token_ids: special tokens for config.json, such as eos_token_id; those
      that are not given are null.
    dtype: of the weights as they are written.
    max_shard_bytes: larger models are cut into several files.

  Raises:
    HubError: transformers has no model that computes what the config says,
      the directory holds a model, or a weight is too large for dtype.
  """
  directory, dtype = pathlib.Path(directory), np.dtype(dtype)
  # transformers knows no multipliers.
  config, params = parametrization.fold(config, nn.meta.unbox(params))
  settings = settings_lib.write(config, token_ids or {})
  kind = settings["model_type"]
  flat = traverse_util.flatten_dict(params, sep="/")
  shapes = shapes_of(
      transformer.abstract_parameters(transformer.create(config)))
  wrong = [f"{path} {tuple(flat[path].shape)}, not {shape}"
           for path, shape in shapes.items() if path in flat
           and tuple(flat[path].shape) != shape]
  if wrong or set(flat) != set(shapes):
    raise errors.HubError(
        "the parameters are not those of the config: "
        f"{', '.join(wrong + sorted(set(flat) ^ set(shapes)))}")
  rows = mappings.rows(kind, config, list(shapes))
  tensors, sizes = _stored_form(kind, config, flat, rows, dtype)
  settings["dtype"] = dtype.name
  prefix = mappings.TENSORS[kind].prefix
  if settings_lib.is_bare(settings):
    name_of = lambda name: name.removeprefix(f"{prefix}.")
  else:
    name_of = lambda name: name
  if there := sorted(p.name for p in directory.glob("*.safetensors*")):
    raise errors.HubError(f"{directory} holds {there[0]}; choose another "
                          "directory, or delete the model there")
  largest = jnp.finfo(dtype).max
  if any(jnp.finfo(x.dtype).max > largest for x in flat.values()):
    for make in tensors.values():  # before anything is written
      make()
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "config.json").write_text(
      json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  order = sorted(tensors)
  weights.write(
      directory, {name_of(n): sizes[n] for n in order},
      ((name_of(n), tensors[n]()) for n in order), max_shard_bytes)
  if tokenizer is not None:
    for name in TOKENIZER_FILES:
      if (pathlib.Path(tokenizer) / name).is_file():
        shutil.copyfile(pathlib.Path(tokenizer) / name, directory / name)


def read_settings(directory: str | os.PathLike[str],
                  name: str = "config.json") -> dict[str, Any]:
  """The content of a directory's config.json, or a file like it."""
  path = pathlib.Path(directory) / name
  try:
    settings = json.loads(path.read_bytes())
  except OSError as error:
    raise errors.HubError(f"{path} cannot be read ({error})") from error
  except ValueError as error:
    raise errors.HubError(f"{path} is not JSON ({error})") from error
  if not isinstance(settings, dict):
    raise errors.HubError(f"{path} is not a JSON object")
  return settings


def inputs(
    config: config_lib.ModelConfig,
    input_ids: Int[Array, "B T"],
    attention_mask: Int[Array, "B T"] | None = None,
    token_type_ids: Int[Array, "B T"] | None = None,
    decoder_input_ids: Int[Array, "B S"] | None = None,
    decoder_attention_mask: Int[Array, "B S"] | None = None,
) -> inputs_lib.Inputs:
  """What transformers calls by these names, as a model of ours takes it.

  Masks are 1 at tokens and 0 at padding. Decoders, as in transformers'
  `generate`, and RoBERTa count positions over tokens alone, others over
  places.
  """
  def one(tokens, mask, types=None):
    positions = None
    if mask is not None and (
        config.architecture == "decoder" or config.family == "roberta"):
      positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return inputs_lib.Inputs(tokens, segments=mask, positions=positions,
                             token_types=types)

  source = one(input_ids, attention_mask, token_type_ids)
  if config.architecture != "encoder_decoder":
    return source
  return one(decoder_input_ids, decoder_attention_mask).replace(source=source)


# --- Reading -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Found:
  """A directory whose config.json and tensors are what a model needs.

  `names` are those of the tables -> those in the directory; `boxed` are the
  parameters' shapes and axes; `rows` say where each is.
  """

  config: config_lib.ModelConfig
  stored: weights.Stored
  names: Mapping[str, str]
  boxed: dict
  rows: Mapping[str, list[mappings.Row]]


def _inspect(directory: pathlib.Path, scan_layers: bool,
             allow_pickle: bool) -> _Found:
  settings = read_settings(directory)
  try:
    kind = settings_lib.model_type(settings)
    stored = weights.Stored.open(directory, allow_pickle)
    names = _canonical_names(kind, stored)
    config = dataclasses.replace(
        settings_lib.read(
            settings, _told_by_tensors(kind, settings, stored, names)),
        scan_layers=scan_layers)
    boxed = transformer.abstract_parameters(transformer.create(config))
    shapes = shapes_of(boxed)
    rows = mappings.rows(kind, config, list(shapes))
    _check(kind, config, stored, names, shapes, rows)
  except errors.HubError as error:
    raise errors.HubError(f"{directory}: {error}") from None
  return _Found(config, stored, names, boxed, rows)


def shapes_of(boxed: dict) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every parameter."""
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(
      nn.meta.unbox(boxed), sep="/").items()}


def _canonical_names(kind: str, stored: weights.Stored) -> dict[str, str]:
  """Name in the mapping's tables -> name in the directory."""
  names = {}
  prefix = mappings.TENSORS[kind].prefix
  bodies = {row.theirs.split(".")[1] for row in mappings.TENSORS[kind].rows
            if prefix and row.theirs.startswith(f"{prefix}.")}
  for name in stored:
    # The first releases of BERT called norms' weights so.
    full = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    full = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", full)
    if full.split(".")[0] in bodies:
      full = f"{prefix}.{full}"
    if full in names:
      raise errors.HubError(f"{names[full]} and {name} are the same tensor")
    names[full] = name
  return names


def _told_by_tensors(kind: str, settings: Mapping[str, Any],
                     stored: weights.Stored,
                     names: Mapping[str, str]) -> dict[str, Any]:
  """The fields that config.json does not tell."""
  if kind == "t5":
    # transformers 5 writes tie_word_embeddings true whatever the model.
    head, embedding = names.get("lm_head.weight"), names.get("shared.weight")
    if head is None:
      return dict(tie_embedding=settings.get(
          "tie_word_embeddings") is not False)
    return dict(tie_embedding=embedding is not None and
                stored.equal(head, embedding))
  if kind == "bart":
    bias = names.get("final_logits_bias")
    return dict(head_bias=bias is not None and any(
        chunk.any() for chunk in stored.whole(bias)))
  return {}


def _check(kind: str, config: config_lib.ModelConfig, stored: weights.Stored,
           names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]],
           rows: Mapping[str, list[mappings.Row]]) -> None:
  """Raises where the tensors are not exactly those that the model needs."""
  tensors = mappings.TENSORS[kind]
  wanted = {}
  for path, mine in rows.items():
    wanted.update((row.theirs, row.stored_shape(
        shapes[path][1:] if row.stacked else shapes[path])) for row in mine)
  missing = sorted(set(wanted) - set(names))
  if missing:
    raise errors.HubError(f"{len(missing)} tensor(s) are missing: "
                          f"{_some(missing)}")
  copies = {name: original
            for name, original in mappings.copies(kind, config).items()
            if name in names and original in names}
  extra = sorted(set(names) - set(wanted) - set(copies))
  extra = [n for n in extra if not re.fullmatch(tensors.buffers, n)]
  unknown = [n for n in extra if not re.fullmatch(tensors.left_out, n)]
  if unknown:
    raise errors.HubError(
        f"{len(unknown)} tensor(s) have no place in a "
        f"{config.family} model: {_some(unknown)}")
  for name, shape in wanted.items():
    found = stored.shape(names[name])
    if found != shape:
      raise errors.HubError(f"tensor {names[name]} has the shape {found}; by "
                            f"config.json it must be {shape}")
    stored.dtype(names[name])
  for name, original in copies.items():
    if not stored.equal(names[name], names[original]):
      raise errors.HubError(
          f"tensors {names[name]} and {names[original]} differ but are one "
          f"in a model with tie_word_embeddings={config.tie_embedding}")
  if extra:
    warnings.warn(f"left out, as a {config.family} model here has no such "
                  f"part: {_some(extra)}", stacklevel=4)


def _some(names: list[str]) -> str:
  more = f" and {len(names) - 8} more" if len(names) > 8 else ""
  return ", ".join(names[:8]) + more


def read_slice(
    stored: weights.Stored, names: Mapping[str, str],
    rows: list[mappings.Row], shape: tuple[int, ...], dtype: np.dtype,
    index: Index,
) -> np.ndarray:
  """The slice of a parameter that a device holds; of several rows, each is
  a layer of it."""
  index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape))
  result = np.empty([s.stop - s.start for s in index], dtype)
  if not rows[0].stacked:
    _fill(result, stored, names, rows[0], shape, index)
  else:
    for place, row in enumerate(rows[index[0]]):
      _fill(result[place], stored, names, row, shape[1:], index[1:])
  return result


def _fill(result: np.ndarray, stored: weights.Stored,
          names: Mapping[str, str], row: mappings.Row,
          shape: tuple[int, ...], index: Index) -> None:
  """Reads what a row says, some rows of the stored tensor at a time."""
  _, outputs = row.matrix_shape(shape)
  if row.layout in ("vector", "row"):
    shape, index = (1, *shape), (slice(0, 1), *index)
  # Outputs may be heads x head width: whole heads are read, then cut.
  ins, first, rest = index[0], index[1], index[2:]
  width = math.prod(shape[2:])
  outs = slice(row.part * outputs + first.start * width,
               row.part * outputs + first.stop * width)
  whole = [(s.start, s.stop) for s in rest] == [(0, n) for n in shape[2:]]
  rows, columns = outs.stop - outs.start, ins.stop - ins.start
  matrix = (result.reshape(columns, rows) if whole else
            np.empty((columns, rows), result.dtype))
  name = names[row.theirs]
  if row.layout == "transposed":
    for place, chunk in stored.chunks(name, outs, ins):
      matrix[:, place] = chunk.T
  elif row.layout == "vector":
    for place, chunk in stored.chunks(name, outs):
      matrix[0, place] = chunk
  else:
    for place, chunk in stored.chunks(name, ins, outs):
      matrix[place] = chunk
  if not whole:
    result[...] = matrix.reshape(
        columns, -1, *shape[2:])[:, :, *rest].reshape(result.shape)


# --- Writing -----------------------------------------------------------------


def _stored_form(
    kind: str, config: config_lib.ModelConfig, flat: Mapping[str, Any],
    rows: Mapping[str, list[mappings.Row]], dtype: np.dtype,
) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, int]]:
  """How to make each stored tensor, and its bytes."""
  parts: dict[str, list[tuple[mappings.Row, Callable[[], Any]]]] = {}
  sizes: dict[str, int] = {}
  for path, mine in rows.items():
    for layer, row in enumerate(mine):
      get = functools.partial(
          lambda x, i: x if i is None else x[i], flat[path],
          layer if row.stacked else None)
      parts.setdefault(row.theirs, []).append((row, get))
      sizes[row.theirs] = (sizes.get(row.theirs, 0) +
                           flat[path].size // len(mine) * dtype.itemsize)
  if not config.tie_embedding and mappings.TENSORS[kind].untied_copies:
    for name, original in mappings.copies(kind, config).items():
      if original in parts:
        parts[name], sizes[name] = parts[original], sizes[original]
  return {name: functools.partial(_joined, name, mine, dtype)
          for name, mine in parts.items()}, sizes


def _joined(name: str, parts: list[tuple[mappings.Row, Callable[[], Any]]],
            dtype: np.dtype) -> np.ndarray:
  """The stored tensor of all its parts."""
  arrays = []
  for row, get in sorted(parts, key=lambda part: part[0].part):
    x = np.asarray(get())
    matrix = x.reshape(row.matrix_shape(x.shape))
    arrays.append({"transposed": matrix.T, "vector": matrix[0]}.get(
        row.layout, matrix))
  axis = 1 if parts[0][0].layout in ("matrix", "row") else 0
  whole = np.concatenate(arrays, axis)
  if whole.dtype == dtype:
    return np.ascontiguousarray(whole)
  with np.errstate(over="ignore"):
    stored = np.ascontiguousarray(whole, dtype)
  lost = np.isfinite(whole) & ~np.isfinite(stored)
  if lost.any():
    raise errors.HubError(
        f"tensor {name} holds {whole[lost][0]:g}, which {dtype.name} cannot; "
        "choose another dtype")
  return stored
