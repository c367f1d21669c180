# SPDX-License-Identifier: Apache-2.0
"""What a run that was out of memory is told, whatever ran out where."""

import dataclasses
import pathlib
import types

import pytest

from tfjax import train
from tfjax.train import course
from tfjax.train import ensemble_loop
from tfjax.train import out_of_memory
from tfjax.train import records

FULL = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")


def test_a_cpu_s_memory_is_shared_by_what_runs_there(
    make_config, monkeypatch: pytest.MonkeyPatch) -> None:
  told = out_of_memory.explain(FULL, make_config())
  assert "it should fit: other programs and the other runs" in told
  assert "--workers" in told
  assert "way out" not in told and "sweep.ensemble" not in told
  monkeypatch.setattr(out_of_memory, "host_bytes", lambda: 700_000)
  assert "cheapest way out: --config." in out_of_memory.explain(
      MemoryError(), make_config())


def test_the_host_s_memory_is_not_a_gpu_s(
    make_config, monkeypatch: pytest.MonkeyPatch) -> None:
  gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100",
                              memory_stats=lambda: dict(bytes_limit=3 << 30))
  monkeypatch.setattr(out_of_memory, "jax", types.SimpleNamespace(
      devices=lambda: [gpu], default_backend=lambda: "gpu"))
  monkeypatch.setattr(out_of_memory, "host_bytes", lambda: 5 << 30)
  told = out_of_memory.explain(MemoryError("no room"), make_config())
  assert told.startswith(
      "the host's memory ran out, not a device's; it has 5 GiB")
  told = out_of_memory.explain(FULL, make_config())
  assert "a device has 3 GiB" in told and "--workers" not in told


def test_of_an_ensemble_one_by_one_is_a_way_out(make_config) -> None:
  told = out_of_memory.explain(FULL, make_config(), members=8)
  assert told.startswith("8 runs train in one step, and each takes its own; "
                         "--config.sweep.ensemble=off trains them one by one")
  assert "Of one alone: a step takes" in told


def test_what_explains_it_does_not_take_the_place_of_the_error(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  def fail(*_: object, **__: object) -> str:
    raise ZeroDivisionError("a bug")

  def full(*_: object) -> None:
    raise MemoryError("no room")
  monkeypatch.setattr(out_of_memory, "on_device", fail)
  monkeypatch.setattr(course.Run, "start", full)
  with pytest.raises(MemoryError):
    train.run(make_config(), tmp_path, run_id="one")
  result = records.read_result(tmp_path / "one")
  assert result["status"] == "failed"
  assert result["status_reason"].endswith("\nMemoryError: no room")
  assert "not known (ZeroDivisionError" in result["status_reason"]


def test_a_member_that_fails_says_of_how_many_it_was(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  def full(*_: object) -> None:
    raise MemoryError("no room")
  monkeypatch.setattr(ensemble_loop.ensemble_step.EnsembleSteps, "stack", full)
  members = [ensemble_loop.Member(
      dataclasses.replace(make_config(), seed=seed), tmp_path / str(seed), None)
             for seed in range(2)]
  for member in members:
    member.claim()
  with pytest.raises(MemoryError):
    ensemble_loop.train(members, ensemble_loop.jax.devices()[:1], None)
  for seed in range(2):
    result = records.read_result(tmp_path / str(seed))
    assert result["ensemble_members"] == 2
    assert "sweep.ensemble=off" in result["status_reason"]
