# SPDX-License-Identifier: Apache-2.0
"""The record of a run that has ended, from its parts, counts and rows."""

import dataclasses
from typing import Any, Sequence

import jax

from tfjax.cost import flops as flops_lib
from tfjax.cost import hardware
from tfjax.train import clock as clock_lib
from tfjax.train import parts as parts_lib
from tfjax.train import records
from tfjax.train import recovery as recovery_lib


@dataclasses.dataclass(frozen=True)
class Ending:
  """How training ended: steps done, status, its reason if it is not done."""

  steps: int
  status: str
  reason: str | None = None
  stopped_by: str | None = None


def record(
    parts: parts_lib.Parts, ending: Ending, rows: Sequence[dict[str, Any]],
    clock: clock_lib.Clock, recovery: recovery_lib.Recovery,
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
      init_from=config.init_from or None,
      loss=evaluated.get("loss"), loss_stderr=evaluated.get("loss_stderr"),
      bits_per_byte=evaluated.get("bits_per_byte"),
      train_loss=trained.get("loss"),
      loss_counts=parts.objective.counts,
      bad_steps=recovery.bad_steps, rollbacks=len(recovery.rollbacks),
      tokens_undone=recovery.undone_steps * parts.budget.batch_tokens,
      finished_at=records.now(), **_amounts(parts, steps, share),
      **_data(parts), **_machine(parts, clock), **others,
      **records.provenance())


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


def _machine(parts: parts_lib.Parts,
             clock: clock_lib.Clock) -> dict[str, Any]:
  device = parts.mesh.devices.flat[0]
  peak = hardware.peak_flops(device.device_kind, parts.config.train.dtype)
  rate = clock.device_rate()
  return dict(
      device_kind=device.device_kind, device_count=parts.mesh.devices.size,
      process_count=jax.process_count(), mesh=dict(parts.mesh.shape),
      device_seconds=clock.device_seconds(), tokens_per_second=clock.rate(),
      mfu=(rate * parts.budget.flops_per_token / peak
           if rate and peak else None),
      energy_source="not measured", co2e_source="not measured")
