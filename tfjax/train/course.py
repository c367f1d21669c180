# SPDX-License-Identifier: Apache-2.0
"""One run while it goes on: state, rows, evaluations, checkpoints, result.

With several processes each goes through all of it; what the main one alone
sees or writes, it shares. Whose the run's directory is, and what becomes of an
error, is `tfjax.train.loop`'s.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
from typing import Any, Callable, Iterable, Iterator, Mapping

from flax import linen as nn
import jax
import numpy as np

from tfjax import config as config_lib
from tfjax.models import attention_choice
from tfjax.objectives import loss as loss_lib
from tfjax.train import checkpoints as checkpoints_lib
from tfjax.train import claim
from tfjax.train import clock as clock_lib
from tfjax.train import cluster
from tfjax.train import evaluation
from tfjax.train import interrupts
from tfjax.train import parts as parts_lib
from tfjax.train import records
from tfjax.train import recovery as recovery_lib
from tfjax.train import rows as rows_lib
from tfjax.train import sharding
from tfjax.train import spent as spent_lib
from tfjax.train import step as step_lib
from tfjax.train import summary
from tfjax.train import trunk
from tfjax.train import watchdog

_LOG = logging.getLogger("tfjax")

OnRow = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Orders:
  """What a sweep asks of a run beside its config; see `run`."""

  keep_steps: tuple[int, ...] = ()
  branch: Mapping[str, Any] | None = None
  until_step: int | None = None


class Run:
  """One run while it goes on; `train` takes it to its end.

  Attributes:
    state: of the train step; whoever steps for it keeps it up to date.
    others: fields of the record that are known to the caller alone.
  """

  def __init__(self, config: config_lib.ExperimentConfig,
               run_dir: pathlib.Path, sweep: str | None, started_at: str,
               on_row: OnRow | None, spent: spent_lib.Spent, *,
               orders: Orders = Orders(), parts: parts_lib.Parts | None = None):
    self.run_dir, self.sweep, self.started_at = run_dir, sweep, started_at
    self.on_row, self.spent, self.clock = on_row, spent, spent.clock
    self.orders = orders
    self.parts = parts or parts_lib.make(config)
    self.config, self.budget = self.parts.config, self.parts.budget
    self.rows: rows_lib.Rows | None = None  # at the main process
    self.origin: dict[str, Any] = {}  # of a branch, as the record has it
    self.others: dict[str, Any] = {}

  def train(self, stop: interrupts.Stop) -> records.RunRecord:
    """Steps to the end, or to a stop, or to what cannot be recovered from."""
    with self.opened():
      self.start()
      ending, saved = self._loop(stop), self.settle()
    return self.end(ending, saved)

  @contextlib.contextmanager
  def opened(self) -> Iterator[None]:
    """Watchdog, checkpoints and rows are open within."""
    self.dog = watchdog.Watchdog(
        self.run_dir, self.config.runtime.stall_seconds)
    directory = self.run_dir / "checkpoints"
    # What is in its way is told now: a save that fails does not end a run.
    claim.shared(lambda: directory.mkdir(exist_ok=True))
    self.checkpoints = checkpoints_lib.Checkpoints(
        directory, self.config.checkpoint, self.orders.keep_steps)
    with self.dog, contextlib.closing(self.checkpoints):
      try:
        yield
      finally:
        if self.rows is not None:
          self.rows.close()

  def settle(self) -> int | None:
    """Waits for the last save; the step of the newest checkpoint."""
    self.clock.enter("checkpoint")
    return self.checkpoints.latest_step()

  def end(self, ending: summary.Ending,
          saved: int | None) -> records.RunRecord:
    """Writes the result; `saved` as `settle` told."""
    self.clock.enter("other")
    if ending.status == "interrupted" and saved != ending.steps:
      ending = dataclasses.replace(ending, reason=(
          f"{ending.reason}, but that step could not be saved: the run will "
          f"go on from step {saved or 0}"))
    elif ending.status == "complete" and saved != ending.steps:
      ending = dataclasses.replace(ending, reason=(
          "the last parameters could not be saved; to have them, make room, "
          f"delete result.json and start again: from step {saved or 0}"))
    self.spent.note(ending.steps)
    result = claim.shared(lambda: self._finish(ending, saved))
    return records.RunRecord(**result)

  # --- Begin -----------------------------------------------------------------

  def start(self) -> None:
    """The newest checkpoint's state and counters, or those of a begin."""
    restored = self.checkpoints.restore(self.parts.steps.abstract_state)
    counters: dict[str, Any] | None = None
    if restored is None:
      self.state, told = self._first_state()
      before = dict(resumes=-1, failed_saves=0)
    else:
      self.state, counters = restored
      self._check(counters)
      told, before, self.origin = counters, counters, counters["origin"]
    step = int(self.state.step)
    self.spent.start(counters, step)
    self.recovery = recovery_lib.Recovery(self.config.recovery, told)
    self.resumes = before["resumes"] + 1
    self.failed_saves_before = before["failed_saves"]
    if self.resumes:
      _LOG.info("%s: resuming after step %d", self.run_dir.name, step)
    branched = bool(self.origin) and restored is None
    self.rows_lost = claim.shared(lambda: self._open_rows(step, branched))

  def _first_state(
      self) -> tuple[step_lib.TrainState, dict[str, Any] | None]:
    """The state before the first step, and the trunk's counters where it is
    one of those."""
    branch = self.orders.branch
    found = branch and trunk.restore(self.run_dir, branch, self.parts)
    if found:
      self.origin = trunk.origin(branch, found[1])
      _LOG.info("%s: branching off %s after step %d", self.run_dir.name,
                branch["run_id"], branch["step"])
      return found
    if self.origin:  # rows of the trunk are on file
      raise records.RecordError(
          f"{self.run_dir}: there is no checkpoint to go back to, its trunk's "
          "is gone; started again, the run trains alone")
    return self._new_state(), None

  def _new_state(self) -> step_lib.TrainState:
    steps = self.parts.steps
    state = steps.init(jax.random.key(self.config.seed),
                       self.parts.hyperparameters)
    if self.config.init_from:
      source = pathlib.Path(self.config.init_from)
      claim.refuse_other_parametrization(source, self.config.model)
      state = state.replace(params=checkpoints_lib.weights(
          source, steps.abstract_state.params))
    return state

  def _check(self, counters: dict[str, Any]) -> None:
    """Raises a RecordError unless a checkpoint is of this run."""
    if not {"config", "origin", *spent_lib.NOTHING} <= counters.keys():
      raise records.RecordError(
          f"{self.run_dir}: its checkpoint was saved by an older version of "
          "this code and cannot be gone on from; delete the directory, or "
          "choose another run_id or workdir")
    claim.refuse_other_config(
        self.run_dir, counters["config"], self.parts.given)
    claim.refuse_other_store(self.run_dir, "saved its checkpoint",
                             counters["store"], self.parts.store.path.name)

  def _open_rows(self, step: int, branched: bool) -> bool:
    """At the main process; tells whether rows up to `step` have been lost.

    `branched`: the run begins there, with the trunk's rows.
    """
    kept = self.recovery.rollbacks
    self.rows = rows_lib.Rows(
        self.config, self.run_dir, self.sweep, self.on_row,
        *((-1, []) if branched else (step, kept)), self.parts.budget)
    if branched:
      for row in trunk.rows(self.run_dir, self.orders.branch, kept):
        self.rows.write(row)
    found = {(row["kind"], row["step"]) for row in records.read_metrics(
        self.run_dir / "metrics.jsonl")}
    end = step == self.budget.steps and ("evaluation", step) not in found
    if lost := end or bool(step and ("train", 1) not in found):
      _LOG.warning("%s: rows of metrics.jsonl up to step %d have been lost",
                   self.run_dir.name, step)
    return lost

  def _compile(self) -> jax.stages.Compiled:
    batch, mesh = self._batch(0), self.parts.mesh
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.rules()):
      self.attention, why = attention_choice.explain(
          self.config.model, mesh.devices.flat[0].platform,
          self.config.train.dtype, batch.inputs)
    _LOG.info("attention: %s (%s)", self.attention, why)
    compiled = self.parts.steps.compiled_train(batch)
    cluster.barrier()  # a collective would not wait for the slowest compiler
    return compiled

  # --- Steps -----------------------------------------------------------------

  def _loop(self, stop: interrupts.Stop) -> summary.Ending:
    total, step = self.budget.steps, int(self.state.step)
    self.dog.at("compile", step)
    self.clock.enter("compile")
    train_step = self._compile()
    agreement = cluster.Agreement(self.parts.mesh)
    self.spent.note(step)
    self.save_timer = clock_lib.SaveTimer(self.config.checkpoint)
    pending = None
    if step == total and self.rows_lost:
      self._evaluate(step)  # the result has its loss from there
    while step < (self.orders.until_step or total) and step < total:
      self.dog.at("data", step + 1)
      self.clock.enter("input")
      batch = self._batch(step + self.recovery.offset)
      # Nobody has waited for data while the devices had a step to work on.
      busy = pending is not None and not pending[1]["loss"].is_ready()
      self.dog.at("step", step + 1)
      self.clock.enter("step", was="step" if busy else None)
      self.state, metrics = train_step(self.state, batch)
      step += 1
      stopping, saving = agreement.exchange(*self._wishes(stop))
      evaluating, due = self.due(step)
      saving |= due or stopping
      # Read one step late: the device always has a step to work on.
      ready, pending = [pending] if pending else [], (step, metrics)
      if evaluating or saving:
        ready, pending = [*ready, pending], None
      bad = self.read(ready)
      if evaluating and not bad:
        bad = self._evaluate(step)
      if bad and bad.diverged:
        return summary.Ending(bad.step, "diverged", bad.reason)
      if bad:
        step, pending = self._roll_back(bad), None
        continue
      if saving:
        self.save(step, self.state)
        self.save_timer.reset()
      if stopping and step < total:
        return summary.Ending(
            step, "interrupted", f"stopped after step {step} of {total}",
            stop.signal)
    if step < total:
      return summary.Ending(
          step, "interrupted", f"paused at step {step} of {total}")
    return summary.Ending(step, "complete")

  def due(self, step: int) -> tuple[bool, bool]:
    """Whether to evaluate after this step, and whether to save."""
    every = self.config.checkpoint
    last = step == self.budget.steps
    return (
        last or _every(self.config.evaluation.every_steps, step),
        last or _every(every.every_steps, step) or
        _every(every.keep_every_steps, step) or
        step in (*self.orders.keep_steps, self.orders.until_step))

  def _batch(self, index: int) -> loss_lib.Batch:
    return step_lib.put(self.parts.mesh, self.parts.batches[index])

  def _wishes(self, stop: interrupts.Stop) -> tuple[bool, bool]:
    """Whether this process wants to stop, and to save; by the main's clock."""
    if self.rows is None:
      return stop.is_set(), False
    return (stop.is_set() or self.rows.failure is not None,
            self.save_timer.due())

  def read(self, ready: Iterable[tuple[int, dict[str, Any]]]
           ) -> recovery_lib.Bad | None:
    """Takes note of steps, up to one that cannot be gone on from."""
    for step, metrics in ready:
      row = self._row(step, metrics)
      if row.get("bad") and (bad := self.recovery.judge_step(row)):
        return bad
    return None

  def _row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a step, on the host; written when due or bad."""
    # Not jax.device_get, nor float alone: slower by several times, on CPUs.
    loss, rate, norm, bad = (np.asarray(metrics[name]).item() for name in (
        "loss", "learning_rate", "grad_norm", "bad"))
    self.clock.add(self.budget.batch_tokens)
    row = dict(kind="train", step=step, **self._position(step), loss=loss,
               learning_rate=rate, grad_norm=norm)
    if bad:
      row["bad"] = True
    if (step % self.config.train.log_every_steps == 0 or step == 1 or
        step == self.budget.steps or bad):
      rate, own_rate = self.clock.rates_since_last()
      row.update(seconds=self.clock.seconds(), tokens_per_second=rate,
                 mfu=self.spent.mfu(own_rate, self.budget.flops_per_token),
                 **self._costs())
      self._write(row)
    return row

  def _write(self, row: dict[str, Any]) -> None:
    if self.rows is not None:
      self.rows.write(row)

  def _costs(self) -> dict[str, float | None]:
    """Of a row: by this run; of a branch, by its trunk before it too."""
    columns = self.spent.columns()
    if self.origin:
      columns["shared_device_seconds"] = self.origin["shared_device_seconds"]
    return columns

  def _position(self, step: int) -> dict[str, float]:
    tokens = step * self.budget.batch_tokens
    return dict(tokens=tokens, flops=tokens * self.budget.flops_per_token)

  def _evaluate(self, step: int) -> recovery_lib.Bad | None:
    self.dog.at("evaluation", step)
    self.clock.enter("evaluation")
    return self.evaluated(step, evaluation.evaluate(
        self.parts.steps, self.state.params, self.parts.evaluation_batches,
        self.parts.num_bytes))

  def evaluated(self, step: int, result: evaluation.Evaluation,
                ) -> recovery_lib.Bad | None:
    """Writes the row; a held-out loss that is not finite is bad."""
    self._write(dict(kind="evaluation", step=step, **self._position(step),
                     loss=result.loss, loss_stderr=result.loss_stderr,
                     bits_per_byte=result.bits_per_byte,
                     **self._costs()))
    if math.isfinite(result.loss):
      return None
    return self.recovery.judge_parameters(
        step, f"the held-out loss after step {step} is {result.loss}")

  def save(self, step: int, state: step_lib.TrainState) -> None:
    """Starts to save the state of a step whose loss has been seen."""
    self.dog.at("checkpoint", step)
    self.clock.enter("checkpoint")
    self.spent.gather()
    # Rows first: a resume from this checkpoint expects them on file.
    claim.shared(lambda: self.rows.sync())  # pylint: disable=unnecessary-lambda
    self.checkpoints.save(step, state, dict(
        **self._position(step), **self.spent.counters(),
        **self.recovery.counters(), resumes=self.resumes,
        failed_saves=self._failed_saves(), origin=self.origin,
        config=config_lib.to_dict(self.parts.given),
        store=self.parts.store.path.name))

  def _failed_saves(self) -> int:
    return self.failed_saves_before + self.checkpoints.failed_saves

  def _roll_back(self, bad: recovery_lib.Bad) -> int:
    """Back to the newest checkpoint, or the start; returns its step."""
    self.dog.at("rollback", bad.step)
    self.clock.enter("checkpoint")
    self.state = None  # its memory is needed
    restored = self.checkpoints.restore(
        self.parts.steps.abstract_state, self.recovery.suspect(bad))
    self.state, counters = restored or (self._first_state()[0], None)
    self.clock.undo(counters)
    step = int(self.state.step)
    kept = list(self.recovery.rollbacks)
    row = self.recovery.roll_back(bad, step)
    _LOG.warning("%s: %s; back to step %d, and on with the batches after it",
                 self.run_dir.name, bad.reason, step)
    if self.rows is not None:
      self.rows.cut(step, kept)
    self._write(row)
    self.spent.note(step)  # the rows that told of it have just been cut
    return step

  # --- End -------------------------------------------------------------------

  def _finish(self, ending: summary.Ending,
              saved: int | None) -> dict[str, Any]:
    """Writes the result, and returns it as it was written.

    `saved`: the step of the newest checkpoint.
    """
    record = summary.record(
        self.parts, ending,
        records.read_metrics(self.run_dir / "metrics.jsonl"), self.spent,
        self.recovery, run_id=self.run_dir.name, sweep=self.sweep,
        attention=self.attention, resumes=self.resumes,
        failed_saves=self._failed_saves(), started_at=self.started_at,
        **self.origin, **self.others,
        config_hash=config_lib.config_hash(self.parts.given))
    result = records.finite(dataclasses.asdict(record))
    records.write_result(self.run_dir, result)
    if saved is not None:
      summary.write_card(self.run_dir, result, saved)
    self.rows.finish()
    return result


def _every(steps: int | None, step: int) -> bool:
  return steps is not None and step % steps == 0
