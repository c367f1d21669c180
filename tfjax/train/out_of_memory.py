# SPDX-License-Identifier: Apache-2.0
"""What to tell a person whose run was out of memory: what takes it, and the
cheapest way out.

By the estimate of `tfjax.cost.memory`; nothing is compiled or run, as this
is for machines that have just had enough.
"""

import contextlib
import os
import pathlib

import jax

from tfjax import config as config_lib
from tfjax.cost import estimates
from tfjax.cost import memory as memory_lib
from tfjax.train import ways_out

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max",
                  "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_EVENTS = ("/sys/fs/cgroup/memory.events",
                  "/sys/fs/cgroup/memory/memory.oom_control")


def is_it(error: BaseException) -> bool:
  """Whether an error says that memory, of a device or the host, ran out."""
  return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def explain(error: BaseException, config: config_lib.ExperimentConfig, *,
            members: int | None = None) -> str:
  """What to tell of an error that `is_it`; raises nothing.

  Args:
    config: of the run that it has ended.
    members: runs that trained in one step with it, itself included.
  """
  try:
    if isinstance(error, MemoryError) and jax.default_backend() != "cpu":
      total = host_bytes()
      text = ("the host's memory ran out, not a device's; it has "
              f"{'unknown' if total is None else binary(total)}, and other "
              "programs may have taken most: end them, or start again")
    else:
      text = on_device(config)
  except Exception as unknown:  # pylint: disable=broad-exception-caught
    # It must not take the place of the error that it is to explain.
    text = f"what takes it is not known ({unknown!r})"
  if (members or 1) > 1:
    text = (f"{members} runs train in one step, and each takes its own; "
            "--config.sweep.ensemble=off trains them one by one. Of one "
            f"alone: {text}")
  return text


def on_device(config: config_lib.ExperimentConfig) -> str:
  """Of a run whose devices, those of this process, had too little."""
  devices = jax.devices()
  count = config.runtime.num_devices or len(devices)
  if devices[0].platform == "cpu":  # they share the host's
    return on_host(config, num_devices=count)
  available = (devices[0].memory_stats() or {}).get("bytes_limit")
  return _told(config, devices[0].device_kind, count, available)


def on_host(config: config_lib.ExperimentConfig, *, workers: int = 1,
            num_devices: int = 1) -> str:
  """Of a run that trains on this host's cores.

  Args:
    workers: processes that share its memory.
    num_devices: of the run, which share what a worker has.
  """
  total = host_bytes()
  share = None if total is None else total // workers // num_devices
  text = _told(config, "cpu", num_devices, share)
  if workers > 1:
    text += (f"; {workers} workers share the host's memory of "
             f"{binary(total)}: fewer (--workers={workers // 2}) have more "
             "each")
  return text


def host_bytes() -> int | None:
  """Memory of this host, or of the container that this is; None: unknown."""
  found = []
  with contextlib.suppress(OSError, ValueError):
    found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
  for path in _CGROUP_LIMITS:
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
      found.append(int(pathlib.Path(path).read_text()))
  return min(found, default=None)


def kernel_kills() -> int | None:
  """How many processes this host's kernel has killed for want of memory since
  it was started; None where it does not tell."""
  found = []
  for path in ("/proc/vmstat", *_CGROUP_EVENTS):
    with contextlib.suppress(OSError):
      found += [int(line.split()[1]) for line in
                pathlib.Path(path).read_text().splitlines()
                if line.startswith("oom_kill ")]
  return sum(found) if found else None


def binary(size: int) -> str:
  """Bytes as hardware counts them: '15.8 GiB'."""
  for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
    if size >= 1 << power:
      return f"{size / (1 << power):.3g} {unit}"
  return f"{size} B"


# --- Details -----------------------------------------------------------------


def _told(config: config_lib.ExperimentConfig, device_kind: str, count: int,
          available: int | None) -> str:
  config = estimates.with_vocabulary(config)
  machine = estimates.Machine(
      hardware=None, device_kind=device_kind, num_devices=count,
      available_bytes=available, available_source="this machine",
      is_assumed=False)
  try:
    mesh = estimates.mesh_shape(config, count)
    needed = memory_lib.estimate(config, mesh, machine.backend)
  except config_lib.ConfigError as error:
    return f"what a step takes cannot be estimated: {error}"
  text = f"a step takes {_sizes(needed)}, by estimate"
  if available is None:
    return f"{text}; how much a device has is not known"
  text += f"; a device has {binary(available)}"
  found = ways_out.find(config, machine)
  if not found:
    return (f"{text}; no way out was found: neither cutting, recomputing nor "
            "smaller batches do; use devices with more memory")
  way = found[0]
  if not way.changes:
    others = ("other programs and the other runs on this machine may have "
              "taken the rest; end them, or train fewer at a time (a sweep's "
              "--workers)" if device_kind == "cpu" else
              "other programs may have taken the rest; end them, or start again")
    return f"{text}, so that it should fit: {others}"
  flags = " ".join(f"--config.{key}={value}"
                   for key, value in way.changes.items())
  words = (f", with {way.extra_flops:.0%} more FLOPs" if way.extra_flops
           else "")
  if "train.batch_size" in way.changes:
    words += ", which is another experiment"
  return (f"{text}; cheapest way out: {flags} "
          f"({binary(way.memory_bytes)} by estimate{words})")


def _sizes(memory: memory_lib.Memory) -> str:
  """'1.2 GiB a device (activations 900 MiB, optimizer 200 MiB, ...)'."""
  kinds = sorted(((getattr(memory, name), name) for name in (
      "parameters", "optimizer", "gradients", "activations", "logits",
      "copies", "batch")), reverse=True)
  return (f"{binary(memory.total)} a device ("
          + ", ".join(f"{name} {binary(size)}" for size, name in kinds[:4])
          + ")")
