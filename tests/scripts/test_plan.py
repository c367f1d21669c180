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
  chip = hardware.find("tpu-v5e")
  assert result["available_bytes"] == chip.memory_bytes
  bound = result["roofline"]
  flops = result["flops"]
  assert bound["compute_seconds"] == pytest.approx(
      (flops["model"] + flops["recompute"]) / 4 / chip.peak_of("bfloat16"))
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


# --- What it will cost -------------------------------------------------------

GPT3 = ("--config=experiments/gpt3.py",)
# 16 bytes a parameter and more: on 8 devices no room for a copy on each.
TOO_LARGE = (*GPT3, "--config.model.size=6.7b", "--hardware=h100",
             "--num_devices=8", "--json=-")


def test_a_large_run_on_a_machine_that_is_not_here(
    tmp_path: pathlib.Path) -> None:
  path = tmp_path / "plan.json"
  done = plan(*GPT3, "--config.model.size=175b", "--config.mesh.fsdp=64",
              "--config.mesh.tensor=8", "--config.train.accumulation_steps=8",
              "--hardware=b200", "--num_devices=1024", "--price=2",
              "--region=FRA",
              f"--workdir={tmp_path}/w", f"--json={path}")
  assert done.returncode == 0, done.stderr
  result = strict(path.read_text())
  (row,) = result["runs"]
  assert result["fits"] is True and result["ways_out"] == []
  assert row["params_total"] == 174_604_836_864
  assert row["steps"] == 143_052  # 300e9 tokens in batches of 2,097,152
  assert row["estimate"]["budget"]["epochs"] is None
  assert result["total"]["price_usd"] == row["price_usd"] == (
      2 * row["device_seconds"] / 3600)
  kept = strict((tmp_path / "w" / "cost.json").read_text())
  assert kept["total"] == result["total"]
  # So many times 2 data x 64 fsdp x 8 parts.
  assert result["largest_batch"] in range(2048, 2**20, 1024)
  assert f"{result['largest_batch']:,} sequences" in done.stdout
  for words in ("174,604,836,864", "6N_non_embedding", "MFU 0.4, assumed",
                "warmup to step 7,153", "kWh", "kg CO2e", "cost.price"):
    assert words in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 200


def test_what_cannot_fit_gets_ways_out_that_fit(
    tmp_path: pathlib.Path) -> None:
  done = plan(*TOO_LARGE, f"--workdir={tmp_path}/w")
  assert done.returncode == 1, done.stderr
  result = strict(done.stdout)
  assert result["fits"] is False and len(result["ways_out"]) == 3
  assert not (tmp_path / "w").exists()
  for way in result["ways_out"]:
    assert way["flags"] in done.stderr
    assert way["memory_bytes"] <= way["available_bytes"]
  # The flags do as they say, given after those that were given.
  again = plan(*TOO_LARGE, *result["ways_out"][0]["flags"].split())
  assert again.returncode == 0, again.stderr
  assert strict(again.stdout)["runs"][0]["estimate"]["memory_bytes"][
      "total"] == result["ways_out"][0]["memory_bytes"]


def test_a_sweep_and_the_config_alone() -> None:
  arguments = ("--config=experiments/quickstart.py", "--hardware=h100",
               "--mfu=0.1", "--json=-", "--config.train.dtype=bfloat16",
               "--region=FRA")
  done = plan(*arguments, "--workers=2", '--sweep_arg=sizes=["6k", "14k"]')
  assert done.returncode == 0, done.stderr
  result = strict(done.stdout)
  assert result["total"]["runs"] == len(result["runs"]) == 12
  assert result["workers"] == 2
  seconds = [row["seconds"] for row in result["runs"]]
  assert sum(seconds) / 2 <= result["seconds"] < sum(seconds)
  # Sizes and costs are wider than a page together, and nothing is cut off.
  assert done.stderr.count("12 size=14k") == 2 and "…" not in done.stderr
  # The shortest branch does the last fifth of its 256 steps itself.
  branch, trunk = result["runs"][0], result["runs"][5]
  assert (branch["steps"], branch["tokens"]) == (256, 2**18)
  assert branch["flops"] == pytest.approx(
      (branch["flops"] + branch["shared_flops"]) * 51 / 256)
  assert (trunk["steps"], trunk["shared_flops"]) == (4096, 0)
  assert result["total"]["flops"] == pytest.approx(
      sum(row["flops"] for row in result["runs"]))
  assert "45%, are a trunk's and are spent once" in done.stderr
  alone = plan(*arguments, "--run")
  assert strict(alone.stdout)["total"]["runs"] == 1


def test_this_machine_without_timing() -> None:
  done = plan(*TINY, "--run", "--notiming", "--json=-")
  assert done.returncode == 0, done.stderr
  result = strict(done.stdout)
  assert result["seconds"] is None and result["total"]["hours"] is None
  assert result["runs"][0]["estimate"]["budget"]["epochs"] > 0
  assert result["runs"][0]["estimate"]["machine"]["device_kind"] == "cpu"
  assert "hours unknown" in done.stderr


@pytest.mark.parametrize("arguments, words", [
    (("--hardware=h1000",), "cost.hardware: 'h1000'"),
    (("--hardware=h100", "--region=atlantis"), "cost.region"),
    (("--hardware=h100", "--num_devices=-1"), "--num_devices=-1"),
    (("--hardware=h100", "--mfu=1.2"), "--mfu=1.2"),
    (("--hardware=h100", "--mfu=nan"), "--mfu"),
    (("--hardware=h100", "--price=-3"), "--price=-3"),
    (("--num_devices=8",), "cost.hardware"),
    (("--hardware=h100", "--devices=2"), "--hardware has no"),
    (("--memory_gib=2",), "--memory_gib is for"),
    (("--run", "--sweep_arg=sizes=[]"), "--run plans no sweep"),
    (("--hardware=h100", "--timing"), "--timing is for"),
    (("--hardware=h100", "--config.duration.tokens=None",
      "--config.duration.steps=5", "--sweep_arg=size=1"), "takes no 'size'"),
    (("--overrides=/no/such.json",), "cannot be read")],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None)
def test_mistakes_in_costs_name_the_flag(arguments: tuple[str, ...],
                                         words: str) -> None:
  done = plan("--config=experiments/quickstart.py", *arguments)
  assert done.returncode == 2, done.stdout
  assert words in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_this_machine_is_timed(tmp_path: pathlib.Path) -> None:
  done = plan("--config=experiments/quickstart.py", "--workers=1",
              '--sweep_arg=sizes=["6k"]', "--sweep_arg=most_tokens=65536",
              f"--workdir={tmp_path}", "--json=-")
  assert done.returncode == 0, done.stderr
  result = strict(done.stdout)
  assert "1 of 1 models timed here" in result["basis"]
  assert 0 < result["seconds"] < 600
  assert sum(row["seconds"] for row in result["runs"]) < result["seconds"]
  assert (tmp_path / "cost.json").exists()
