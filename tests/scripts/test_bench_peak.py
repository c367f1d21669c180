# SPDX-License-Identifier: Apache-2.0
"""scripts/bench.py --peak: what is counted, on which devices, what is kept."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from tfjax.cost import hardware
from tfjax.cost import peaks
from tfjax.train import tuning

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


@pytest.fixture(name="bench")
def fixture_bench(monkeypatch: pytest.MonkeyPatch,
                  tmp_path: pathlib.Path) -> types.ModuleType:
  """The module, on arrays that take no time, with a file of its own."""
  spec = importlib.util.spec_from_file_location(
      "bench_peak", SCRIPTS / "bench_peak.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  monkeypatch.setattr(module, "_CPU_SHAPES", ((64, 64), (128, 256)))
  monkeypatch.setattr(module, "_CPU_ARRAY_BYTES", 2**16)
  monkeypatch.setattr(module, "_LEAST_CPU_ARRAY_BYTES", 2**13)
  monkeypatch.setenv("TFJAX_PEAKS", str(tmp_path / "peaks.json"))
  return module


def test_what_is_counted(bench: types.ModuleType,
                         monkeypatch: pytest.MonkeyPatch) -> None:
  """A product of n x n and n x m is 2 n n m; a triad moves three arrays. Rates
  are of one device, whatever their number."""
  monkeypatch.setattr(bench, "_best_seconds", lambda *_, **__: 0.5)
  # The larger shape would not fit into the time, so the first one decides.
  assert bench.matrix_rate("float32", seconds=0.5) == 2 * 64**3 / 0.5
  assert bench.matrix_rate("float32", seconds=1e6) == (
      2 * 128 * 128 * 256 / 0.5)
  size = max(2**16 // jax.local_device_count(), 2**13)
  assert bench.memory_bandwidth(1.0) == 3 * size / 0.5


def test_all_devices_compute_their_own(bench: types.ModuleType) -> None:
  x, y = bench._array((8, 8), "float32"), bench._array((8, 4), "float32")
  result = bench._on_every_device(lambda x, y: x @ y)(x, y)
  assert len(result.sharding.device_set) == jax.local_device_count()
  assert not result.sharding.is_fully_replicated or (
      jax.local_device_count() == 1)
  np.testing.assert_allclose(
      result, np.einsum("dij,djk->dik", x, y), rtol=1e-5, atol=1e-5)
  assert len(np.unique(x)) > 60 * jax.local_device_count()


def test_the_fastest_burst_counts(bench: types.ModuleType,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
  sleeps, now = iter([0.2, 0.06, 0.06, 0.01, 0.06, 0.06]), [0.0]
  monkeypatch.setattr(bench, "time", types.SimpleNamespace(
      perf_counter=lambda: now[0]))

  def step() -> np.ndarray:
    now[0] += next(sleeps)
    return np.zeros(1)

  assert bench._best_seconds(step, 0.2) == pytest.approx(0.01)


def test_what_is_kept_is_used(bench: types.ModuleType,
                              capsys: pytest.CaptureFixture[str]) -> None:
  assert hardware.peak("cpu", "float32").flops_per_second is None
  figures = bench.main(seconds=0.1)
  shown = capsys.readouterr().out
  assert "not known" in shown and str(peaks.path()) in shown
  assert json.loads(peaks.path().read_text()) == [figures]
  for dtype in ("float32", "bfloat16"):
    peak = hardware.peak("cpu", dtype)
    assert peak.flops_per_second == figures["flops_per_second"][dtype] > 0
    assert figures["date"] in peak.source
  assert figures["num_devices"] == jax.local_device_count()
  assert figures["memory_bandwidth_bytes_per_second"] > 0


@pytest.mark.slow
def test_the_script_measures_as_training_runs(tmp_path: pathlib.Path) -> None:
  """One device a core, as tfjax.train.tuning sets them up."""
  keep = {key: value for key, value in os.environ.items()
          if key not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS") and
          not key.startswith("TFJAX")}
  out = tmp_path / "figures.json"
  subprocess.run(
      [sys.executable, SCRIPTS / "bench.py", "--peak", f"--json={out}"],
      env={**keep, "JAX_PLATFORMS": "cpu",
           "TFJAX_PEAKS": str(tmp_path / "peaks.json")},
      check=True, timeout=600)
  figures = json.loads(out.read_text())
  assert figures["cores_per_device"] == 1.0
  assert figures["num_devices"] == tuning.available_cores()
  # A core of this century, and below what any core reaches.
  assert 1e9 < figures["flops_per_second"]["float32"] < 1e12
  assert 5e8 < figures["memory_bandwidth_bytes_per_second"] < 1e12
