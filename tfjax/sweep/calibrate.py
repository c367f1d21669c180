# SPDX-License-Identifier: Apache-2.0
"""How long the runs of a sweep will take here, from a short timing of each.

Every distinct model of the sweep is trained for a moment by the launcher and
the worker processes that the sweep itself will have, all of them busy at the
same time. `measure` does that (what a worker does is in `timing`), `pack` puts
the runs on the workers as the launcher will. A machine that is not here is
`tfjax.cost.estimates`'s.
"""

import collections
import dataclasses
import heapq
import json
import math
import pathlib
import statistics
import tempfile
import time
from typing import Iterator, Sequence

from tfjax import config as config_lib
from tfjax.sweep import shares
from tfjax.sweep import timing as timing_lib
from tfjax.sweep.launch import launch
from tfjax.sweep.launch import Observer
from tfjax.sweep.launch import Outcome
from tfjax.sweep.specs import RunSpec
from tfjax.train import optimizers

_RUNNER = "tfjax.sweep.timing:run"
# Models that a worker keeps compiled (`tfjax.train.step`).
_KEPT = 8


class CalibrationError(RuntimeError):
  """A model could not be timed; the message says which, and why."""


@dataclasses.dataclass(frozen=True)
class Calibration:
  """What was timed.

  Attributes:
    workers: processes that ran at the same time.
    start_seconds: of a worker process, until it takes a run.
    timed: by `speed_key`; models that the time did not suffice for are not
      there.
    flops_per_step: of those that are.
    took_seconds: the calibration itself.
  """

  workers: int
  start_seconds: float
  timed: dict[str, timing_lib.Timed]
  flops_per_step: dict[str, float]
  took_seconds: float

  def timing(self, spec: RunSpec) -> timing_lib.Timing | None:
    """Of a spec's model, or scaled by FLOPs from that nearest in size."""
    key, flops = speed_key(spec.config), _flops_per_step(spec)
    if key in self.timed:
      return self.timed[key].timing
    near = min(self.timed, key=lambda one: abs(
        math.log(self.flops_per_step[one] / flops)))
    timing, ratio = self.timed[near].timing, flops / self.flops_per_step[near]
    return timing and dataclasses.replace(
        timing, step_seconds=timing.step_seconds * ratio,
        batch_seconds=timing.batch_seconds * ratio)


def speed_key(config: config_lib.ExperimentConfig) -> str:
  """The same for runs whose steps and evaluations take the same time."""
  return _digest(config, config_lib.OptimizerConfig())


def _compile_key(config: config_lib.ExperimentConfig) -> str:
  """The same for runs that share their compiled step."""
  return _digest(config, optimizers.structure(config.optimizer))


def _digest(config: config_lib.ExperimentConfig,
            optimizer: config_lib.OptimizerConfig) -> str:
  config = dataclasses.replace(
      config, seed=0, optimizer=optimizer,
      duration=config_lib.DurationConfig(steps=1),
      data=dataclasses.replace(config.data, unique_tokens=None, max_epochs=1.0,
                               shuffle_seed=0))
  # A run's hash leaves out where it is computed.
  return "-".join((config_lib.config_hash(config), repr(config.mesh),
                   repr(config.evaluation)))


# --- In the parent -----------------------------------------------------------


def num_workers(specs: Sequence[RunSpec], workers: int | None) -> int:
  """Runs of a sweep that the launcher has at work at the same time.

  Args:
    workers: as for `tfjax.sweep.launch`.
  """
  if workers == 0:
    return 1  # in this process
  return len(shares.of([spec.config for spec in specs], workers, len(specs)))


def measure(specs: Sequence[RunSpec], workers: int | None = None, *,
            most_seconds: float = 60.0) -> Calibration:
  """Times every distinct model of a sweep, those of long runs first.

  Args:
    workers: as for `tfjax.sweep.launch`.
    most_seconds: after so long, what is timed has to do.

  Raises:
    CalibrationError: a model cannot be trained.
    LaunchError: workers cannot start.
  """
  begun = time.monotonic()
  count = num_workers(specs, workers)
  models: dict[str, RunSpec] = {}
  for spec in sorted(specs, key=lambda one: -one.budget.flops_total):
    models.setdefault(speed_key(spec.config), spec)
  watch = _Watch(models, most_seconds)
  with tempfile.TemporaryDirectory(prefix="tfjax-calibrate-") as workdir:
    watch.workdir = pathlib.Path(workdir)
    try:
      launch(list(_tasks(models, count)), workdir, workers=count,
             observer=watch, runner=_RUNNER)
    except _Enough:
      pass
  return Calibration(
      workers=count, start_seconds=statistics.mean(watch.starts),
      timed={key: _mean(found) for key, found in watch.found.items()},
      flops_per_step={key: _flops_per_step(models[key])
                      for key in watch.found},
      took_seconds=time.monotonic() - begun)


def pack(specs: Sequence[RunSpec],
         calibration: Calibration) -> tuple[list[float | None], float | None]:
  """Seconds of each run, and from the launch to the end of the last.

  Each worker takes the longest run that is left, and compiles what it has not
  compiled before, as `tfjax.sweep.launch` has it.
  """
  order = sorted(specs, key=lambda one: (-one.budget.flops_total, one.run_id))
  free = [(calibration.start_seconds, worker)
          for worker in range(calibration.workers)]
  kept = [collections.OrderedDict() for _ in free]
  seconds: dict[str, float] = {}
  for spec in order:
    timing = calibration.timing(spec)
    if timing is None:
      return [None] * len(specs), None
    begin, worker = heapq.heappop(free)
    took = timing.run(spec.config, spec.budget.steps)
    key, models = _compile_key(spec.config), kept[worker]
    if key not in models:
      took += timing.compile_seconds
    models[key] = None
    models.move_to_end(key)
    if len(models) > _KEPT:
      models.popitem(last=False)
    seconds[spec.run_id] = took
    heapq.heappush(free, (begin + took, worker))
  return [seconds[spec.run_id] for spec in specs], max(free)[0]


class _Enough(Exception):
  """All that was to be timed is."""


class _Watch(Observer):
  """Collects what the workers write, and ends the launch when it is enough."""

  def __init__(self, models: dict[str, RunSpec], most_seconds: float):
    self.workdir: pathlib.Path | None = None
    self.found: dict[str, list[timing_lib.Timed]] = {}
    self.starts: list[float] = []
    self._models = models
    self._begun = time.monotonic()
    self._end = self._begun + most_seconds
    self._workers = 0

  def launched(self, specs: Sequence[RunSpec], workers: int) -> None:
    del specs
    self._workers = workers

  def started(self, spec: RunSpec) -> None:
    del spec
    if len(self.starts) < self._workers:
      self.starts.append(time.monotonic() - self._begun)

  def ended(self, outcome: Outcome) -> None:
    path = self.workdir / outcome.spec.run_id / timing_lib.FILE
    if not path.exists():
      raise CalibrationError(
          f"{outcome.spec.config.name} ({outcome.spec.budget.params_total:,} "
          f"parameters) could not be timed: {outcome.state.reason}")
    values = json.loads(path.read_text(encoding="utf-8"))
    timing = values.pop("timing")
    self.found.setdefault(speed_key(outcome.spec.config), []).append(
        timing_lib.Timed(
            **values, timing=timing and timing_lib.Timing(**timing)))
    if len(self.found) == len(self._models):
      raise _Enough()

  def tick(self) -> None:
    if self.found and time.monotonic() > self._end:
      raise _Enough()


def _tasks(models: dict[str, RunSpec], workers: int
           ) -> Iterator[RunSpec]:
  """Every model once, then again and again: no worker is idle while another
  still measures, as none will be in the sweep. They share no work, nor wait
  for each other."""
  once = [dataclasses.replace(spec, config=dataclasses.replace(
      spec.config, sweep=config_lib.SweepConfig()))
          for spec in models.values()]
  yield from once
  for number in range(1, 1 + max(3 * workers, len(once)) // len(once) * 2):
    for spec in once:
      # Less work comes later.
      budget = dataclasses.replace(
          spec.budget, flops=spec.budget.flops * 10.0**-(12 * number))
      yield dataclasses.replace(
          spec, run_id=f"{spec.run_id}-{number}", budget=budget)


def _mean(found: Sequence[timing_lib.Timed]) -> timing_lib.Timed:
  """Of what several workers found of a model, or one several times."""
  first = found[0]
  if first.timing is None:
    return first
  return dataclasses.replace(first, timing=timing_lib.Timing(**{
      entry.name: statistics.mean(getattr(one.timing, entry.name)
                                  for one in found)
      for entry in dataclasses.fields(timing_lib.Timing)}))


def _flops_per_step(spec: RunSpec) -> float:
  return spec.budget.flops_total / spec.budget.steps
