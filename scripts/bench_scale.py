# SPDX-License-Identifier: Apache-2.0
"""What scale costs, measured where it can be: simulated devices, processes.

Part of scripts/bench.py (--scale):

- sharding: the step on a mesh of one device beside the same function under a
  plain jax.jit, in bursts taken in turn;
- depth: seconds to compile 12 and 96 scanned layers;
- devices: the step of one batch on one and on several simulated devices;
- processes: the quickstart's 55k model in two processes of one device each,
  in one of two devices, and in one of one;
- restart: from a new process to its first step, on a checkpoint and a cache;
- input: batches a second that the pipeline delivers over those consumed;
- checkpoint: what a save takes of the loop's time.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable

from absl import logging as absl_logging
import jax
import numpy as np

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.data import batches as batches_lib
from tfjax.data import store as store_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.models import inputs as inputs_lib
from tfjax.objectives import loss as loss_lib
from tfjax.train import checkpoints
from tfjax.train import optimizers
from tfjax.train import sharding
from tfjax.train import step as step_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "experiments" / "quickstart.py"


def config_of(d_model: int, num_layers: int, length: int, batch: int,
              vocab: int, **changes: Any) -> config_lib.ExperimentConfig:
  """A GPT-2; changes are dotted keys written a__b."""
  config = config_lib.default()
  config_lib.override(config, {
      "model.d_model": d_model, "model.num_layers": num_layers,
      "model.num_heads": max(1, d_model // 64), "model.vocab_size": vocab,
      "model.context_length": length, "train.batch_size": batch,
      "duration.steps": 100, "runtime.num_devices": 1,
      **{key.replace("__", "."): value for key, value in changes.items()}})
  return config_lib.resolve(config)


def batch_of(config: config_lib.ExperimentConfig) -> loss_lib.Batch:
  rng = np.random.default_rng(0)
  shape = (config.train.batch_size, config.model.context_length)
  tokens = rng.integers(0, config.model.vocab_size, (2, *shape), np.int32)
  return loss_lib.Batch(inputs_lib.Inputs(tokens[0]), tokens[1],
                        np.ones(shape, np.float32))


def made(config: config_lib.ExperimentConfig):
  """Steps, a state and a batch on the devices."""
  steps = step_lib.steps_for(config, sharding.make_mesh(config))
  state = steps.init(jax.random.key(0),
                     optimizers.make_hyperparameters(config.optimizer, 100))
  return steps, state, step_lib.put(steps.mesh, batch_of(config))


def burst(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, batch: Any,
          count: int) -> tuple[float, Any]:
  """Seconds a step, and the state after them."""
  begin = time.perf_counter()
  for _ in range(count):
    state, metrics = step(state, batch)
  jax.block_until_ready(metrics)
  return (time.perf_counter() - begin) / count, state


def sharding_overhead(rounds: int) -> dict[str, float]:
  """One device with a mesh around it, and without."""
  config = config_of(128, 4, 256, 16, 512)
  steps, state, batch = made(config)
  plain_state = jax.tree.map(lambda x: np.array(x), state)
  plain_state = jax.device_put(plain_state)
  with_mesh = steps.compiled_train(batch)
  # Not under jax.set_mesh: every constraint is a no-op.
  plain = jax.jit(steps.functions.train, donate_argnums=0).lower(
      plain_state, batch).compile()
  times: dict[str, list[float]] = {"mesh": [], "plain": []}
  for i in range(rounds + 1):
    mesh_seconds, state = burst(with_mesh, state, batch, 4)
    plain_seconds, plain_state = burst(plain, plain_state, batch, 4)
    if i:  # the first round warms up
      times["mesh"].append(mesh_seconds)
      times["plain"].append(plain_seconds)
  # Of neighbours in time, as the machine's speed drifts.
  ratios = [a / b for a, b in zip(times["mesh"], times["plain"])]
  return dict(mesh_seconds=statistics.median(times["mesh"]),
              plain_seconds=statistics.median(times["plain"]),
              overhead=statistics.median(ratios) - 1)


def compile_against_depth() -> dict[str, float]:
  """Seconds to trace, lower and compile the step; no cache."""
  result = {}
  # Nothing is cached unless a run sets the directory.
  for layers in (2, 12, 96):  # the first one warms up
    config = config_of(64, layers, 64, 8, 512, model__scan_layers=True,
                       model__remat="full")
    steps = step_lib.steps_for(config, sharding.make_mesh(config))
    begin = time.perf_counter()
    steps.lower_train(batch_of(config)).compile()
    result[f"layers_{layers}_seconds"] = time.perf_counter() - begin
  result["ratio"] = result["layers_96_seconds"] / result["layers_12_seconds"]
  return result


def devices(rounds: int) -> dict[str, float]:
  """Seconds a step of one batch on 1, 2, ... of the devices there are."""
  meshes = {"one": {}, "data_2": dict(mesh__data=2), "fsdp_2": dict(
      mesh__fsdp=2), "sequence_2": dict(mesh__sequence=2), "tensor_2": dict(
          mesh__tensor=2)}
  contenders = {}
  for name, axes in meshes.items():
    contenders[name] = made(config_of(
        256, 4, 256, 16, 512, runtime__num_devices=None if axes else 1, **axes))
  times: dict[str, list[float]] = {name: [] for name in contenders}
  for i in range(rounds + 1):
    for name, (steps, state, batch) in contenders.items():
      seconds, state = burst(steps.compiled_train(batch), state, batch, 2)
      contenders[name] = steps, state, batch
      if i:
        times[name].append(seconds)
  return {f"{name}_seconds": statistics.median(found)
          for name, found in times.items()}


def processes(directory: pathlib.Path) -> dict[str, float]:
  """Tokens a second that whole runs report."""
  shared = [f"--config={QUICKSTART}", "--config.model.size=55k",
            f"--config.duration.tokens={2**19}", "--config.tracking.wandb="
            "disabled", "--config.evaluation.tokens=2048"]
  train = [sys.executable, "scripts/train.py", *shared]
  commands = {
      "one_device": [*train, "--config.runtime.num_devices=1"],
      "two_devices": [*train, "--config.runtime.num_devices=2"],
      "two_processes": ["scripts/launch/local.sh", "2", *shared]}
  # As a user starts them: each settles its own devices and pages.
  environment = {name: value for name, value in os.environ.items()
                 if name not in ("TFJAX_CPU_TUNED", "JAX_NUM_CPU_DEVICES")}
  result = {}
  for name, command in commands.items():
    workdir = directory / name
    subprocess.run([*command, f"--workdir={workdir}"], cwd=ROOT,
                   check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL,
                   env=environment | {"PYTHON": sys.executable})
    (path,) = workdir.glob("*/result.json")
    result[f"{name}_tokens_per_second"] = json.loads(path.read_text())[
        "tokens_per_second"]
  return result


_RESTART = """
import sys, time
begin = float(sys.argv[3])
from tfjax import config, train
import json, os, signal
def on_row(row):
  print(row["step"], time.time() - begin, flush=True)
  if row["step"] == int(sys.argv[4]): os.kill(os.getpid(), signal.SIGTERM)
train.run(config.from_dict(json.load(open(sys.argv[1]))), sys.argv[2],
          on_row=on_row)
"""


def restart(directory: pathlib.Path) -> dict[str, float]:
  """Seconds from a new process to its first step: cold, and on a checkpoint
  and a cache of compiled code. A 0.8M GPT-2 on the quickstart's speeches."""
  config = config_of(
      128, 4, 256, 16, 260, data__corpus="sotu", data__tokenizer__kind="byte",
      duration__steps=40, train__log_every_steps=1, evaluation__tokens=4096,
      tracking__wandb="disabled",
      runtime__compilation_cache_dir=str(directory / "xla"))
  path = directory / "config.json"
  path.write_text(json.dumps(config_lib.to_dict(config)), encoding="utf-8")
  store_lib.build(config.data)

  def first_step(stop: int) -> float:
    found = subprocess.run(
        [sys.executable, "-c", _RESTART, str(path), str(directory / "runs"),
         str(time.time()), str(stop)], check=True, cwd=ROOT,
        stdout=subprocess.PIPE, text=True).stdout
    return float(found.split()[1])
  return dict(cold_seconds=first_step(3), restart_seconds=first_step(6))


def _delivered(batches: Any, count: int) -> float:
  """Batches a second."""
  batches[0]
  begin = time.perf_counter()
  for step in range(1, count + 1):
    batches[step]
  return count / (time.perf_counter() - begin)


def input_headroom(rounds: int) -> dict[str, float]:
  """The quickstart's smallest model consumes fastest; and windows of 1,024
  anywhere in a gigabyte of tokens, for a batch of 64, as a GPT-2 124M on a
  GPU would take 8 times a second at most."""
  config = config_lib.load(QUICKSTART, {
      "model.size": "6k", "runtime.num_devices": 1})
  store = store_lib.build(config.data)
  vocabulary = vocabulary_lib.of(config, store.tokenizer())
  objective = objectives.create(config, vocabulary)
  batches = objectives.TrainingBatches(objective, batches_lib.training_batches(
      store, config.data, context_length=config.model.context_length,
      batch_size=config.train.batch_size), config.objective.seed)
  delivered = _delivered(batches, 300)
  config = config_lib.replace(config, model__vocab_size=vocabulary.size)
  steps, state, batch = made(config)
  step, times = steps.compiled_train(batch), []
  for _ in range(rounds + 1):
    seconds, state = burst(step, state, batch, 30)
    times.append(seconds)
  consumed = 1 / statistics.median(times[1:])
  with tempfile.NamedTemporaryFile() as file:
    count = 500_000_000  # of 2 bytes
    os.ftruncate(file.fileno(), 2 * count)
    tokens = np.memmap(file.name, np.uint16, "r+")
    block = np.random.default_rng(0).integers(
        0, 50257, 5_000_000, np.uint16)
    for start in range(0, count, len(block)):
      tokens[start:start + len(block)] = block
    large = batches_lib.Batches(
        batches_lib.TextWindows(tokens, 1024), used=(count - 1) // 1024,
        shuffle_seed=0, batch_size=64, rows=range(64))
    rate = _delivered(large, 100)
  return dict(quickstart_delivered=delivered, quickstart_consumed=consumed,
              quickstart_headroom=delivered / consumed,
              gigabyte_delivered=rate,
              gigabyte_tokens_per_second=rate * 64 * 1024)


def checkpoint_time(directory: pathlib.Path) -> dict[str, Any]:
  """Seconds of the loop that a save takes, and of a step beside it."""
  result = {}
  for name, config in {
      "0.2M": config_of(64, 4, 256, 16, 257),
      "0.9M": config_of(128, 4, 256, 16, 512),
      "6.9M": config_of(256, 6, 256, 16, 8192)}.items():
    steps, state, batch = made(config)
    step = steps.compiled_train(batch)
    seconds, state = burst(step, state, batch, 2)
    saved = checkpoints.Checkpoints(directory / name, config.checkpoint)
    times = []
    for i in range(1, 5):
      begin = time.perf_counter()
      saved.save(i, state, {})
      times.append(time.perf_counter() - begin)
      again, state = burst(step, state, batch, 2)
      seconds = min(seconds, again)
      saved.latest_step()  # waits until it is on disk
    begin = time.perf_counter()
    saved.close()
    result[name] = dict(step_seconds=seconds,
                        save_seconds=statistics.median(times[1:]),
                        share=statistics.median(times[1:]) / seconds)
  return result


def main(rounds: int) -> dict[str, Any]:
  """All of it; prints as it goes."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  results: dict[str, Any] = {}

  def record(name: str, figures: dict[str, Any]) -> None:
    results[name] = figures
    print(f"{name}:")
    for key, value in figures.items():
      print(f"  {key}: " + (json.dumps(value) if isinstance(value, dict)
                            else f"{value:.4g}"), flush=True)
  with tempfile.TemporaryDirectory() as scratch:
    directory = pathlib.Path(scratch)
    record("sharding", sharding_overhead(rounds))
    record("depth", compile_against_depth())
    record("devices", devices(rounds))
    record("processes", processes(directory / "processes"))
    record("restart", restart(directory))
    record("input", input_headroom(rounds))
    record("checkpoint", checkpoint_time(directory))
  return results
