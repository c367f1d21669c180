# SPDX-License-Identifier: Apache-2.0
"""What the devices of this host reach: matrix products and memory bandwidth.

Part of scripts/bench.py (--peak). All JAX devices work at the same time, as in
training, and figures are of one of them: the best burst of several, over a few
large shapes. They are kept for `tfjax.cost.hardware.peak`, which takes them
where no vendor states a peak. Float32 products are at JAX's default precision,
as in training.
"""

from collections.abc import Callable
import dataclasses
import datetime
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from tfjax.cost import hardware
from tfjax.cost import peaks

P = jax.sharding.PartitionSpec

DTYPES = ("float32", "bfloat16")
# Of a square matrix, and how many columns it is multiplied with.
_CPU_SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (1024, 4096))
_SHAPES = ((4096, 4096), (8192, 8192), (8192, 16384), (16384, 16384))
_BURST_SECONDS = 0.05
# Of each of two arrays, larger than any cache: on CPUs of all devices
# together, else of one.
_CPU_ARRAY_BYTES, _ARRAY_BYTES = 2**29, 2**30
_LEAST_CPU_ARRAY_BYTES = 2**25


def main(seconds: float = 9.0) -> dict[str, Any]:
  """Measures, prints a table and keeps the figures; they are also returned.

  Args:
    seconds: to spend on each of the figures, without compilation.
  """
  device = jax.local_devices()[0]
  measured = peaks.Measured(
      host_cpu=peaks.host_cpu(), device_kind=device.device_kind,
      num_devices=jax.local_device_count(),
      cores_per_device=peaks.cores_per_device(device.device_kind),
      flops_per_second={dtype: matrix_rate(dtype, seconds)
                        for dtype in DTYPES},
      memory_bandwidth_bytes_per_second=memory_bandwidth(seconds / 3),
      date=datetime.date.today().isoformat(), jax_version=jax.__version__)
  _print(measured)
  print(f"kept in {peaks.keep(measured)}")
  return dataclasses.asdict(measured)


def matrix_rate(dtype: str, seconds: float = 9.0) -> float:
  """FLOP/s of one device, the best of several shapes.

  Args:
    seconds: to spend, shared by the shapes; a shape of which not even two
      products would fit into its share is left out.
  """
  shapes = _CPU_SHAPES if jax.default_backend() == "cpu" else _SHAPES
  share, best = seconds / len(shapes), 0.0
  for size, columns in shapes:
    flops = 2 * size * size * columns
    if best and 2 * flops / best > share:
      continue
    x, y = _array((size, size), dtype), _array((size, columns), dtype)
    product = _on_every_device(lambda x, y: x @ y)
    best = max(best, flops / _best_seconds(lambda: product(x, y), share))
  return best


def memory_bandwidth(seconds: float = 3.0) -> float:
  """Bytes a second that one device reads and writes, in a = s a + b.

  Three times an array's size, as in STREAM's triad (McCalpin 1995): what a
  cache reads before it writes does not count.
  """
  size = _ARRAY_BYTES
  if jax.default_backend() == "cpu":
    size = max(_CPU_ARRAY_BYTES // jax.local_device_count(),
               _LEAST_CPU_ARRAY_BYTES)
  a, b = (_array((size // 4,), "float32") for _ in range(2))
  # In place: a new array's pages would have to be made first. Several times,
  # where once is so short that the launch would show.
  repeats = 1 if jax.default_backend() == "cpu" else 16
  triad = _on_every_device(
      lambda a, b: jax.lax.fori_loop(
          0, repeats, lambda _, a: 0.5 * a + b, a), donate_argnums=0)

  def step() -> Any:
    nonlocal a
    a = triad(a, b)
    return a

  return 3 * size * repeats / _best_seconds(step, seconds, most=1)


def _mesh() -> jax.sharding.Mesh:
  return jax.sharding.Mesh(np.array(jax.local_devices()), ("device",))


def _array(shape: tuple[int, ...], dtype: str) -> Any:
  """One such array of random values on every device, stacked."""
  sharding = jax.sharding.NamedSharding(_mesh(), P("device"))
  make = jax.jit(lambda key: jax.random.uniform(
      key, (jax.local_device_count(), *shape), jnp.dtype(dtype), -1, 1),
      out_shardings=sharding)
  return make(jax.random.key(0)).block_until_ready()


def _on_every_device(function: Callable[[Any, Any], Any],
                     **options: Any) -> Callable[[Any, Any], Any]:
  """The function of each device's own arrays, all devices at once."""
  return jax.jit(jax.shard_map(
      lambda x, y: function(x[0], y[0])[None], mesh=_mesh(),
      in_specs=(P("device"), P("device")), out_specs=P("device")), **options)


def _best_seconds(step: Callable[[], Any], seconds: float,
                  most: int = 32) -> float:
  """Of one step, in the fastest of the bursts that the time allows.

  A burst is short, so that one of them finds a busy machine's cores free, and
  of several steps, at most so many, so that none waits for the host.
  """
  def burst(count: int) -> float:
    begin = time.perf_counter()
    jax.block_until_ready([step() for _ in range(count)])
    return (time.perf_counter() - begin) / count

  burst(1)  # compiles
  end = time.perf_counter() + seconds
  best = burst(1)
  count = min(most, max(1, math.ceil(_BURST_SECONDS / best)))
  while time.perf_counter() + count * best < end:
    best = min(best, burst(count))
  return best


def _print(measured: peaks.Measured) -> None:
  """A row for each figure, beside the vendor's where there is one."""
  console = rich.console.Console(width=100)
  table = rich.table.Table(
      title=f"{measured.num_devices} x {measured.device_kind} on "
      f"{measured.host_cpu}, all at work", title_justify="left")
  for heading in ("", "one device", "all", "vendor's, one device", "reached"):
    table.add_column(heading, justify="right" if heading else "left")
  rows = [(f"{dtype} products", rate, "FLOP/s",
           hardware.device(measured.device_kind, dtype).flops)
          for dtype, rate in measured.flops_per_second.items()]
  rows.append(("memory", measured.memory_bandwidth_bytes_per_second, "B/s",
               hardware.device(measured.device_kind,
                               DTYPES[0]).memory_bandwidth))
  for name, rate, unit, stated in rows:
    table.add_row(name, _short(rate, unit),
                  _short(rate * measured.num_devices, unit),
                  _short(stated, unit) if stated else "not known",
                  f"{rate / stated:.0%}" if stated else "")
  console.print(table)


def _short(rate: float, unit: str) -> str:
  prefix, scale = ("T", 1e12) if rate >= 1e12 else ("G", 1e9)
  return f"{rate / scale:.4g} {prefix}{unit}"
