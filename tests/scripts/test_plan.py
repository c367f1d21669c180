# SPDX-License-Identifier: Apache-2.0
"""scripts/plan.py as people call it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tfjax.cost import hardware

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ("--config=experiments/quickstart.py", "--config.model.size=3k")


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
  environment = {name: value for name, value in os.environ.items()
                 if name != "JAX_NUM_CPU_DEVICES"}
  return subprocess.run(
      [sys.executable, "scripts/plan.py", *arguments], cwd=ROOT, text=True,
      capture_output=True, env=environment, check=False)


def strict(text: str) -> dict:
  def refuse(name):
    raise AssertionError(f"{name} is not JSON")
  return json.loads(text, parse_constant=refuse)


def test_eight_simulated_devices_end_to_end() -> None:
  done = plan(*TINY, "--devices=8", "--config.mesh.fsdp=4", "--json=-")
  assert done.returncode == 0, done.stderr
  result = strict(done.stdout)
  assert result["mesh"] == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
  assert result["num_devices"] == 8
  assert result["batch_tokens"] == 8 * 128
  # Width 16 in one layer, 257 tokens, rotary positions: 257 x 16 embeddings,
  # 4 x 16^2 + 4 x 16 attention, 8 x 16^2 + 5 x 16 feed-forward, 3 x 32 norms.
  assert result["params_total"] == 7424
  memory = result["memory"]
  assert memory.pop("peak") is None
  assert memory.pop("total") == sum(memory.values()) == result["needed_bytes"]
  assert {row["kind"] for row in result["collectives"]} >= {"all-reduce"}
  # Nothing is known of a simulated device, and nothing is made up.
  assert result["fits"] is None and result["available_bytes"] is None
  assert set(result["roofline"].values()) == {None}
  assert result["tries"] == []
  assert result["verdict"] in done.stderr
  assert "unknown" in result["verdict"]


@pytest.mark.slow
def test_a_memory_size_gets_a_verdict_and_advice(
    tmp_path: pathlib.Path) -> None:
  path = tmp_path / "plan.json"
  # Off: else a CPU computes any batch in parts.
  done = plan(*TINY, "--devices=2", "--config.train.batch_size=256",
              "--config.runtime.cpu_tuning=off", "--config.mesh.fsdp=2",
              "--config.model.remat=full", "--memory_gib=0.02",
              f"--json={path}")
  assert done.returncode == 1, done.stderr
  result = strict(path.read_text())
  assert result["fits"] is False
  assert set(result["remedy"]) == {"train.accumulation_steps"}
  assert result["tries"][-1]["needed_bytes"] > 0
  largest = result["largest_batch"]
  assert 0 < largest["fits"] < largest["does_not"] <= 256
  assert done.stdout.rstrip().endswith(result["verdict"])
  assert "it does with --config." in result["verdict"]


@pytest.mark.parametrize("arguments, words", [
    (("--devices=8", "--config.mesh.fsdp=3"), "config.mesh: fsdp 3"),
    (("--devices=8", "--config.mesh.data=2"), "is 2 of 8 devices"),
    (("--devices=3",), "multiple of 3"),
    ((), "--topology"),
    (("--devices=8", "--topology=v5e:2x2"), "one of them"),
    (("--topology=v5e-4",), "v5e:16x16")])
def test_mistakes_are_one_line(arguments: tuple[str, ...], words: str) -> None:
  if arguments[0:1] == ("--topology=v5e-4",):
    pytest.importorskip("libtpu")
  done = plan(*TINY, *arguments)
  assert done.returncode == 2
  assert words in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_tpu_topology() -> None:
  pytest.importorskip("libtpu")
  done = plan(*TINY, "--topology=v5e:2x2", "--config.mesh.fsdp=2",
              "--config.train.dtype=bfloat16", "--noadvice", "--json=-")
  assert done.returncode == 0, done.stderr
  result = strict(done.stdout)
  assert result["fits"] is True
  assert result["device_kind"] == "TPU v5 lite"
  assert result["needed_bytes"] == result["memory"]["peak"]
  chip = hardware.CHIPS["TPU v5 lite"]
  assert result["available_bytes"] == chip.memory_bytes
  bound = result["roofline"]
  flops = result["flops"]
  assert bound["compute_seconds"] == pytest.approx(
      (flops["model"] + flops["recompute"]) / 4 / chip.bfloat16_flops)
  assert bound["step_seconds"] == max(
      bound["compute_seconds"], bound["memory_seconds"], bound["link_seconds"])
  assert 0 < bound["mfu"] <= 1
  # Noise of libtpu, which misses its TPU, is kept away.
  assert "hostname" not in done.stderr


@pytest.mark.slow
def test_what_does_not_fit_a_tpu() -> None:
  pytest.importorskip("libtpu")
  # 12 bytes for each of 1.6 billion parameters; a quarter of that does fit.
  done = plan("--config=experiments/quickstart.py", "--topology=v5e:2x2",
              "--config.model.size=None", "--config.model.d_model=8192",
              "--config.model.num_layers=2", "--config.model.num_heads=64",
              "--config.model.scan_layers=True", "--config.train.batch_size=4",
              "--config.train.dtype=bfloat16", "--json=-")
  assert done.returncode == 1, done.stderr
  result = strict(done.stdout)
  assert result["needed_bytes"] > result["available_bytes"]
  # The runtime keeps some of the 16 GiB.
  assert 15 * 2**30 < result["available_bytes"] < 16 * 2**30
  assert result["memory"] is None and result["collectives"] is None
  assert result["remedy"] == {"mesh.data": 1, "mesh.fsdp": 4}
  (tried,) = result["tries"]
  assert tried["fits"]
  assert 12 * 1.6e9 / 4 < tried["needed_bytes"] < 16 * 2**30
  assert result["largest_batch"] == {"fits": None, "does_not": 4}
  assert "does not fit" in result["verdict"]


def test_a_topology_that_is_not_there() -> None:
  pytest.importorskip("libtpu")
  done = plan(*TINY, "--topology=v9:2x2")
  assert done.returncode == 2
  assert "v9" in done.stderr and "v5p:4x4x8" in done.stderr
