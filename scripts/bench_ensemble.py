# SPDX-License-Identifier: Apache-2.0
"""How fast runs train in one step, beside the same runs one after another.

Part of scripts/bench.py (--ensemble): 8 members at three small sizes; on one
CPU device and core, on 8 simulated devices of this host's cores, and on an
accelerator where there is one. Each place is a process of its own. In it the
forms take short bursts of steps in turn, compiled beforehand, and the fastest
of each counts, so that what else the machine does weighs on none of them. On
one core it is CPU time that counts, elsewhere wall time.

    one by one         each run's step on one device, one run after the other
    data parallel      the same, each run's batch over all devices, as a run
                       alone would do
    map, vmap          all members on one device: in turn, or at once
    map, vmap (runs)   members spread over all devices

A rate is of the tokens of all members. What config.sweep.ensemble = auto
chooses is told for one worker with all cores and for one a core.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# pylint: disable=wrong-import-position
from tfjax import config as config_lib
from tfjax.cost import cores as cores_lib
from tfjax.train import tuning

MEMBERS = 8
# Width, layers, length, batch, vocabulary.
SIZES = {"15k": (16, 2, 32, 8, 512), "230k": (64, 4, 128, 8, 512),
         "1M": (128, 4, 128, 8, 1536)}
PLACES = {"one CPU device": 1, "8 simulated devices": 8}
_BURST_SECONDS = 0.5

Burst = Callable[[int], None]


def config_of(size: str, devices: int | None) -> config_lib.ExperimentConfig:
  """A GPT-2 of a size; `devices` of a run alone."""
  d_model, layers, length, batch, vocab = SIZES[size]
  config = config_lib.default()
  config_lib.override(config, {
      "model.d_model": d_model, "model.num_layers": layers,
      "model.num_heads": max(1, d_model // 32), "model.vocab_size": vocab,
      "model.context_length": length, "train.batch_size": batch,
      "duration.steps": 20_000, "runtime.num_devices": devices})
  return config_lib.resolve(config)


# --- In the process of one place ---------------------------------------------


def alone(config: config_lib.ExperimentConfig, batch: Any) -> Burst:
  """Each member's own step, one after the other."""
  import jax
  import numpy as np
  from tfjax.train import optimizers
  from tfjax.train import sharding
  from tfjax.train import step as step_lib
  mesh = sharding.make_mesh(config)
  steps = step_lib.steps_for(config, mesh)
  values = optimizers.make_hyperparameters(config.optimizer, 1000)
  states = [steps.init(jax.random.key(seed), values)
            for seed in range(MEMBERS)]
  placed = step_lib.put(mesh, batch)
  step = steps.compiled_train(placed)

  def burst(count: int) -> None:
    for index in range(MEMBERS):
      before = None
      for _ in range(count):
        states[index], metrics = step(states[index], placed)
        if before is not None:  # read one step late, as training does
          np.asarray(before)
        before = metrics["loss"]
      np.asarray(before)
  return burst


def together(config: config_lib.ExperimentConfig, batch: Any, form: str,
             devices: int) -> Burst:
  """All members in one step."""
  import jax
  import numpy as np
  from tfjax.train import ensemble_step
  from tfjax.train import optimizers
  from tfjax.train import sharding
  from tfjax.train import step as step_lib
  own = config_lib.replace(config, runtime__num_devices=1)
  init = step_lib.steps_for(
      own, sharding.make_mesh(own, jax.devices()[:1])).init
  values = optimizers.make_hyperparameters(config.optimizer, 1000)
  steps = ensemble_step.steps_for(
      config, jax.devices()[:devices], MEMBERS, form, True)
  state = steps.stack([init(jax.random.key(seed), values)
                       for seed in range(MEMBERS)])
  placed, active = steps.put([batch]), steps.active(range(MEMBERS))
  step = steps.compiled_train(state, placed)

  def burst(count: int) -> None:
    nonlocal state
    before = None
    for _ in range(count):
      state, metrics = step(state, placed, active)
      if before is not None:
        np.asarray(before)
      before = metrics["loss"]
    np.asarray(before)
  return burst


def batch_of(config: config_lib.ExperimentConfig) -> Any:
  import numpy as np
  from tfjax.models import inputs as inputs_lib
  from tfjax.objectives import loss as loss_lib
  shape = (config.train.batch_size, config.model.context_length)
  tokens = np.random.default_rng(0).integers(
      0, config.model.vocab_size, (2, *shape), np.int32)
  return loss_lib.Batch(inputs_lib.Inputs(tokens[0]), tokens[1],
                        np.ones(shape, np.float32))


def serve(size: str, rounds: int) -> dict[str, Any]:
  """Tokens a second of each form in this process."""
  import jax
  count = jax.device_count()
  config = config_of(size, 1)
  batch = batch_of(config)
  forms = {"one by one": alone(config, batch)}
  if count > 1:
    forms["data parallel"] = alone(config_of(size, None), batch)
  for form in ("map", "vmap"):
    forms[form] = together(config, batch, form, 1)
    if count > 1:
      forms[f"{form} (runs)"] = together(config, batch, form, count)
  now = (time.process_time if len(cores_lib.usable()) == 1
         else time.perf_counter)

  def taken(burst: Burst, count: int) -> float:
    begin = now()
    burst(count)
    return (now() - begin) / count
  counts, seconds = {}, {}
  for name, burst in forms.items():
    burst(1)
    counts[name] = max(1, round(_BURST_SECONDS / taken(burst, 2)))
  for _ in range(rounds):
    for name, burst in forms.items():
      seconds[name] = min(taken(burst, counts[name]),
                          seconds.get(name, float("inf")))
  tokens = MEMBERS * config.train.batch_size * config.model.context_length
  return dict(rates={name: tokens / best for name, best in seconds.items()},
              **choices(config))


def choices(config: config_lib.ExperimentConfig) -> dict[str, Any]:
  """What auto makes of the members, and which form they would take."""
  import jax
  from tfjax.cost import budget as budget_lib
  from tfjax.sweep import ensemble
  from tfjax.sweep import specs as specs_lib
  from tfjax.train import ensemble_step
  budget = budget_lib.plan(config, None)
  free = dataclasses.replace(config, runtime=config_lib.RuntimeConfig())
  specs = [specs_lib.RunSpec(f"run-{seed}", dataclasses.replace(
      free, seed=seed), {}, budget) for seed in range(MEMBERS)]
  flops = budget.batch_tokens * budget.flops_per_token
  cores = len(cores_lib.usable())
  return dict(
      params=budget.params_total, step_flops=flops,
      form=ensemble_step.form(jax.default_backend(), flops),
      auto={str(workers): [len(group) for group in ensemble.groups(
          specs, workers)] for workers in sorted({1, cores})})


# --- All places --------------------------------------------------------------


def main(rounds: int) -> dict[str, Any]:
  """Measures everywhere, and prints a table a place."""
  places: dict[str, dict[str, str]] = {
      place: {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
      for place, count in PLACES.items()}
  if tuning.has_accelerator():
    places["accelerator"] = {}
  figures: dict[str, Any] = {}
  for place, environment in places.items():
    figures[place] = {}
    for size in SIZES:
      figures[place][size] = _measured(
          size, rounds, os.environ | environment,
          cores_lib.usable()[:1] if place == "one CPU device" else None)
    show(place, figures[place])
  return figures


def _measured(size: str, rounds: int, environment: dict[str, str],
              cores: list[int] | None) -> dict[str, Any]:
  process = subprocess.run(
      [sys.executable, __file__, size, str(rounds)], env=environment,
      check=True, stdout=subprocess.PIPE, text=True, preexec_fn=(
          None if cores is None else lambda: os.sched_setaffinity(0, cores)))
  return json.loads(process.stdout.splitlines()[-1])


def show(place: str, sizes: dict[str, Any]) -> None:
  """A place as a table on the terminal."""
  import rich.console
  import rich.table
  table = rich.table.Table(
      title=f"{place}: {MEMBERS} members, tokens/s of all (times one by one)",
      title_justify="left")
  table.add_column("")
  for size, found in sizes.items():
    table.add_column(f"{size} ({found['params']:,})", justify="right")
  for name in next(iter(sizes.values()))["rates"]:
    table.add_row(name, *(
        f"{found['rates'][name]:,.0f} "
        f"({found['rates'][name] / found['rates']['one by one']:.2f})"
        for found in sizes.values()))
  table.add_row("FLOPs a step", *(
      f"{found['step_flops']:.2g}" for found in sizes.values()))
  table.add_row("form taken", *(found["form"] for found in sizes.values()))
  for workers in next(iter(sizes.values()))["auto"]:
    table.add_row(f"auto, {workers} worker(s)", *(
        "alone" if max(found["auto"][workers]) == 1 else
        " + ".join(map(str, found["auto"][workers]))
        for found in sizes.values()))
  rich.console.Console(width=110).print(table)


if __name__ == "__main__":
  print(json.dumps(serve(sys.argv[1], int(sys.argv[2]))))
