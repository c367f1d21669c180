# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs utilisation of GPT-2 shapes in bfloat16 on an accelerator.

Part of scripts/bench.py (--device=gpu or tpu). The peak is the device's own,
measured on large bfloat16 products in the same process; FLOPs are those of
tfjax.cost.flops (matrix products, attention over the full square). Each shape
takes the first of a list of settings that fits.
"""

import statistics
import time
from typing import Any

import jax

import bench_peak
import bench_scale
from tfjax import config as config_lib
from tfjax.cost import flops as flops_lib
from tfjax.cost import hardware
from tfjax.cost import lengths as lengths_lib
from tfjax.train import optimizers
from tfjax.train import sharding
from tfjax.train import step as step_lib

# Name -> (family and size or dimensions, goal). Vocabulary 50,304: 50,257
# padded to a multiple of 128.
MODELS: dict[str, tuple[dict[str, Any], float | None]] = {
    "124M": (dict(size="small"), 0.50),
    "350M": (dict(size="medium"), 0.55),
    "1.3B": (dict(d_model=2048, num_layers=24, num_heads=16), 0.60),
    "tiny": (dict(d_model=64, num_layers=1, num_heads=1), None),
}
LENGTHS = (1024, 2048)
# Tokens a device and what is recomputed: the first that fits is measured.
SETTINGS = ((65536, "none"), (32768, "none"), (16384, "none"), (32768, "dots"),
            (16384, "dots"), (8192, "dots"), (16384, "full"), (4096, "full"))
CPU_SETTINGS = ((2048, "none"),)  # to see that the script works


def experiment(model: str, length: int, tokens: int,
               remat: str) -> config_lib.ExperimentConfig:
  config = config_lib.default()
  config_lib.override(config, {
      **{f"model.{key}": value for key, value in MODELS[model][0].items()},
      "model.vocab_size": 50304, "model.context_length": length,
      "model.remat": remat, "train.dtype": "bfloat16",
      "train.batch_size": max(1, tokens // length) * jax.device_count(),
      "mesh.fsdp": jax.device_count(), "duration.steps": 100})
  return config_lib.resolve(config)


def measure(config: config_lib.ExperimentConfig, rounds: int
            ) -> dict[str, Any]:
  """Tokens a second; raises where it does not fit."""
  mesh = sharding.make_mesh(config)
  steps = step_lib.Steps(config.model, config.optimizer, config.train,
                         config.recovery, config.runtime, mesh)
  batch = step_lib.put(mesh, bench_scale.batch_of(config))
  begin = time.perf_counter()
  step = steps.compiled_train(batch)
  compile_seconds = time.perf_counter() - begin
  state = steps.init(jax.random.key(0),
                     optimizers.make_hyperparameters(config.optimizer, 100))
  times = []
  for _ in range(rounds + 2):  # the first two warm up
    begin = time.perf_counter()
    for _ in range(5):
      state, metrics = step(state, batch)
    loss = float(metrics["loss"])
    times.append((time.perf_counter() - begin) / 5)
  tokens = config.train.batch_size * config.model.context_length
  seconds = statistics.median(times[2:])
  return dict(
      batch_size=config.train.batch_size, remat=config.model.remat,
      step_seconds=seconds, step_seconds_min=min(times[2:]),
      step_seconds_max=max(times[2:]), tokens_per_second=tokens / seconds,
      compile_seconds=compile_seconds, loss=loss,
      peak_bytes=(jax.devices()[0].memory_stats() or {}).get(
          "peak_bytes_in_use"))


def main(models: list[str], rounds: int) -> dict[str, Any]:
  """Prints a row for each model and length as it is measured."""
  device = jax.devices()[0]
  rate = bench_peak.matrix_rate("bfloat16")
  peak = hardware.device(device.device_kind, "bfloat16").flops
  print(f"{jax.device_count()} x {device.device_kind}; bfloat16 products at "
        f"{rate / 1e12:.3g} TFLOP/s" + (
            f", {rate / peak:.0%} of the {peak / 1e12:.4g} in its data sheet"
            if peak else "; no data-sheet peak is known"), flush=True)
  results: dict[str, Any] = dict(
      device_kind=device.device_kind, device_count=jax.device_count(),
      matrix_flops=rate, peak_flops=peak, jax=jax.__version__, rows=[])
  for model in models:
    for length in LENGTHS:
      results["rows"].append(row := _row(model, length, rate, rounds))
      print(_words(row), flush=True)
  return results


def _row(model: str, length: int, rate: float, rounds: int) -> dict[str, Any]:
  row: dict[str, Any] = dict(model=model, length=length,
                             goal=MODELS[model][1], mfu=None)
  on_cpu = jax.default_backend() == "cpu"
  for tokens, remat in CPU_SETTINGS if on_cpu else SETTINGS:
    config = experiment(model, length, tokens, remat)
    try:
      row.update(measure(config, rounds))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      jax.clear_caches()
      continue
    flops = flops_lib.training_flops_per_token(
        config.model, lengths_lib.of(config)).total
    row["mfu"] = (row["tokens_per_second"] * flops /
                  (rate * jax.device_count()))
    return row
  return row


def _words(row: dict[str, Any]) -> str:
  if row["mfu"] is None:
    return f"{row['model']} at {row['length']}: no setting fits"
  return (f"{row['model']} at {row['length']}: batch {row['batch_size']}, "
          f"remat {row['remat']}, {row['tokens_per_second']:,.0f} tokens/s, "
          f"MFU {row['mfu']:.1%}" + (
              f" (goal {row['goal']:.0%})" if row["goal"] else "") +
          f", compiled in {row['compile_seconds']:.0f} s")
