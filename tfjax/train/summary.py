# SPDX-License-Identifier: Apache-2.0
"""The record of a run that has ended or failed, from its parts, counts and
rows; and its model card."""

import dataclasses
import logging
import pathlib
import traceback
from typing import Any, Sequence

import jax

from tfjax import config as config_lib
from tfjax.cost import card
from tfjax.cost import flops as flops_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.train import compilation
from tfjax.train import out_of_memory
from tfjax.train import parts as parts_lib
from tfjax.train import records
from tfjax.train import recovery as recovery_lib
from tfjax.train import spent as spent_lib

_LOG = logging.getLogger("tfjax")

CARD = "MODEL_CARD.md"


@dataclasses.dataclass(frozen=True)
class Ending:
  """How training ended: steps done, status, its reason if it is not done."""

  steps: int
  status: str
  reason: str | None = None
  stopped_by: str | None = None


def record(
    parts: parts_lib.Parts, ending: Ending, rows: Sequence[dict[str, Any]],
    spent: spent_lib.Spent, recovery: recovery_lib.Recovery,
    **others: Any) -> records.RunRecord:
  """Everything that is known of a run.

  Args:
    rows: of metrics.jsonl.
    others: fields of the record that are not derived from the rest.
  """
  config, steps = parts.config, ending.steps
  share = steps / parts.budget.steps
  trained = next((r for r in reversed(rows) if r["kind"] == "train"), {})
  # Only an evaluation of the final parameters is the run's result.
  evaluated = next((r for r in rows if r["kind"] == "evaluation" and
                    r["step"] == parts.budget.steps), {})
  return records.RunRecord(
      status=ending.status, status_reason=ending.reason,
      stopped_by=ending.stopped_by, family=config.model.family,
      objective=config.objective.name, seed=config.seed, steps=steps,
      init_from=config.init_from or None, dtype=config.train.dtype,
      loss=evaluated.get("loss"), loss_stderr=evaluated.get("loss_stderr"),
      bits_per_byte=evaluated.get("bits_per_byte"),
      train_loss=trained.get("loss"),
      loss_counts=parts.objective.counts,
      bad_steps=recovery.bad_steps, rollbacks=len(recovery.rollbacks),
      tokens_undone=recovery.undone_steps * parts.budget.batch_tokens,
      finished_at=records.now(), **_amounts(parts, steps, share),
      **_flops(parts, share), **_data(parts), **_machine(parts, spent),
      **_compiled(parts, spent), **others, **records.provenance(),
      **spent.amounts())  # last, as they count until now


def record_failure(
    config: config_lib.ExperimentConfig, run_dir: pathlib.Path,
    sweep: str | None, started_at: str, error: Exception,
    spent: spent_lib.Spent, ensemble_members: int | None = None) -> None:
  """Writes the result of a run that has failed: why, and what it has spent."""
  reason = "".join(traceback.format_exception_only(error)).strip()
  if out_of_memory.is_it(error):
    told = out_of_memory.explain(error, config, members=ensemble_members)
    reason = f"out of memory: {told}\n{reason}"
  try:
    taken = spent.fail()
  except records.RecordError as damaged:
    _LOG.warning("what the run has spent is not on record: %s", damaged)
    taken = {}
  result = records.RunRecord(
      run_id=run_dir.name, status="failed", status_reason=reason, sweep=sweep,
      config_hash=config_lib.config_hash(config), started_at=started_at,
      finished_at=records.now(), ensemble_members=ensemble_members, **taken,
      **records.provenance())
  try:
    records.write_result(run_dir, dataclasses.asdict(result))
  except records.WriteError as second:
    _LOG.error("the failure itself is not on record: %s", second)


def write_card(run_dir: pathlib.Path, result: dict[str, Any],
               step: int) -> None:
  """Writes MODEL_CARD.md, of the checkpoint after `step`; where that fails it
  says so, and raises nothing."""
  try:
    records.write_text(run_dir / CARD, card.model_card(
        result | dict(checkpoint_step=step)))
  except Exception as error:  # pylint: disable=broad-exception-caught
    # The run is done: no text about it may make it a failed one.
    _LOG.warning("%s: no %s (%r)", run_dir.name, CARD, error)


def _amounts(parts: parts_lib.Parts, steps: int,
             share: float) -> dict[str, Any]:
  """Parameters, tokens and FLOPs of `share` of the budget."""
  budget, tokens = parts.budget, steps * parts.budget.batch_tokens
  flops = budget.flops * share
  return dict(
      params_total=budget.params_total,
      params_embedding=budget.params_embedding,
      params_non_embedding=budget.params_non_embedding,
      params_head=budget.params_head, params_active=budget.params_total,
      tokens_seen=tokens, tokens_planned=budget.tokens,
      tokens_predicted=(None if budget.predicted_tokens is None
                        else budget.predicted_tokens * share),
      unique_tokens=min(budget.unique_tokens, tokens),
      epochs=budget.epochs * share, batch_tokens=budget.batch_tokens,
      flops_total=flops.total, flops_matmul=flops.matmul,
      flops_attention=flops.attention, flops_head=flops.head,
      flops_recompute=flops.recompute, flops_encoder=flops.encoder,
      flops_decoder=flops.decoder, flops_convention=flops_lib.CONVENTION)


def _flops(parts: parts_lib.Parts, share: float) -> dict[str, Any]:
  """FLOPs of `share` of the budget by component, and as others count them."""
  model, lengths = parts.config.model, lengths_lib.of(parts.config)
  # Of pairs a budget's tokens are fewer than what is computed on.
  scale = share * parts.budget.flops_total / (
      flops_lib.training_flops_per_token(model, lengths).total)
  return dict(
      flops_by_component={part.name: scale * part.total for part in
                          flops_lib.components(model, lengths)},
      flops_by_convention={name: scale * flops for name, flops in
                           flops_lib.by_convention(model, lengths).items()})


def _data(parts: parts_lib.Parts) -> dict[str, Any]:
  store, config = parts.store, parts.config
  return dict(
      corpus=config.data.corpus, tokenizer=config.data.tokenizer.kind,
      vocab_size=config.model.vocab_size,
      bytes_per_token=store.bytes_per_token,
      # Of the next token given those before: of no other objective.
      entropy_rate=(store.entropy_rate
                    if parts.objective.counts == "every token" else None),
      token_store=store.path.name)


def _compiled(parts: parts_lib.Parts,
              spent: spent_lib.Spent) -> dict[str, Any]:
  counts = compilation.since(parts.compiled_before)
  _LOG.info("compiling: %.2f s in all; programs of this part: %d from the "
            "cache, %d compiled", spent.clock.phase_seconds()["compile"],
            counts.hits, counts.misses)
  return dict(compile_cache_hits=counts.hits,
              compile_cache_misses=counts.misses)


def _machine(parts: parts_lib.Parts,
             spent: spent_lib.Spent) -> dict[str, Any]:
  device, clock = parts.mesh.devices.flat[0], spent.clock
  peak, rate = spent.peak.flops_per_second, clock.device_rate()
  return dict(
      device_kind=device.device_kind, device_count=parts.mesh.devices.size,
      process_count=jax.process_count(), mesh=dict(parts.mesh.shape),
      device_seconds=clock.device_seconds(), tokens_per_second=clock.rate(),
      mfu=None if rate is None else flops_lib.model_flops_utilization(
          rate, parts.budget.flops_per_token, 1, peak),
      peak_flops_per_second=peak, peak_source=spent.peak.source)
