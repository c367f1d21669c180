# SPDX-License-Identifier: Apache-2.0
"""Files of named tensors: slices of what is there, and shards of what is new.

safetensors are read a slice at a time. A pickle is read whole, by torch with
weights_only, and only where the caller allows it.
"""

import json
import pathlib
import pickle
from typing import Any, Iterable, Iterator

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from tfjax.hub import errors

_SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_CHUNK_BYTES = 1 << 24  # read at a time
# safetensors' names of the types that are weights.
_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16,
          "BF16": jnp.bfloat16}


class Stored:
  """Tensors by name; none is read before it is asked for."""

  def __init__(self, tensors: dict[str, Any]):
    """`tensors` are arrays, or what safetensors calls slices."""
    self._tensors = tensors

  @classmethod
  def open(cls, directory: pathlib.Path, allow_pickle: bool) -> "Stored":
    """The tensors of a directory.

    Raises:
      HubError: there are none, or not where the index says.
    """
    tensors: dict[str, Any] = {}
    if files := _files(directory, _SAFETENSORS):
      for path in files:
        # A slice keeps its file open.
        file = _open(path)
        tensors.update((name, file.get_slice(name)) for name in file.keys())
    elif files := _files(directory, _PICKLE):
      if not allow_pickle:
        raise errors.HubError(
            f"{_PICKLE} is a pickle, and there is no {_SAFETENSORS}; allow "
            "it to be read (allow_pickle, with torch's weights_only)")
      for path in files:
        tensors.update(_unpickled(path))
    else:
      raise errors.HubError(
          f"there is neither {_SAFETENSORS} nor {_SAFETENSORS}.index.json")
    return cls(tensors)

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __contains__(self, name: str) -> bool:
    return name in self._tensors

  def shape(self, name: str) -> tuple[int, ...]:
    tensor = self._tensors[name]
    return tuple(tensor.shape if isinstance(tensor, np.ndarray)
                 else tensor.get_shape())

  def dtype(self, name: str) -> np.dtype:
    """Of the numbers as they are stored."""
    tensor = self._tensors[name]
    if isinstance(tensor, np.ndarray):
      return tensor.dtype
    kind = tensor.get_dtype()
    if kind not in _TYPES:
      raise errors.HubError(f"tensor {name} is stored as {kind}; supported: "
                            f"{', '.join(_TYPES)}")
    return np.dtype(_TYPES[kind])

  def chunks(self, name: str, rows: slice, columns: slice | None = None,
             ) -> Iterator[tuple[slice, np.ndarray]]:
    """A slice of a tensor of one or two dimensions, some rows at a time.

    Yields the place of these rows in the slice, and them.
    """
    shape, tensor = self.shape(name), self._tensors[name]
    width = 1 if len(shape) == 1 else columns.stop - columns.start
    size = max(1, _CHUNK_BYTES // (width * self.dtype(name).itemsize))
    for start in range(rows.start, rows.stop, size):
      stop = min(start + size, rows.stop)
      index = (slice(start, stop), *([] if len(shape) == 1 else [columns]))
      yield slice(start - rows.start, stop - rows.start), tensor[index]

  def whole(self, name: str) -> Iterator[np.ndarray]:
    """All of a tensor, some rows at a time."""
    shape = self.shape(name)
    columns = slice(0, shape[1]) if len(shape) == 2 else None
    for _, chunk in self.chunks(name, slice(0, shape[0]), columns):
      yield chunk

  def equal(self, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers."""
    return self.shape(one) == self.shape(other) and all(
        np.array_equal(a, b)
        for a, b in zip(self.whole(one), self.whole(other), strict=True))


def _files(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The file of this name, or the shards that its index names."""
  index = directory / f"{name}.index.json"
  if (directory / name).is_file():
    return [directory / name]
  if not index.is_file():
    return []
  try:
    names = set(json.loads(index.read_bytes())["weight_map"].values())
  except (ValueError, KeyError, AttributeError) as error:
    raise errors.HubError(f"{index} is no index ({error!r})") from error
  files = [directory / pathlib.Path(name).name for name in sorted(names)]
  missing = [path.name for path in files if not path.is_file()]
  if missing:
    raise errors.HubError(f"{index} names {', '.join(missing)}, not there")
  return files


def _open(path: pathlib.Path) -> Any:
  try:
    return safetensors.safe_open(path, framework="np")
  except safetensors.SafetensorError as error:
    raise errors.HubError(f"{path}: {error}") from error


def _unpickled(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    import torch  # pylint: disable=import-outside-toplevel
  except ImportError as error:
    raise errors.HubError(f"{path.name} needs torch; install it") from error
  try:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, RuntimeError) as error:
    raise errors.HubError(f"{path.name}: {error}") from error
  return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy()
          for name, x in tensors.items() if isinstance(x, torch.Tensor)}


def write(directory: pathlib.Path, sizes: dict[str, int],
          tensors: Iterable[tuple[str, np.ndarray]],
          max_shard_bytes: int) -> None:
  """One safetensors file, or shards of at most so many bytes and their index.

  `sizes` are the bytes of each tensor, in the order in which `tensors` has
  them; a tensor that is larger than a shard gets one of its own. One shard is
  in memory at a time.
  """
  shards: list[list[str]] = []
  room = 0
  for name, size in sizes.items():
    if not shards or size > room:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= size
  iterator = iter(tensors)
  where = {}
  for number, names in enumerate(shards, start=1):
    file = (_SAFETENSORS if len(shards) == 1 else
            f"model-{number:05}-of-{len(shards):05}.safetensors")
    content = dict(next(iterator) for _ in names)
    # transformers refuses a file that does not say what wrote it.
    safetensors_numpy.save_file(content, directory / file, {"format": "pt"})
    where.update(dict.fromkeys(names, file))
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(sizes.values())},
             "weight_map": where}
    (directory / f"{_SAFETENSORS}.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8")
