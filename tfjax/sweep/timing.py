# SPDX-License-Identifier: Apache-2.0
"""How long a model's steps take in this process, by training it for a moment.

This is what the worker processes of a calibration run in place of the sweep's
runs; which models, and what follows for the sweep, is `calibrate`'s.
"""

import dataclasses
import pathlib
import time

import jax

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import memory as memory_lib
from tfjax.train import loop
from tfjax.train import optimizers
from tfjax.train import parts as parts_lib
from tfjax.train import records
from tfjax.train import step as step_lib

FILE = "timing.json"
# Seconds of training that a model is timed for, and of evaluation, about.
_STEP_SECONDS, _EVALUATION_SECONDS = 2.5, 1.0
_FIRST_STEPS, _FIRST_BATCHES = 4, 2


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds of a model's runs, as its worker process measured them.

  Attributes:
    compile_seconds: that the first run of the model in a process takes
      longer than the next.
    run_seconds: of a run beside its compilation and what is below.
    step_seconds: of a step.
    batch_seconds: of a batch of evaluation, and `batches` an evaluation has.
    end_seconds: from the last evaluation to the end: a checkpoint, a record.
  """

  compile_seconds: float
  run_seconds: float
  step_seconds: float
  batch_seconds: float
  batches: int
  end_seconds: float

  def run(self, config: config_lib.ExperimentConfig, steps: int) -> float:
    """Seconds of a run of so many steps whose model is compiled."""
    every = config.evaluation.every_steps
    evaluations = 1 + ((steps - 1) // every if every else 0)
    training = (self.run_seconds + steps * self.step_seconds +
                evaluations * self.batches * self.batch_seconds)
    # A save while training goes on costs no more than the one at the end.
    return training + self.end_seconds * (
        1 + _saves(config.checkpoint, steps, training))


@dataclasses.dataclass(frozen=True)
class Timed:
  """What a worker process found.

  Attributes:
    device_kind: as JAX has it.
    mesh: devices of a run along each axis.
    available_bytes: of a device; None: JAX does not say, as on CPUs.
    timing: None: by its estimate the step does not fit, and was not tried.
  """

  device_kind: str
  mesh: dict[str, int]
  available_bytes: int | None
  timing: Timing | None


@dataclasses.dataclass(frozen=True)
class _Done:
  """What the worker's loop asks of a record."""

  status: str = "complete"


def run(config: config_lib.ExperimentConfig, workdir: str, *,
        sweep: str | None, run_id: str) -> _Done:
  """Times the model of `config` and writes what came of it beside the log."""
  del sweep
  directory = pathlib.Path(workdir) / run_id
  parts = parts_lib.make(config)
  device = parts.mesh.devices.flat[0]
  available = (device.memory_stats() or {}).get("bytes_limit")
  needed = memory_lib.estimate(
      parts.config, parts.mesh.shape, device.platform).total
  timing = None
  if available is None or needed <= available:
    timing = _time(config, parts, directory)
  found = Timed(device.device_kind, dict(parts.mesh.shape), available, timing)
  records.write_json(directory / FILE, dataclasses.asdict(found))
  return _Done()


def _time(config: config_lib.ExperimentConfig, parts: parts_lib.Parts,
          directory: pathlib.Path) -> Timing:
  """Trains twice: a few steps to compile, then for a while."""
  misses = []
  jax.monitoring.register_event_listener(
      lambda event, **_: misses.append(event)
      if event == "/jax/compilation_cache/cache_misses" else None)
  steps = min(_FIRST_STEPS, parts.budget.steps)
  first = _trained(config, steps, _FIRST_BATCHES, directory / "first")
  if misses:
    # Compiled now, and found in the cache by every process of the sweep.
    step_lib.forget_steps()
    first = _trained(config, steps, _FIRST_BATCHES, directory / "cached")
  per_step = max(first.step_seconds, 1e-4)
  per_batch = per_step / 3 * _evaluation_size(config) / config.train.batch_size
  then = _trained(
      config, min(max(2 * _FIRST_STEPS, int(_STEP_SECONDS / per_step)),
                  parts.budget.steps),
      max(_FIRST_BATCHES, int(_EVALUATION_SECONDS / per_batch)),
      directory / "then")
  batch = then.evaluation_seconds / then.batches
  compile_seconds = (first.begin_seconds - then.begin_seconds +
                     first.evaluation_seconds - first.batches * batch)
  return Timing(
      compile_seconds=max(0.0, compile_seconds),
      run_seconds=then.begin_seconds, step_seconds=then.step_seconds,
      batch_seconds=batch, batches=len(parts.evaluation_batches),
      end_seconds=then.end_seconds)


@dataclasses.dataclass(frozen=True)
class _Trained:
  """When a short run did what, in seconds since it was called.

  Attributes:
    rows: step and time of each row of training.
    batches: of its evaluation.
  """

  rows: list[tuple[int, float]]
  evaluation_seconds: float
  batches: int
  end_seconds: float

  @property
  def step_seconds(self) -> float:
    """Of a step after the first."""
    (first, begin), (last, end) = self.rows[0], self.rows[-1]
    return (end - begin) / (last - first) if last > first else 0.0

  @property
  def begin_seconds(self) -> float:
    """Until the first step, and what that takes longer than others."""
    return max(0.0, self.rows[0][1] - self.step_seconds)


def _trained(config: config_lib.ExperimentConfig, steps: int, batches: int,
             directory: pathlib.Path) -> _Trained:
  """Trains a run of so many steps, and evaluates on about as many batches."""
  tokens = batches * _evaluation_size(config) * lengths_lib.of(config).window
  tokens = min(tokens, config.evaluation.tokens or tokens)
  config = dataclasses.replace(
      config, duration=config_lib.DurationConfig(steps=steps),
      # The same program whatever the schedule; so small that none diverges.
      optimizer=dataclasses.replace(
          optimizers.structure(config.optimizer), learning_rate=1e-6),
      train=dataclasses.replace(
          config.train, log_every_steps=max(1, steps // 8)),
      evaluation=dataclasses.replace(
          config.evaluation, every_steps=None, tokens=tokens),
      checkpoint=config_lib.CheckpointConfig(every_seconds=None),
      tracking=dataclasses.replace(config.tracking, wandb="disabled"))
  begun = time.perf_counter()
  rows: list[tuple[str, int, float]] = []
  loop.run(config, directory, on_row=lambda row: rows.append(
      (row["kind"], row["step"], time.perf_counter() - begun)))
  end = time.perf_counter() - begun
  trained = [(step, at) for kind, step, at in rows if kind == "train"]
  (evaluated,) = (at for kind, _, at in rows if kind == "evaluation")
  return _Trained(trained, evaluated - trained[-1][1],
                  len(parts_lib.make(config).evaluation_batches),
                  end - evaluated)


def _evaluation_size(config: config_lib.ExperimentConfig) -> int:
  return config.evaluation.batch_size or config.train.batch_size


def _saves(config: config_lib.CheckpointConfig, steps: int,
           seconds: float) -> int:
  """Checkpoints before the last one."""
  by_step = [(steps - 1) // every for every in (
      config.every_steps, config.keep_every_steps) if every]
  by_time = int(seconds / config.every_seconds) if config.every_seconds else 0
  return max([by_time, *by_step])
