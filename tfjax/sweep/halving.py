# SPDX-License-Identifier: Apache-2.0
"""Which learning rates of a grid go on: successive halving.

Of n runs that differ in their learning rate alone the best ceil(n / eta) go on
at each rung; the rungs lie at the shares halving_start eta^k of the steps
(Jamieson & Talwalkar 2016, section 2, with eta for the 2 of its halves).
Everybody waits at a rung for the last one. ASHA (Li et al. 2020, algorithm 2)
does not wait, and what it stops hangs on who came first; here it follows from
the runs alone.

A run is judged by its mean training loss over the last tenth of the steps
before the rung. All of a group have seen the same batches, so that the noise
of these is the same in each, and no evaluation is needed. One that diverged
or failed before the rung is the worst; equals are in the order of their
learning rates, the smaller first.

Everything is worked out from the runs' own files, by whoever asks.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any, Sequence

from tfjax import config as config_lib
from tfjax.sweep.specs import RunSpec
from tfjax.train import claim
from tfjax.train import records
from tfjax.train import tracking

_WINDOW = 0.1  # of the steps before a rung, whose losses count
_LEAST_ROWS = 3


@dataclasses.dataclass(frozen=True)
class Go:
  """The run goes on, to the end of that step or (None) to its own end."""

  until_step: int | None


@dataclasses.dataclass(frozen=True)
class Wait:
  """Others have yet to come to the rung where it is."""


@dataclasses.dataclass(frozen=True)
class Stop:
  """It is not among the best of its rung; `stop` records it."""

  reason: str


def groups(specs: Sequence[RunSpec]) -> list[tuple[RunSpec, ...]]:
  """Runs that are halved together: alike but for their learning rate, which
  rises; two at least, and of enough steps for a rung."""
  found: dict[str, list[RunSpec]] = {}
  for spec in specs:
    if spec.config.sweep.halving is not None:
      found.setdefault(_key(spec.config), []).append(spec)
  return [tuple(sorted(group, key=_rate)) for group in found.values()
          if len(group) > 1 and rungs(group[0])]


def rungs(spec: RunSpec) -> list[int]:
  """The steps after which runs are compared, each a step that has a row."""
  settings, total = spec.config.sweep, spec.budget.steps
  every = spec.config.train.log_every_steps
  found, share = [], settings.halving_start
  while share < 1:
    # Rounded first: 0.1 x 3 x 80 is a little more than 24.
    step = every * math.ceil(round(share * total / every, 6))
    if step < total and step not in found:
      found.append(step)
    share *= settings.halving
  return found


def turn(workdir: str | os.PathLike[str], group: Sequence[RunSpec],
         spec: RunSpec) -> Go | Wait | Stop:
  """What is to become of a run that has not ended for good, and that nobody
  is at.

  Args:
    group: the one of `groups` that it is in.

  Raises:
    RecordError: a file of one of the runs is damaged.
  """
  found = [_Member.read(pathlib.Path(workdir) / one.run_id) for one in group]
  place = [one.run_id for one in group].index(spec.run_id)
  # A run that failed and is asked for again may get there yet.
  me = found[place] = dataclasses.replace(found[place], ended=False)
  left, open_ = list(range(len(group))), False
  for rung in rungs(spec):
    keep = -(-len(left) // spec.config.sweep.halving)
    if keep == len(left):
      break
    if me.step < rung:
      return Go(rung)
    scores = {index: found[index].loss(rung) for index in left}
    open_ = open_ or None in scores.values()
    if open_ and me.step == rung:
      return Wait()
    if not open_:
      ranked = sorted(left, key=lambda index: (scores[index], index))
      rank = ranked.index(place)
      if me.step == rung and rank >= keep:
        # Its own record first, of what it has spent.
        return Go(rung) if not me.paused else Stop(_reason(
            spec, rung, rank, scores[place], len(left), keep,
            scores[ranked[0]]))
      # Whoever is past the rung was let past, whatever was tried again since.
      left = sorted({*ranked[:keep], *(
          index for index in left if found[index].step > rung)})
  return Go(None)


def stop(workdir: str | os.PathLike[str], spec: RunSpec, sweep: str | None,
         reason: str) -> records.RunRecord:
  """Records a run whose `turn` is to stop; it keeps what it has spent.

  Raises:
    RunDirectoryBusyError: somebody is at the run.
    RecordError: it is not one that has paused.
    WriteError: the record cannot be written.
  """
  run_dir = pathlib.Path(workdir) / spec.run_id
  with claim.directory(run_dir):
    result = records.read_result(run_dir)
    if result is None or result["status"] not in (
        "interrupted", *records.FINISHED):
      raise records.RecordError(
          f"{run_dir} cannot be stopped, as it has not paused at a rung; go on "
          "with it")
    if result["status"] == "interrupted":
      result |= dict(status="stopped", status_reason=reason,
                     sweep=sweep or result.get("sweep"))
      records.write_result(run_dir, result)
      tracking.amended(spec.config, run_dir)
  return records.record_of(result)


# --- Details -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Member:
  """Where a run stands by its files.

  Attributes:
    ended: it will not come further by itself.
    paused: it has a record, and is to be gone on with.
    losses: (step, loss) of its rows, not a number where the step was bad.
  """

  step: int
  ended: bool
  paused: bool
  losses: tuple[tuple[int, float], ...]

  @classmethod
  def read(cls, run_dir: pathlib.Path) -> "_Member":
    result = records.read_result(run_dir) or dict(status=None)
    path = run_dir / "metrics.jsonl"
    losses = [(row["step"], _finite(row)) for row in (
        records.read_metrics(path) if path.exists() else [])
              if row["kind"] == "train"]
    last = losses[-1][0] if losses else 0
    return cls(step=max(last, result.get("steps") or 0),
               ended=result["status"] not in (None, "interrupted"),
               paused=result["status"] == "interrupted", losses=tuple(losses))

  def loss(self, rung: int) -> float | None:
    """Before the rung; infinite: it never gets there; None: not yet."""
    if self.step < rung:
      return math.inf if self.ended else None
    before = [(step, loss) for step, loss in self.losses if step <= rung]
    within = [loss for step, loss in before if step > (1 - _WINDOW) * rung]
    within = max(within, [loss for _, loss in before[-_LEAST_ROWS:]], key=len)
    good = [loss for loss in within if math.isfinite(loss)]
    return sum(good) / len(good) if good else math.inf


def _finite(row: dict[str, Any]) -> float:
  """The loss of a row; not a number where it is none, or the step was bad and
  skipped."""
  loss = row.get("loss")
  return math.nan if loss is None or row.get("bad") else loss


def _rate(spec: RunSpec) -> float:
  return spec.config.optimizer.learning_rate


def _key(config: config_lib.ExperimentConfig) -> str:
  """The same for configs that differ in their learning rate alone."""
  config = dataclasses.replace(config, name="", optimizer=dataclasses.replace(
      config.optimizer, learning_rate=1.0))
  return json.dumps(config_lib.to_dict(config), sort_keys=True)


def _reason(spec: RunSpec, rung: int, rank: int, loss: float, count: int,
            keep: int, best: float) -> str:
  return (f"stopped after step {rung} of {spec.budget.steps}, at a rung of "
          f"sweep.halving={spec.config.sweep.halving}: with a training loss of "
          f"{_said(loss)} it was number {rank + 1} of {count}, and the first "
          f"{keep} went on, the best with {_said(best)}")


def _said(loss: float) -> str:
  return f"{loss:.4f}" if math.isfinite(loss) else "no number"
