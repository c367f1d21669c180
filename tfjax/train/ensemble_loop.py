# SPDX-License-Identifier: Apache-2.0
"""The order of operations of many runs that train in one step.

Each member is a `course.Run`, with a directory, rows, checkpoints and a record
of its own; here is what they do together: their steps, evaluations and the end
of them, and how what all spend is shared out. A member that diverges, fails or
is done leaves the others to go on. Which runs may be members is
`tfjax.sweep.ensemble`'s.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
from typing import Any, Iterator, Sequence

import jax
import numpy as np

from tfjax import config as config_lib
from tfjax.cost import energy
from tfjax.models import attention_choice
from tfjax.train import claim
from tfjax.train import clock as clock_lib
from tfjax.train import course
from tfjax.train import ensemble_step
from tfjax.train import evaluation
from tfjax.train import interrupts
from tfjax.train import lease
from tfjax.train import loop
from tfjax.train import parts as parts_lib
from tfjax.train import records
from tfjax.train import spent as spent_lib
from tfjax.train import step as step_lib
from tfjax.train import summary

_LOG = logging.getLogger("tfjax")


class SharedMeter:
  """A member's part of what a meter of all measures; as `energy.Meter`."""

  def __init__(self, meter: energy.Meter, share: float):
    self._meter, self._share = meter, share
    self._last, self._own = meter.kwh(), 0.0

  @property
  def source(self) -> str | None:
    return self._meter.source

  def share(self, share: float) -> None:
    """From now on it is such a share."""
    self.kwh(fresh=True)
    self._share = share

  def kwh(self, fresh: bool = False) -> float | None:
    """Since it was made; None where nothing is measured."""
    now = self._meter.kwh(fresh)
    if now is None or self._last is None:
      self._last = None  # once unknown, its part is not known any more
      return None
    self._own += (now - self._last) * self._share
    self._last = now
    return self._own


class Member:
  """A run of an ensemble, from the claim of its directory to its record.

  Attributes:
    record: once it has ended.
    error: what has ended it without a record of its own making.
    run: while it goes on.
    step: how many steps it has done.
  """

  def __init__(self, config: config_lib.ExperimentConfig,
               run_dir: pathlib.Path, sweep: str | None, part: float = 1.0):
    """`part`: its share of what is spent from now on."""
    self.config, self.run_dir, self.sweep = config, run_dir, sweep
    self.record: records.RunRecord | None = None
    self.error: Exception | None = None
    self.run: course.Run | None = None
    self.step = 0
    self.clock = clock_lib.Clock()
    self.part = part
    self.clock.share(part)
    self.meter: SharedMeter | None = None
    self.spent: spent_lib.Spent | None = None
    self._num_members: int | None = None
    self._claimed = contextlib.ExitStack()
    self._opened = contextlib.ExitStack()
    self._started_at = records.now()

  @property
  def live(self) -> bool:
    return self.record is None and self.error is None

  @contextlib.contextmanager
  def guard(self) -> Iterator[None]:
    """What fails within fails this member alone."""
    try:
      yield
    except Exception as error:  # pylint: disable=broad-exception-caught
      self.fail(error)

  def claim(self) -> None:
    """Takes the directory; a run that is finished has its record, and one
    that another process is at is left to it."""
    try:
      finished = loop.claimed(self.config, self.run_dir, self._claimed)
      self.record = finished and records.RunRecord(**finished)
    except claim.RunDirectoryBusyError as error:
      _LOG.info("%s: %s", self.run_dir.name, error)
      self.error = error

  def prepare(self, mesh: jax.sharding.Mesh, meter: energy.Meter,
              members: int) -> None:
    """Data, budget and the newest checkpoint's state, or a new one."""
    self._num_members = members
    self.meter = SharedMeter(meter, self.part)
    self.spent = spent_lib.Spent(
        self.config, mesh, self.run_dir, self.clock, self.meter)
    self.run = course.Run(
        self.config, self.run_dir, self.sweep, self._started_at, None,
        self.spent, parts=_parts(self.config, mesh))
    self.run.others["ensemble_members"] = members
    self._opened.enter_context(self.run.opened())
    self.run.start()
    self.step = int(self.run.state.step)

  def share(self, part: float) -> None:
    """From now on such a part of what all spend is its own."""
    self.part = part
    self.clock.share(part)
    if self.meter is not None:
      self.meter.share(part)

  def at(self, phase: str, clock_phase: str, was: str | None = None) -> None:
    """Where it is, for its watchdog and its clock."""
    self.run.dog.at(phase, self.step)
    self.clock.enter(clock_phase, was=was)

  def end(self, ending: summary.Ending) -> None:
    """Writes its record and gives the directory back."""
    with self.guard():
      saved = self.run.settle()
      self._opened.close()
      self.record = self.run.end(ending, saved)
      self._claimed.close()

  def fail(self, error: Exception) -> None:
    """Records the failure, unless the run has become another process's."""
    _LOG.error("%s: %s: %s", self.run_dir.name, type(error).__name__, error)
    self.error = error
    with contextlib.suppress(Exception):  # the first error counts
      self._opened.close()
    if self.spent is not None and not isinstance(error, lease.LostError):
      summary.record_failure(
          self.config, self.run_dir, self.sweep, self._started_at, error,
          self.spent, self._num_members)
    self._claimed.close()

  def close(self) -> None:
    """Gives back what it still holds; nothing is recorded."""
    self._opened.close()
    self._claimed.close()


def _parts(config: config_lib.ExperimentConfig,
           mesh: jax.sharding.Mesh) -> parts_lib.Parts:
  """Of a member, whose own functions (a first state, a checkpoint's layout)
  are of one device; what it tells of devices is of all that it shares."""
  alone = dataclasses.replace(
      config, mesh=config_lib.MeshConfig(), runtime=dataclasses.replace(
          config.runtime, num_devices=1))
  parts = parts_lib.make(alone)
  return dataclasses.replace(
      parts, given=config, mesh=mesh, config=dataclasses.replace(
          parts.config, mesh=config.mesh, runtime=config.runtime))


def train(members: Sequence[Member], devices: Sequence[jax.Device],
          stop: interrupts.Stop) -> None:
  """Takes claimed members to their ends.

  Raises:
    Exception: whatever ended them all, after it was recorded as `failed`.
  """
  live = [member for member in members if member.live]
  if not live:
    return
  devices = list(devices)[:len(live)]
  mesh = ensemble_step.run_mesh(devices)
  with energy.Meter(live[0].config.cost.measure_energy, devices) as meter:
    _share(live)
    states = []
    for member in live:
      with member.guard():
        member.prepare(mesh, meter, len(live))
        # On the host, so that no device holds all of them.
        states.append(jax.device_get(member.run.state))
        member.run.state = None
    started = [member for member in live if member.live]
    try:
      if started:
        _share(started)
        ensemble = _Ensemble(started, states, devices)
        states.clear()  # they are on the devices
        ensemble.train(stop)
    except Exception as error:
      for member in started:
        if member.live:
          member.fail(error)
      raise


def _share(members: Sequence[Member]) -> None:
  """What is spent from now on is shared by those that still go on."""
  live = [member for member in members if member.live]
  for member in live:
    if member.part != 1 / len(live):
      member.share(1 / len(live))


class _Ensemble:
  """Members whose states have been made or restored, in one step."""

  def __init__(self, members: Sequence[Member],
               states: Sequence[step_lib.TrainState],
               devices: Sequence[jax.Device]):
    self._members = list(members)
    self._parts = members[0].run.parts
    budget = self._parts.budget
    self._total = budget.steps
    # One batch for all who read the same data in the same order.
    self._orders = [member.config.data.shuffle_seed for member in members]
    self._steps = ensemble_step.steps_for(
        self._parts.config, devices, len(members), ensemble_step.form(
            devices[0].platform, budget.batch_tokens * budget.flops_per_token),
        len(set(self._orders)) == 1)
    self._state = self._steps.stack(states)
    # One for all, who are saved together: the shortest that one asks for.
    self._save_timer = clock_lib.SaveTimer(min(
        (member.config.checkpoint for member in members),
        key=lambda checkpoint: checkpoint.every_seconds or math.inf))
    # Of the steps in flight: the step, who took it, what came of it.
    self._pending: tuple[int, list[int], Any] | None = None

  def train(self, stop: interrupts.Stop) -> None:
    self._at("compile", "compile")
    train_step = self._compile()
    for member in self._live():
      member.spent.note(member.step)
    # Their results have their losses from it.
    self._evaluate(self._total, [
        index for index, member in enumerate(self._members)
        if member.step == self._total and member.run.rows_lost])
    self._end_those_at_the_end()
    while live := self._live():
      _share(live)
      # Those that are ahead wait: from there on all are level.
      step = min(member.step for member in live)
      acting = [index for index, member in enumerate(self._members)
                if member.live and member.step == step]
      self._at("data", "input")
      batch = self._batch(step)
      active = self._steps.active(acting)
      busy = (self._pending is not None and
              not self._pending[2]["loss"].is_ready())
      self._at("step", "step", was="step" if busy else None)
      self._state, metrics = train_step(self._state, batch, active)
      for index in acting:
        self._members[index].step += 1
      before, self._pending = self._pending, (step + 1, acting, metrics)
      if before:
        self._read(*before)
      stopping = stop.is_set()
      self._after(step + 1, acting, stopping)
      if stopping:
        self._interrupt(stop)

  def _live(self) -> list[Member]:
    return [member for member in self._members if member.live]

  def _at(self, phase: str, clock_phase: str, was: str | None = None) -> None:
    for member in self._live():
      member.at(phase, clock_phase, was)

  def _compile(self) -> jax.stages.Compiled:
    batch = self._batch(0)
    attention, why = attention_choice.explain(
        self._parts.config.model, self._steps.mesh.devices.flat[0].platform,
        self._parts.config.train.dtype, self._parts.batches[0].inputs)
    for member in self._members:
      member.run.attention = attention
    _LOG.info(
        "an ensemble of %d runs (%s) on %d device(s), by %s; attention: %s "
        "(%s)", len(self._members),
        ", ".join(member.run_dir.name for member in self._members),
        self._steps.mesh.size, self._steps.form, attention, why)
    return self._steps.compiled_train(self._state, batch)

  def _batch(self, step: int) -> Any:
    found = {}
    for member, order in zip(self._members, self._orders):
      if order not in found:
        found[order] = member.run.parts.batches[step]
    return self._steps.put([found[order] for order in self._orders])

  # --- After a step ----------------------------------------------------------

  def _read(self, step: int, acting: Sequence[int], metrics: Any) -> None:
    """Takes note of a step; who cannot go on from it has diverged."""
    host = {name: np.asarray(values) for name, values in metrics.items()}
    for index in acting:
      member = self._members[index]
      if member.live:
        with member.guard():
          bad = member.run.read([(step, {
              name: values[index] for name, values in host.items()})])
          if bad:
            self._diverge(member, bad.step, bad.reason)

  def _diverge(self, member: Member, step: int, reason: str) -> None:
    self._end(member, summary.Ending(step, "diverged", reason))

  def _after(self, step: int, acting: Sequence[int], stopping: bool) -> None:
    """The evaluations and checkpoints that are due after a step."""
    evaluating, saving = [], []
    all_due = stopping or self._save_timer.due()
    for index in acting:
      run = self._members[index].run
      evaluate, save = run.due(step)
      if evaluate:
        evaluating.append(index)
      # A row that could not be written ends its run, in the save.
      if save or all_due or run.rows.failure is not None:
        saving.append(index)
    if not evaluating and not saving:
      return
    if self._pending:
      (pending, self._pending) = (self._pending, None)
      self._read(*pending)
    self._evaluate(step, evaluating)
    self._save(step, saving)
    self._end_those_at_the_end()

  def _evaluate(self, step: int, members: Sequence[int]) -> None:
    members = [index for index in members if self._members[index].live]
    if not members:
      return
    self._at("evaluation", "evaluation")
    found = evaluation.evaluate_members(
        self._steps, self._state.params, self._parts.evaluation_batches,
        self._parts.num_bytes, members)
    for index, result in zip(members, found):
      member = self._members[index]
      with member.guard():
        if bad := member.run.evaluated(step, result):
          self._diverge(member, bad.step, bad.reason)

  def _save(self, step: int, members: Sequence[int]) -> None:
    members = [index for index in members if self._members[index].live]
    if not members:
      return
    self._at("checkpoint", "checkpoint")
    for index in members:
      member = self._members[index]
      with member.guard():
        # One at a time, so that the host never has all of them.
        state, = self._steps.unstack(self._state, [index])
        member.run.save(step, jax.device_put(state, jax.tree.map(
            lambda x: x.sharding, member.run.parts.steps.abstract_state)))
    if all(index in members for index, member in enumerate(self._members)
           if member.live):
      self._save_timer.reset()

  # --- End -------------------------------------------------------------------

  def _end(self, member: Member, ending: summary.Ending) -> None:
    self._at("checkpoint", "checkpoint")
    member.end(ending)
    _share(self._members)

  def _end_those_at_the_end(self) -> None:
    for member in self._live():
      if member.step == self._total:
        self._end(member, summary.Ending(self._total, "complete"))

  def _interrupt(self, stop: interrupts.Stop) -> None:
    for member in self._live():
      self._end(member, summary.Ending(
          member.step, "interrupted",
          f"stopped after step {member.step} of {self._total}", stop.signal))
