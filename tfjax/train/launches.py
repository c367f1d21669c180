# SPDX-License-Identifier: Apache-2.0
"""Which process this is of those that a launcher has started together.

Read from the environment alone; `tfjax.train.cluster` connects them.
"""

import dataclasses
import re
from typing import Mapping

from tfjax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Launch:
  """What a launcher says of this process; no address: JAX asks the machine."""

  by: str
  address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: tuple[int, ...] | None = None


def find(environment: Mapping[str, str]) -> Launch | None:
  """What the environment says; None where this process is alone.

  Raises:
    ConfigError: JAX_COORDINATOR_ADDRESS is there without the rest.
  """
  address = environment.get("JAX_COORDINATOR_ADDRESS")
  own = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  if any(name in environment for name in own):
    return _explicit(environment, ("JAX_COORDINATOR_ADDRESS", *own))
  if slurm := _slurm(environment):
    return slurm
  hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
  if len(hosts) > 1:
    return Launch(f"TPU pod of {len(hosts)} hosts")
  if address:
    return _explicit(environment, ("JAX_COORDINATOR_ADDRESS", *own))
  return None


def _explicit(environment: Mapping[str, str],
              names: tuple[str, str, str]) -> Launch | None:
  missing = [name for name in names if not environment.get(name)]
  if missing:
    there = [name for name in names if name not in missing]
    raise config_lib.ConfigError(
        "runtime.distributed", f"{' and '.join(there)} set, "
        f"{' and '.join(missing)} not; set all three in every process, or "
        "none, or runtime.distributed=off")
  address, count, index = (environment[name] for name in names)
  if not re.fullmatch(r".+:\d+", address):
    raise config_lib.ConfigError(
        "runtime.distributed", f"JAX_COORDINATOR_ADDRESS={address} is not "
        "HOST:PORT")
  if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
    raise config_lib.ConfigError(
        "runtime.distributed", f"JAX_PROCESS_ID={index} with "
        f"JAX_NUM_PROCESSES={count}; processes are numbered from 0")
  if int(count) == 1:
    return None
  return Launch("JAX_COORDINATOR_ADDRESS", address, int(count), int(index))


def _slurm(environment: Mapping[str, str]) -> Launch | None:
  """The srun step that this process is a task of, if it has several.

  Only variables of the step count. Those of the job (SLURM_NTASKS) are also
  there in a batch script, in a shell on an allocated node and in what is
  started from it, where no other task runs.
  """
  names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS",
           "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_PROCID",
           "SLURM_LOCALID")
  if not all(environment.get(name) for name in names):
    return None
  job, step, tasks, nodes, hosts, index, local = (
      environment[name] for name in names)
  if int(tasks) < 2:
    return None
  address = environment.get("JAX_COORDINATOR_ADDRESS")
  if not address:
    # Above the ephemeral ports; steps of a node do not share one.
    port = 61440 + (int(job) * 16 + int(step)) % 4096
    address = f"{_first_host(hosts)}:{port}"
  return Launch("SLURM", address, int(tasks), int(index),
                _share_of_gpus(environment, int(local),
                               int(tasks) // int(nodes)))


def _first_host(hosts: str) -> str:
  """Of SLURM's compact list: node[03-05,9].cluster,other -> node03.cluster."""
  name, first, rest = re.match(
      r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", hosts).groups(default="")
  return name + first + rest


def _share_of_gpus(environment: Mapping[str, str], local: int,
                   tasks: int) -> tuple[int, ...] | None:
  """This task's GPUs, where all tasks of a node see them all; None: all.

  JAX itself would take one GPU a task, also where a task has the whole node.
  """
  visible = environment.get("CUDA_VISIBLE_DEVICES", "")
  seen = len(visible.split(",")) if visible else 0
  narrowed = seen < int(environment.get("SLURM_GPUS_ON_NODE", seen))
  if tasks < 2 or narrowed or "JAX_LOCAL_DEVICE_IDS" in environment:
    return None
  share = seen // tasks
  return tuple(range(local * share, (local + 1) * share)) or None
