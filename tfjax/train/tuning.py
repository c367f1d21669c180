# SPDX-License-Identifier: Apache-2.0
"""What a CPU needs to train at full speed; nothing of it on accelerators.

XLA's CPU backend allocates its temporary arena anew every step. With glibc's
defaults each step then maps, faults and unmaps hundreds of megabytes, a
quarter of a small model's time; huge pages remove nearly all of those faults.
Both settings are read when a process starts, so they go into the environment.
"""

import importlib.util
import os
import pathlib
import sys
from typing import Mapping

from tfjax import config as config_lib
from tfjax.cost import cores as cores_lib

_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_MARK = "TFJAX_CPU_TUNED"
_PLUGINS = ("jax_plugins", "libtpu")  # modules that bring accelerators to JAX
_LAST_LEVEL_CACHE_BYTES = 32 * 2**20  # of a usual server or laptop


def process_environment(
    runtime: config_lib.RuntimeConfig, *, cores: int,
    mesh: config_lib.MeshConfig = config_lib.MeshConfig(),
) -> dict[str, str]:
  """Variables that a process about to train on `cores` cores should have.

  Empty where tuning is off or there is an accelerator. One host device a
  core: the ordinary data-parallel step then uses both better than XLA's own
  threads do. Or as many as the run asks for, shared by its processes.
  """
  if runtime.cpu_tuning == "off" or (
      runtime.cpu_tuning == "auto" and has_accelerator()):
    return {}
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if "glibc.malloc.hugetlb" not in tunables:
    tunables = ":".join(filter(None, (tunables, _HUGE_PAGES)))
  return {
      "GLIBC_TUNABLES": tunables,
      "JAX_NUM_CPU_DEVICES": str(_devices(runtime, mesh, cores)),
      _MARK: "1",
  }


def _devices(runtime: config_lib.RuntimeConfig, mesh: config_lib.MeshConfig,
             cores: int) -> int:
  asked = runtime.num_devices or mesh.num_devices
  processes = 1
  if runtime.distributed != "off":
    processes = int(os.environ.get("JAX_NUM_PROCESSES") or
                    os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
  asked = -(-asked // processes)
  return asked if runtime.num_devices else max(asked, cores)


def part_tokens(
    runtime: config_lib.RuntimeConfig, backend: str, params: int,
) -> int | None:
  """The most tokens that a device should compute at once; None: no limit.

  On a CPU the activations of a large batch pass through memory once an
  operation; those of a part stay in cache, which is worth 20 to 30% of a step.
  Each part adds to the gradients, so where these do not fit the cache
  themselves, parts are larger.
  """
  if runtime.cpu_tuning == "off" or backend != "cpu":
    return None
  return 512 if 4 * params < _LAST_LEVEL_CACHE_BYTES else 2048


def has_accelerator(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether JAX would find one; looks for files, starts nothing.

  Without a plugin JAX runs on the CPU, whatever cards the machine has.
  """
  platforms = environment.get("JAX_PLATFORMS", "")
  if platforms:
    return platforms.split(",")[0] != "cpu"
  if not ("TPU_LIBRARY_PATH" in environment or
          any(map(importlib.util.find_spec, _PLUGINS))):
    return False
  patterns = ("nvidia[0-9]*", "accel[0-9]*", "kfd", "vfio/[0-9]*")
  return any(any(pathlib.Path("/dev").glob(p)) for p in patterns)


def available_cores() -> int:
  """How many cores this process may run on."""
  return len(cores_lib.usable())


def restart_tuned(
    runtime: config_lib.RuntimeConfig,
    mesh: config_lib.MeshConfig = config_lib.MeshConfig()) -> None:
  """Replaces this process by itself with `process_environment` set, once.

  For command-line entry points, before JAX is used. A number of devices that
  the environment has already stays.
  """
  if os.environ.get(_MARK):
    return
  environment = process_environment(
      runtime, cores=available_cores(), mesh=mesh)
  if environment:
    environment["JAX_NUM_CPU_DEVICES"] = os.environ.get(
        "JAX_NUM_CPU_DEVICES", environment["JAX_NUM_CPU_DEVICES"])
    os.environ.update(environment)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
