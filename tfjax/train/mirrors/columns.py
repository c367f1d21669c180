# SPDX-License-Identifier: Apache-2.0
"""What a run is called in its mirrors: columns, axes, tags, config, summary.

Only names and numbers; who writes them where is in the modules beside it.
"""

import dataclasses
import json
import pathlib
from typing import Any, Mapping

# What a chart may be against. wandb's own step counts calls, and is no axis.
# Of a branch, seconds and energy are its own alone, as its trunk's have no part
# in what it was charged; the other axes begin where its trunk did.
AXES = ("step", "tokens", "flops", "device_hours", "seconds", "energy_kwh")
KINDS = ("train", "evaluation", "rollback")
_SECONDS_AN_HOUR = 3600.0
_SHARED = "shared_device_seconds"
_OCCUPIED = ("device_seconds", _SHARED)
# Numbers of the plan that a mirror's config holds beside the config's own:
# what a chart groups by, from the first row on.
_PARAMS = ("params_total", "params_embedding", "params_non_embedding",
           "params_head")
# In a run directory: what its mirrors know besides config.json.
NOTE = "mirror.json"


@dataclasses.dataclass(frozen=True)
class About:
  """A run as its mirrors present it, but for its rows and its result.

  Attributes:
    config: the resolved config, and `derived`, what follows from it.
    group: the sweep's name, None for a run alone.
  """

  run_id: str
  group: str | None
  tags: tuple[str, ...]
  config: Mapping[str, Any]

  @property
  def tracking(self) -> Mapping[str, Any]:
    return self.config["tracking"]


def of_row(row: Mapping[str, Any]) -> dict[str, Any]:
  """A row of metrics.jsonl by the names of its columns in a mirror.

  The axes keep theirs, device-seconds become device-hours, all others follow
  the kind of the row: train/loss, evaluation/loss. What is unknown is left
  out: a chart has no point there.
  """
  result = {}
  for name, value in row.items():
    if name in ("kind", *_OCCUPIED) or value is None:
      continue
    result[name if name in AXES else f"{row['kind']}/{name}"] = value
  return result | _device_hours(row, _OCCUPIED)


def identity(row: Mapping[str, Any]) -> str:
  """What tells two rows of a run apart: a step that is done again after a
  kill gives the same, one that is done otherwise after a rollback does not."""
  return f"{row['kind']} {row['step']} {row.get('loss')!r}"


def about(run_dir: pathlib.Path) -> About:
  """Reads who a run is from its directory.

  Raises:
    FileNotFoundError: it has no config.json.
    ValueError: a file in it is damaged.
  """
  config = json.loads((run_dir / "config.json").read_bytes())
  result = read_result(run_dir) or {}
  try:
    note = json.loads((run_dir / NOTE).read_bytes())
  except FileNotFoundError:
    note = {}
  model = config["model"]
  tags = (*config["tracking"].get("tags", ()), model["family"],
          config["objective"]["name"], size_label(model))
  derived = dict(note.get("derived") or {}) | _derived(result)
  return About(
      run_id=run_dir.name, group=result.get("sweep") or note.get("sweep"),
      tags=tuple(dict.fromkeys(tags)), config={**config, "derived": derived})


def size_label(model: Mapping[str, Any]) -> str:
  """A model's size as people name it, from its config: 85M, or d768l12."""
  return model["size"] or f"d{model['d_model']}l{model['num_layers']}"


def plan_of(budget: Any) -> dict[str, Any]:
  """The derived numbers, from a run's `tfjax.cost.budget.Budget`."""
  return dict({name: getattr(budget, name) for name in _PARAMS},
              tokens_planned=budget.tokens, batch_tokens=budget.batch_tokens,
              steps_planned=budget.steps, flops_planned=budget.flops_total)


def _derived(result: Mapping[str, Any]) -> dict[str, Any]:
  """The same from a run's result, as far as that holds them."""
  names = (*_PARAMS, "tokens_planned", "batch_tokens")
  found = {name: result[name] for name in names
           if result.get(name) is not None}
  if {"tokens_planned", "batch_tokens"} <= found.keys():
    found["steps_planned"] = found["tokens_planned"] // found["batch_tokens"]
    if result.get("flops_total") and result.get("tokens_seen"):
      found["flops_planned"] = result["flops_total"] * (
          found["tokens_planned"] / result["tokens_seen"])
  return found


def read_result(run_dir: pathlib.Path) -> dict[str, Any] | None:
  """result.json, or None where the run has not ended."""
  try:
    return json.loads((run_dir / "result.json").read_bytes())
  except FileNotFoundError:
    return None


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
  """result.json without what is unknown, and its end on the axis of hours."""
  return {name: value for name, value in result.items() if value is not None
          } | _device_hours(result, ("occupied_device_seconds", _SHARED))


def _device_hours(found: Mapping[str, Any],
                  names: tuple[str, ...]) -> dict[str, float]:
  """Those of the whole way: a branch's curve begins where its trunk did."""
  known = [found[name] for name in names if found.get(name) is not None]
  return {"device_hours": sum(known) / _SECONDS_AN_HOUR} if known else {}
