# SPDX-License-Identifier: Apache-2.0
"""What the environment of a process on a CPU gets."""

import importlib.util
import os
import pathlib
import sys

import pytest

from tfjax import config as config_lib
from tfjax.train import tuning

ON = config_lib.RuntimeConfig(cpu_tuning="on")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
  for name in ("GLIBC_TUNABLES", tuning._MARK, "JAX_NUM_CPU_DEVICES",
               "JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS"):
    monkeypatch.delenv(name, raising=False)


def test_a_cpu_gets_pages_and_a_device_a_core() -> None:
  environment = tuning.process_environment(ON, cores=3)
  assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
  assert environment["JAX_NUM_CPU_DEVICES"] == "3"
  two = config_lib.RuntimeConfig(num_devices=2)
  assert tuning.process_environment(two, cores=3)[
      "JAX_NUM_CPU_DEVICES"] == "2"


@pytest.mark.parametrize("runtime, mesh, processes, expected", [
    (dict(), dict(fsdp=2, tensor=4), None, "8"),
    (dict(), dict(fsdp=2, tensor=4), 4, "3"),  # the cores are more than 2
    (dict(num_devices=8), dict(), 4, "2"),
    (dict(num_devices=8, distributed="off"), dict(), 4, "8"),
    (dict(num_devices=1), dict(), None, "1")], ids=str)
def test_devices_are_what_the_run_asks_for(
    runtime: dict, mesh: dict, processes: int | None, expected: str,
    monkeypatch: pytest.MonkeyPatch) -> None:
  if processes:
    monkeypatch.setenv("JAX_NUM_PROCESSES", str(processes))
  environment = tuning.process_environment(
      config_lib.RuntimeConfig(cpu_tuning="on", **runtime), cores=3,
      mesh=config_lib.MeshConfig(**mesh))
  assert environment["JAX_NUM_CPU_DEVICES"] == expected


def test_settings_that_are_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
  assert tuning.process_environment(ON, cores=1)["GLIBC_TUNABLES"] == (
      "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1")
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=2")
  assert tuning.process_environment(ON, cores=1)["GLIBC_TUNABLES"] == (
      "glibc.malloc.hugetlb=2")


def test_an_accelerator_or_a_no_leaves_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch) -> None:
  off = config_lib.RuntimeConfig(cpu_tuning="off")
  assert not tuning.process_environment(off, cores=2)
  monkeypatch.setattr(tuning, "has_accelerator", lambda: True)
  assert not tuning.process_environment(config_lib.RuntimeConfig(), cores=2)
  assert tuning.process_environment(ON, cores=2)


@pytest.mark.parametrize("platforms, expected", [
    ("cpu", False), ("cuda,cpu", True), ("tpu", True), ("cpu,tpu", False)])
def test_the_platform_asked_for_decides(platforms: str, expected: bool) -> None:
  assert tuning.has_accelerator({"JAX_PLATFORMS": platforms}) == expected


@pytest.mark.parametrize("plugin, card, expected", [
    (True, True, True), (False, True, False), (True, False, False)])
def test_an_accelerator_is_a_card_and_a_plugin(
    monkeypatch: pytest.MonkeyPatch, plugin: bool, card: bool, expected: bool,
) -> None:
  monkeypatch.setattr(importlib.util, "find_spec",
                      lambda name: plugin and name == "jax_plugins" or None)
  monkeypatch.setattr(pathlib.Path, "glob",
                      lambda _, pattern: iter(["nvidia0"] * card))
  assert tuning.has_accelerator({}) == expected


def test_a_process_restarts_itself_once(
    monkeypatch: pytest.MonkeyPatch) -> None:
  calls = []
  monkeypatch.setattr(os, "execv", lambda *call: calls.append(call))
  monkeypatch.setattr(os, "environ", dict(os.environ))
  monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "train.py"])
  os.environ["JAX_NUM_CPU_DEVICES"] = "5"
  tuning.restart_tuned(ON)
  assert calls == [(sys.executable,
                    [sys.executable, "-X", "dev", "train.py"])]
  assert os.environ["JAX_NUM_CPU_DEVICES"] == "5"
  tuning.restart_tuned(ON)
  assert len(calls) == 1
