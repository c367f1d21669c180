# SPDX-License-Identifier: Apache-2.0
"""Who the other processes are, and what one process makes of it."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.train import cluster
from tfjax.train import launches

# Task 5 of 8, on the second of two nodes, four tasks a node.
STEP = {
    "SLURM_JOB_ID": "100", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08].cluster", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4",
            "JAX_PROCESS_ID": "3"}


def without(*names: str) -> dict[str, str]:
  return {k: v for k, v in STEP.items() if k not in names}


def test_a_step_of_srun_tells_all() -> None:
  # 61440 + (100 * 16 + 2) % 4096
  assert launches.find(STEP) == launches.Launch(
      "SLURM", "gpu07.cluster:63042", 8, 5)


@pytest.mark.parametrize("environment", [
    {}, {"PATH": "/bin"},
    # A batch script: the job has tasks, this is none of them.
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0",
     "SLURM_LOCALID": "0", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a,b"},
    # A shell on an allocated node: a step of one task in a job of eight.
    STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"},
    # By ssh on an allocated node, some variables come along.
    without("SLURM_PROCID"), without("SLURM_STEP_ID", "SLURM_LOCALID"),
    STEP | {"SLURM_PROCID": ""},
    EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
], ids=str)
def test_a_process_that_is_alone_stays_so(environment: dict[str, str]) -> None:
  assert launches.find(environment) is None


@pytest.mark.parametrize("hosts, first", [
    ("node1", "node1"), ("node001,host2", "node001"), ("n[1-15],host", "n1"),
    ("n[003,007-015]", "n003"), ("n-a[2-3]-ib,x", "n-a2-ib")])
def test_the_first_host_of_a_list_is_the_coordinator(
    hosts: str, first: str) -> None:
  launch = launches.find(STEP | {"SLURM_STEP_NODELIST": hosts})
  assert launch.address == f"{first}:63042"


@pytest.mark.parametrize("changes, devices", [
    ({}, None),  # no GPUs are announced
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, (1,)),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"},
     (2, 3)),
    # SLURM gave each task its own.
    ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "4"}, None),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "8",
      "SLURM_STEP_NUM_TASKS": "4"}, None),
    # One task a node takes all.
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4",
      "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
     None),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4",
      "JAX_LOCAL_DEVICE_IDS": "3"}, None),
], ids=str)
def test_tasks_of_a_node_share_its_gpus(
    changes: dict[str, str], devices: tuple[int, ...] | None) -> None:
  assert launches.find(STEP | changes).local_device_ids == devices


def test_explicit_variables_come_first() -> None:
  assert launches.find(STEP | EXPLICIT) == launches.Launch(
      "JAX_COORDINATOR_ADDRESS", "host:1234", 4, 3)
  # An address alone is for the step's processes.
  address = {"JAX_COORDINATOR_ADDRESS": "other:99"}
  assert launches.find(STEP | address).address == "other:99"


def test_a_pod_of_several_hosts_is_found() -> None:
  launch = launches.find({"TPU_WORKER_HOSTNAMES": "a,b,c"})
  assert launch == launches.Launch("TPU pod of 3 hosts")


@pytest.mark.parametrize("environment, message", [
    ({"JAX_COORDINATOR_ADDRESS": "host:1"},
     "JAX_COORDINATOR_ADDRESS set, JAX_NUM_PROCESSES and JAX_PROCESS_ID not"),
    ({"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"},
     "JAX_COORDINATOR_ADDRESS not"),
    (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "numbered from 0"),
    (EXPLICIT | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four"),
    (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host"}, "not HOST:PORT"),
], ids=str)
def test_half_a_launch_is_refused(
    environment: dict[str, str], message: str) -> None:
  with pytest.raises(config_lib.ConfigError, match=message) as caught:
    launches.find(environment)
  assert caught.value.key == "runtime.distributed"


def test_alone_nothing_is_asked_of_others(
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail())
  for name in (*STEP, *EXPLICIT, "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  cluster.initialize(config_lib.RuntimeConfig(distributed="auto"))
  for name, value in EXPLICIT.items():
    monkeypatch.setenv(name, value)
  cluster.initialize(config_lib.RuntimeConfig(distributed="off"))
  value = {"a": [1, None]}
  assert cluster.is_main()
  assert cluster.broadcast(value) is value
  cluster.barrier()
  with pytest.raises(ZeroDivisionError), cluster.together():
    _ = 1 / 0


def test_alone_flags_are_heard_at_once() -> None:
  agreement = cluster.Agreement(Mesh(np.array(jax.devices()), ("data",)))
  for flags in ((False, False), (True, False), (False, True)):
    assert agreement.exchange(*flags) == flags


# --- In processes of their own, as JAX connects only once --------------------

ALONE = """
import logging, sys
from tfjax import config
from tfjax.train import cluster
from tfjax.train import launches
logging.basicConfig(level=logging.INFO)
cluster._CONNECT_SECONDS = 2
try:
  cluster.initialize(config.RuntimeConfig(distributed=sys.argv[1]))
except (OSError, config.ConfigError) as error:
  sys.exit(f"{type(error).__name__}: {error}")
"""


def start(distributed: str, environment: dict[str, str],
          ) -> subprocess.CompletedProcess:
  return subprocess.run(
      ["env", *(f"{k}={v}" for k, v in environment.items()), sys.executable,
       "-c", ALONE, distributed], capture_output=True, text=True, timeout=120,
      cwd=pathlib.Path(__file__).parents[2])


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def test_a_coordinator_that_is_not_there_is_named() -> None:
  address = f"127.0.0.1:{free_port()}"
  done = start("auto", EXPLICIT | {"JAX_COORDINATOR_ADDRESS": address})
  assert done.returncode == 1
  assert re.search(rf"CoordinatorError: process 3 of 4 cannot reach the "
                   rf"coordinator, process 0, at {address} .*refused.*2 s",
                   done.stderr)


def test_others_that_do_not_come_are_missed() -> None:
  address = f"127.0.0.1:{free_port()}"
  done = start("auto", EXPLICIT | {"JAX_COORDINATOR_ADDRESS": address,
                                   "JAX_PROCESS_ID": "0"})
  assert done.returncode
  assert f"not all 4 processes have come to {address}" in done.stderr


def test_a_port_in_use_is_named() -> None:
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    done = start("auto", EXPLICIT | {"JAX_COORDINATOR_ADDRESS": address,
                                     "JAX_PROCESS_ID": "0"})
  assert done.returncode == 1
  assert f"cannot be the coordinator at {address}" in done.stderr
  assert "choose another port" in done.stderr


def test_on_without_a_launcher_says_what_is_missing() -> None:
  done = start("on", {})
  assert done.returncode == 1
  assert "config.runtime.distributed: on, but no launcher" in done.stderr
  assert "JAX_NUM_PROCESSES" in done.stderr


PAIR = """
import json, sys
import jax, numpy as np
from tfjax import config
from tfjax.train import cluster
from tfjax.train import launches
cluster.initialize(config.RuntimeConfig())
cluster.initialize(config.RuntimeConfig())
index = jax.process_index()
with cluster.together():
  agreement = cluster.Agreement(
      jax.sharding.Mesh(np.array(jax.devices()), ("data",)))
  # The other process is told to stop at step 2; process 0 wants to save from
  # step 4 until it may.
  answers, save = [], False
  for step in range(10):
    save |= index == 0 and step == 4
    answers.append(agreement.exchange(index == 1 and step == 2, save))
    if answers[-1][1]:
      save = False
  cluster.barrier()
  print(json.dumps([answers, cluster.broadcast({"from": index})]), flush=True)
  if index == 1:
    raise ValueError("all by itself")
  cluster.barrier()
"""


def test_two_processes_agree_and_part() -> None:
  address = f"127.0.0.1:{free_port()}"
  both = [subprocess.Popen(
      [sys.executable, "-c", PAIR], cwd=pathlib.Path(__file__).parents[2],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env={**os.environ, "JAX_COORDINATOR_ADDRESS": address,
           "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index),
           "JAX_NUM_CPU_DEVICES": "2"}) for index in range(2)]
  try:
    printed, errors = zip(*(one.communicate(timeout=120) for one in both))
  finally:
    for one in both:
      one.kill()
  # A call late, at both; one wish to save is granted once.
  answers = [[False, False] for _ in range(10)]
  answers[3] = [True, False]
  answers[5] = [False, True]
  for text in printed:
    assert json.loads(text.splitlines()[-1]) == [answers, {"from": 0}]
  assert [one.returncode for one in both] == [1, 1]
  assert "ValueError: all by itself" in errors[1]
  assert ("PeerError: process 1 of 2 has failed: ValueError: all by itself"
          in errors[0])
