# SPDX-License-Identifier: Apache-2.0
"""The persistent cache of compiled programs, and what it is worth.

Processes share it: what one has compiled the others read, at once and from
launch to launch. How many seconds compiling took is the clock's to say
(`tfjax.train.clock`).
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile

import jax
from jax._src import lru_cache  # writes the entries; no public way to them

from tfjax import config as config_lib


@dataclasses.dataclass
class Counts:
  """Programs that were read from the cache, and that were not there."""

  hits: int = 0
  misses: int = 0


_total = Counts()  # of this process
_EVENTS = {"/jax/compilation_cache/cache_hits": "hits",
           "/jax/compilation_cache/cache_misses": "misses"}


def use_cache(runtime: config_lib.RuntimeConfig) -> None:
  """Compiled programs are kept on disk over processes from now on."""
  directory = runtime.compilation_cache_dir
  if directory:
    lru_cache.LRUCache.put = _put_whole
    directory = str(pathlib.Path(directory).expanduser())
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def counts() -> Counts:
  """What this process has read and has compiled until now."""
  return dataclasses.replace(_total)


def since(before: Counts) -> Counts:
  """What has come since `before` was counted."""
  return Counts(_total.hits - before.hits, _total.misses - before.misses)


def _count(event: str, **_: object) -> None:
  if name := _EVENTS.get(event):
    setattr(_total, name, getattr(_total, name) + 1)


jax.monitoring.register_event_listener(_count)


_SUFFIX = lru_cache._CACHE_SUFFIX  # pylint: disable=protected-access
_put_in_place = lru_cache.LRUCache.put


def _put_whole(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
  """JAX writes an entry in place: another process may read one that is half
  written, and one that a kill has cut short stays for ever, cannot be read,
  and is never replaced. Here it is there whole or not at all."""
  if self.eviction_enabled or not os.path.isdir(self.path):  # not a local one
    _put_in_place(self, key, value)
    return
  path = self.path / f"{key}{_SUFFIX}"
  if path.exists():
    return
  descriptor, temporary = tempfile.mkstemp(
      prefix=".", suffix=".part", dir=self.path)
  try:
    with open(descriptor, "wb") as file:
      file.write(value)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise
