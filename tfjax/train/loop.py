# SPDX-License-Identifier: Apache-2.0
"""One run from config to record: the order of operations.

    claim the directory -> data, budget, mesh -> state (new or restored)
    -> steps, with rows, evaluations and checkpoints -> evaluation -> result

Everything here is about one run; many are `tfjax.sweep`.
"""

import contextlib
import dataclasses
import fcntl
import logging
import math
import pathlib
import signal
import threading
import time
import traceback
from typing import Any, Callable, Iterator

import jax
from jaxtyping import Int
import numpy as np

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.cost import budget as budget_lib
from tfjax.cost import flops as flops_lib
from tfjax.cost import hardware
from tfjax.data import batches as batches_lib
from tfjax.data import store as store_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.models import attention
from tfjax.objectives import loss as loss_lib
from tfjax.train import checkpoints as checkpoints_lib
from tfjax.train import evaluation
from tfjax.train import optimizers
from tfjax.train import records
from tfjax.train import sharding
from tfjax.train import step as step_lib
from tfjax.train import tracking

_LOG = logging.getLogger("tfjax")


class RunDirectoryBusyError(RuntimeError):
  """Another process is training in this run directory."""


def run(
    config: config_lib.ExperimentConfig,
    workdir: str | pathlib.Path,
    *,
    sweep: str | None = None,
    run_id: str | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> records.RunRecord:
  """Trains `config` in workdir/RUN_ID and returns its record.

  A run that has finished before is not run again; one that was interrupted
  goes on from its checkpoint and ends with the same parameters and rows. A
  loss that is not finite ends the run as `diverged`; SIGTERM or SIGINT save a
  checkpoint and end it as `interrupted`. `on_row` sees each metrics row.

  Raises:
    ConfigError: before any compute.
    RunDirectoryBusyError: another process has the directory.
    RecordError: the directory holds another run, or a damaged record.
    Exception: whatever training raised, after it was recorded as `failed`.
  """
  run_id = run_id or records.run_id(config)
  run_dir = pathlib.Path(workdir) / run_id
  if finished := _finished_record(run_dir, config):
    return finished
  with _claim(run_dir):
    # Whoever had the directory until now may have finished the run.
    if finished := _finished_record(run_dir, config):
      return finished
    records.write_json(run_dir / "config.json", config_lib.to_dict(config))
    (run_dir / "result.json").unlink(missing_ok=True)
    started_at = records.now()
    try:
      this = _Run(config, run_dir, sweep, started_at, on_row)
      # Only now: until there is something to save, a signal ends it at once.
      with _stop_requested() as stop:
        result = this.train(stop)
    except config_lib.ConfigError:
      raise
    except Exception as error:
      reason = "".join(traceback.format_exception_only(error)).strip()
      record = records.RunRecord(
          run_id=run_id, status="failed", status_reason=reason, sweep=sweep,
          config_hash=config_lib.config_hash(config), started_at=started_at,
          finished_at=records.now(), **records.provenance())
      records.write_result(run_dir, dataclasses.asdict(record))
      raise
    records.write_result(run_dir, dataclasses.asdict(result))
    return result


class _Run:
  """The parts of one run, made in order; `train` uses them."""

  def __init__(self, config: config_lib.ExperimentConfig,
               run_dir: pathlib.Path, sweep: str | None, started_at: str,
               on_row: Callable[[dict[str, Any]], None] | None):
    self.run_dir, self.sweep, self.started_at = run_dir, sweep, started_at
    self.on_row = on_row
    self.config_hash = config_lib.config_hash(config)
    _use_compilation_cache(config.runtime)
    self.store = store_lib.build(config.data)
    self.vocabulary = vocabulary_lib.of(config, self.store.tokenizer())
    self.config = config = budget_lib.with_vocabulary(
        config, self.vocabulary.size)
    windows = batches_lib.open_windows(
        self.store, "train", config.model.context_length,
        config.objective.source_length)
    _warn_of_cut_pairs(windows)
    self.budget = budget_lib.plan(config, windows)
    train, length = config.train, config.model.context_length
    evaluation_size = config.evaluation.batch_size or train.batch_size
    self.mesh = sharding.make_mesh(config)
    self.schedule = optimizers.make_schedule(
        config.optimizer, self.budget.steps)
    self.steps = step_lib.steps_for(config, self.mesh)
    self.objective = objectives.create(config, self.vocabulary)
    self.batches = objectives.TrainingBatches(
        self.objective, batches_lib.training_batches(
            self.store, config.data, context_length=length,
            batch_size=train.batch_size,
            rows=sharding.host_rows(self.mesh, train.batch_size),
            source_length=config.objective.source_length),
        config.objective.seed)
    self.evaluation_batches = objectives.EvaluationBatches(
        self.objective, batches_lib.evaluation_batches(
            self.store, context_length=length, batch_size=evaluation_size,
            tokens=config.evaluation.tokens,
            rows=sharding.host_rows(self.mesh, evaluation_size),
            source_length=config.objective.source_length),
        config.objective.seed)
    self.clock = _Clock()
    self.compile_seconds = 0.0
    self.resumes = 0

  def train(self, stop: threading.Event) -> records.RunRecord:
    """Steps to the end, or to a stop, or to a loss that is not finite."""
    checkpoints = checkpoints_lib.Checkpoints(
        self.run_dir / "checkpoints", self.config.checkpoint)
    with contextlib.closing(checkpoints):
      state = self._start_state(checkpoints)
      self.metrics = records.MetricsFile(
          self.run_dir / "metrics.jsonl", int(state.step))
      self.mirror = tracking.Mirror(self.config, self.run_dir, self.sweep)
      with contextlib.closing(self.metrics):
        done, status, reason = self._loop(state, checkpoints, stop)
    record = self._record(done, status, reason)
    self.mirror.finish(dataclasses.asdict(record))
    return record

  def _start_state(self, checkpoints) -> step_lib.TrainState:
    """A new state, or the newest checkpoint's."""
    if checkpoints.latest_step() is None:
      return self.steps.init(jax.random.key(self.config.seed), self.schedule)
    state, counters = checkpoints.restore(self.steps.abstract_state)
    if counters["config_hash"] != self.config_hash:
      raise records.RecordError(
          f"{self.run_dir} holds an unfinished run of another config "
          f"({counters['config_hash']}, not {self.config_hash}); choose "
          "another run_id or workdir, or delete the run directory")
    if counters["store"] != self.store.path.name:
      raise records.RecordError(
          f"{self.run_dir}: the corpus has changed since this run's checkpoint "
          f"(token store {self.store.path.name}, then {counters['store']}); "
          "delete the run directory to train on the new one")
    self.clock = _Clock(counters["seconds"], counters["tokens"])
    self.compile_seconds = counters["compile_seconds"]
    self.resumes = counters["resumes"] + 1
    _LOG.info("%s: resuming after step %d", self.run_dir.name,
              int(state.step))
    return state

  def _loop(self, state, checkpoints, stop) -> tuple[int, str, str | None]:
    """Returns the steps done, the status and its reason."""
    config, total = self.config, self.budget.steps
    step = int(state.step)
    train_step = self._compile()
    save_timer = _SaveTimer(config.checkpoint)
    evaluate_every = config.evaluation.every_steps or total
    pending = None
    while step < total:
      with self.clock:
        state, metrics = train_step(state, self._batch(step))
        step += 1
        # Read one step late: the device always has a step to work on.
        ready, pending = [pending] if pending else [], (step, metrics)
        stopping = stop.is_set() or step == total
        evaluating = step % evaluate_every == 0 or step == total
        saving = save_timer.due(step) or stopping
        if evaluating or saving:
          ready, pending = [*ready, pending], None
        rows = [self._row(*item) for item in ready]
      for row in rows:
        if not math.isfinite(row["loss"]):
          return row["step"], "diverged", (
              f"the loss of step {row['step']} is {row['loss']}")
      if evaluating:
        loss = self._evaluate(state, step)
        if not math.isfinite(loss):
          return step, "diverged", (
              f"the held-out loss after step {step} is {loss}")
      if saving:
        self._save(checkpoints, step, state)
      if stopping and step < total:
        return step, "interrupted", f"stopped after step {step} of {total}"
    return step, "complete", None

  def _batch(self, step: int) -> loss_lib.Batch:
    return step_lib.put(self.mesh, self.batches[step])

  def _compile(self):
    begin = time.perf_counter()
    compiled = self.steps.compiled_train(self._batch(0))
    self.compile_seconds += time.perf_counter() - begin
    return compiled

  def _row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a step, on the host; written when due or not finite."""
    loss, rate, norm = (float(metrics[name]) for name in
                        ("loss", "learning_rate", "grad_norm"))
    self.clock.add(self.budget.batch_tokens)
    row = dict(kind="train", step=step, **self._position(step), loss=loss,
               learning_rate=rate, grad_norm=norm)
    if (step % self.config.train.log_every_steps == 0 or step == 1 or
        step == self.budget.steps or not math.isfinite(loss)):
      row.update(seconds=self.clock.seconds(),
                 tokens_per_second=self.clock.rate_since_last())
      self._write(row)
    return row

  def _write(self, row: dict[str, Any]) -> None:
    self.metrics.write(row)
    self.mirror.log(row)
    if self.on_row is not None:
      self.on_row(row)

  def _position(self, step: int) -> dict[str, float]:
    tokens = step * self.budget.batch_tokens
    return dict(tokens=tokens, flops=tokens * self.budget.flops_per_token)

  def _save(self, checkpoints, step: int, state) -> None:
    # Rows first: a resume from this checkpoint expects them on file.
    self.metrics.sync()
    checkpoints.save(step, state, dict(
        seconds=self.clock.seconds(), tokens=self.clock.tokens,
        compile_seconds=self.compile_seconds, resumes=self.resumes,
        store=self.store.path.name, config_hash=self.config_hash))

  def _evaluate(self, state, step: int) -> float:
    """Writes the row and returns the held-out loss."""
    result = evaluation.evaluate(
        self.steps, state.params, self.evaluation_batches, self._bytes)
    row = dict(kind="evaluation", step=step, **self._position(step),
               loss=result.loss, loss_stderr=result.loss_stderr,
               bits_per_byte=result.bits_per_byte)
    self._write(row)
    return result.loss

  def _bytes(self, targets: Int[np.ndarray, "P"]) -> float:
    """Bytes of text that targets stand for."""
    table = self.vocabulary.token_bytes
    if table is not None:
      return float(table[targets].sum())
    # The tokenizer does not tell: the split's mean, of all that is text, which
    # an unknown token is too.
    separators = np.isin(targets, [self.vocabulary.separator,
                                   *self.vocabulary.sentinels]).sum()
    return float((targets.size - separators) *
                 self.store.validation_bytes_per_text_token)

  def _record(self, steps: int, status: str,
              reason: str | None) -> records.RunRecord:
    config, budget, store = self.config, self.budget, self.store
    rows = records.read_metrics(self.run_dir / "metrics.jsonl")
    trained = next((r for r in reversed(rows) if r["kind"] == "train"), {})
    # Only an evaluation of the final parameters is the run's result.
    evaluated = next((r for r in rows if r["kind"] == "evaluation" and
                      r["step"] == budget.steps), {})
    devices, device = self.mesh.devices.size, self.mesh.devices.flat[0]
    tokens = steps * budget.batch_tokens
    flops = budget.flops * (steps / budget.steps)
    rate = self.clock.rate()
    peak = hardware.peak_flops(device.device_kind, config.train.dtype)
    return records.RunRecord(
        run_id=self.run_dir.name, status=status, status_reason=reason,
        sweep=self.sweep, family=config.model.family,
        objective=config.objective.name, seed=config.seed,
        params_total=budget.params_total,
        params_embedding=budget.params_embedding,
        params_non_embedding=budget.params_non_embedding,
        params_head=budget.params_head, params_active=budget.params_total,
        tokens_seen=tokens, tokens_planned=budget.tokens,
        tokens_predicted=(None if budget.predicted_tokens is None else
                          budget.predicted_tokens * steps / budget.steps),
        unique_tokens=min(budget.unique_tokens, tokens),
        epochs=budget.epochs * steps / budget.steps, steps=steps,
        batch_tokens=budget.batch_tokens, flops_total=flops.total,
        flops_matmul=flops.matmul, flops_attention=flops.attention,
        flops_head=flops.head, flops_recompute=flops.recompute,
        flops_encoder=flops.encoder, flops_decoder=flops.decoder,
        flops_convention=flops_lib.CONVENTION,
        loss=evaluated.get("loss"),
        loss_stderr=evaluated.get("loss_stderr"),
        bits_per_byte=evaluated.get("bits_per_byte"),
        train_loss=trained.get("loss"),
        loss_counts=self.objective.counts, corpus=config.data.corpus,
        tokenizer=config.data.tokenizer.kind,
        vocab_size=config.model.vocab_size,
        bytes_per_token=store.bytes_per_token,
        # Of the next token given those before: of no other objective.
        entropy_rate=(store.entropy_rate
                      if self.objective.counts == "every token" else None),
        token_store=store.path.name,
        attention=attention.choose(config.model.attention, device.platform),
        device_kind=device.device_kind, device_count=devices,
        device_seconds=self.clock.seconds() * devices,
        compile_seconds=self.compile_seconds, tokens_per_second=rate,
        mfu=(rate * budget.flops_per_token / (peak * devices)
             if rate and peak else None),
        energy_source="not measured", co2e_source="not measured",
        resumes=self.resumes, config_hash=self.config_hash,
        started_at=self.started_at, finished_at=records.now(),
        **records.provenance())


# --- Details -----------------------------------------------------------------


class _Clock:
  """Seconds and tokens of training; runs inside `with`, stands outside."""

  def __init__(self, seconds: float = 0.0, tokens: int = 0):
    self.tokens = tokens
    self._seconds = seconds
    self._begin: float | None = None
    self._last = (seconds, tokens)

  def __enter__(self) -> None:
    self._begin = time.perf_counter()

  def __exit__(self, *_) -> None:
    self._seconds, self._begin = self.seconds(), None

  def seconds(self) -> float:
    running = 0.0
    if self._begin is not None:
      running = time.perf_counter() - self._begin
    return self._seconds + running

  def add(self, tokens: int) -> None:
    self.tokens += tokens

  def rate(self) -> float | None:
    """Tokens a second over all of training."""
    return self.tokens / self._seconds if self._seconds > 0 else None

  def rate_since_last(self) -> float | None:
    """Tokens a second since this was last asked."""
    (seconds, tokens), self._last = self._last, (self.seconds(), self.tokens)
    elapsed = self._last[0] - seconds
    return (self.tokens - tokens) / elapsed if elapsed > 0 else None


def _warn_of_cut_pairs(windows: batches_lib.TextWindows |
                       batches_lib.PairWindows) -> None:
  for side in ("source", "target"):
    if count := getattr(windows, f"cut_{side}s", 0):
      key = ("model.context_length" if side == "target"
             else "objective.source_length")
      _LOG.warning(
          "%s of %s training pairs have a %s longer than %s; what is over is "
          "cut off", f"{count:,}", f"{len(windows):,}", side, key)


class _SaveTimer:
  """Tells when a checkpoint is due, by steps or by seconds."""

  def __init__(self, config: config_lib.CheckpointConfig):
    self._config = config
    self._last = time.monotonic()

  def due(self, step: int) -> bool:
    steps, seconds = self._config.every_steps, self._config.every_seconds
    due = bool(steps and step % steps == 0 or
               seconds and time.monotonic() - self._last >= seconds)
    if due:
      self._last = time.monotonic()
    return due


def _finished_record(
    run_dir: pathlib.Path, config: config_lib.ExperimentConfig,
) -> records.RunRecord | None:
  """The record of a finished run of this config, if it is there."""
  result = records.read_result(run_dir)
  if result is None or result["status"] not in records.FINISHED:
    return None
  if result["config_hash"] != config_lib.config_hash(config):
    raise records.RecordError(
        f"{run_dir} holds a finished run of another config "
        f"({result['config_hash']}, not {config_lib.config_hash(config)}); "
        "choose another run_id or workdir")
  return records.RunRecord(**result)


@contextlib.contextmanager
def _claim(run_dir: pathlib.Path) -> Iterator[None]:
  """Holds the run directory; the system lets go when the process dies."""
  run_dir.mkdir(parents=True, exist_ok=True)
  with open(run_dir / records.LOCK, "w", encoding="utf-8") as file:
    # Several tries: whoever looks whether a run is going on holds the lock
    # for a moment.
    for attempt in range(5):
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if attempt == 4:
          raise RunDirectoryBusyError(
              f"another process is training in {run_dir}; wait for it, or "
              "stop it") from None
        time.sleep(0.1)
    yield


@contextlib.contextmanager
def _stop_requested() -> Iterator[threading.Event]:
  """An event that SIGTERM and SIGINT set while training runs."""
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop  # only the main thread may have handlers
    return
  def handle(number, _):
    _LOG.warning("%s: stopping after this step; once more stops at once",
                 signal.Signals(number).name)
    stop.set()
    signal.signal(number, before[number])
  before = {number: signal.signal(number, handle)
            for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _use_compilation_cache(runtime: config_lib.RuntimeConfig) -> None:
  """Compiled programs are kept on disk over processes."""
  directory = runtime.compilation_cache_dir
  if directory:
    directory = str(pathlib.Path(directory).expanduser())
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
