# SPDX-License-Identifier: Apache-2.0
"""What has been done of a sweep, read from its directory alone.

A run's state is in its own directory: result.json once it has ended, the tail
of metrics.jsonl while it runs, and the claim of whoever trains it.
`sweep.json` in the workdir lists the runs that are planned, of every sweep
that was launched there, with all that is needed to run them: nothing is parsed
out of names or of printed text, and no experiment file is needed.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import time
from typing import Any, Collection, Iterator, Mapping, Sequence

from tfjax import config as config_lib
from tfjax.cost import budget as budget_lib
from tfjax.cost import flops as flops_lib
from tfjax.sweep.specs import flat
from tfjax.sweep.specs import RunSpec
from tfjax.train import lease
from tfjax.train import records

_LOG = logging.getLogger("tfjax")

LOG = "log.txt"  # in a run's directory: what its worker printed
PLAN = "sweep.json"
_TAIL_BYTES = 1 << 16
_PLAN_SECONDS = 60.0  # that somebody may take to write the plan


@dataclasses.dataclass(frozen=True)
class RunState:
  """Where a run stands; what is not known is None.

  `status` is pending, running, complete, diverged, stopped, failed, or
  interrupted (begun, with nobody at it, and to be resumed).
  """

  run_id: str
  status: str
  reason: str | None = None
  step: int | None = None
  loss: float | None = None  # held-out once it has ended, else in training
  tokens_per_second: float | None = None
  result: dict[str, Any] | None = None
  host: str | None = None  # where it is running


# --- Runs --------------------------------------------------------------------


def run_state(workdir: str | os.PathLike[str], run_id: str) -> RunState:
  """The state of one run of the sweep in `workdir`.

  Raises:
    RecordError: its result.json is damaged.
  """
  run_dir = pathlib.Path(workdir) / run_id
  # The claim comes first: a run that is taken up again has its old result for
  # a moment.
  holder = lease.holder(run_dir)
  if holder is not None:
    return dataclasses.replace(progress(workdir, run_id), host=holder.host)
  result = records.read_result(run_dir)
  if result is not None:
    step = result.get("steps")
    if step is None:
      step = progress(workdir, run_id).step
    return RunState(
        run_id, result["status"], result.get("status_reason"), step=step,
        loss=result.get("loss"),
        tokens_per_second=result.get("tokens_per_second"), result=result)
  if (run_dir / "config.json").exists():
    return dataclasses.replace(
        progress(workdir, run_id), status="interrupted",
        reason="its process ended without recording why")
  return RunState(run_id, "pending")


def progress(workdir: str | os.PathLike[str], run_id: str) -> RunState:
  """How far a run is that is known to be running."""
  row = last_row(pathlib.Path(workdir) / run_id / "metrics.jsonl",
                 "train") or {}
  return RunState(run_id, "running", step=row.get("step"),
                  loss=row.get("loss"),
                  tokens_per_second=row.get("tokens_per_second"))


def is_finished(run_dir: str | os.PathLike[str],
                config_hash: str | None = None) -> bool:
  """Whether a run has ended for good.

  Args:
    config_hash: of the config that it must have been of; None: whichever.

  Raises:
    RecordError: its result.json is damaged.
  """
  result = records.read_result(pathlib.Path(run_dir))
  return (result is not None and result["status"] in records.FINISHED
          and config_hash in (None, result.get("config_hash")))


def sweep_state(workdir: str | os.PathLike[str],
                sweep: str | None = None) -> list[RunState]:
  """The state of every planned run, in the plan's order.

  Args:
    sweep: unset: of all that were launched there.
  """
  return [run_state(workdir, row["run_id"])
          for row in read_plan(workdir, sweep)["runs"]]


def last_row(path: str | os.PathLike[str], kind: str) -> dict[str, Any] | None:
  """The last whole row of that kind in the tail of a metrics.jsonl."""
  try:
    with open(path, "rb") as file:
      size = file.seek(0, os.SEEK_END)
      start = max(0, size - _TAIL_BYTES)
      file.seek(start)
      lines = file.read().split(b"\n")
  except (FileNotFoundError, NotADirectoryError):
    return None
  # The writer ends a row with its newline, so that what follows the last one
  # is half a row; so may be what the tail begins with.
  for line in reversed(lines[1 if start else 0:-1]):
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if isinstance(row, dict) and row.get("kind") == kind:
      return row
  return None


# --- The plan ----------------------------------------------------------------


def write_plan(workdir: str | os.PathLike[str], sweep: str,
               specs: Sequence[RunSpec]) -> None:
  """Records what a sweep is and that it is asked for: whoever works in
  `workdir` does all of it that is not done, and what failed before once more.

  Other sweeps there stay; a run that is in several is one run. What a sweep of
  that name had and has no longer leaves the plan, and stays on disk.

  Raises:
    WriteError: the plan cannot be written; the old one is as it was.
    RecordError: the old one is damaged.
    LaunchBusyError: somebody else does not come to an end with writing it.
  """
  workdir = pathlib.Path(workdir)
  with _changing(workdir):
    plan = _read(workdir) or dict(sweeps={}, base={}, runs=[])
    rows = {row["run_id"]: dict(row, config=_config(plan, row))
            for row in plan["runs"]}
    asked_at = lease.stamp(workdir)
    for spec in specs:
      rows[spec.run_id] = _row(spec, asked_at)
    # The newest comes last, and is `sweep`.
    before = plan["sweeps"].pop(sweep, [])
    plan["sweeps"][sweep] = [spec.run_id for spec in specs]
    planned = dict.fromkeys(
        run_id for run_ids in plan["sweeps"].values() for run_id in run_ids)
    gone = [run_id for run_id in before if run_id not in planned
            and not is_finished(workdir / run_id)]
    if gone:
      _LOG.warning(
          "%d unfinished runs that the sweep %r had leave the plan of %s, as "
          "the sweep is another now: %s%s", len(gone), sweep, workdir,
          ", ".join(gone[:3]), ", ..." if len(gone) > 3 else "")
    _write(workdir, plan["sweeps"], [rows[run_id] for run_id in planned])


def ask(workdir: str | os.PathLike[str], run_ids: Collection[str]) -> None:
  """Asks for planned runs once more: those that failed are tried again.

  Raises:
    FileNotFoundError: no sweep was launched there.
    WriteError, RecordError, LaunchBusyError: as `write_plan`.
  """
  workdir = pathlib.Path(workdir)
  with _changing(workdir):
    plan = _existing(workdir)
    asked_at = lease.stamp(workdir)
    _write(workdir, plan["sweeps"], [
        dict(row, config=_config(plan, row), **(
            dict(asked_at=asked_at) if row["run_id"] in run_ids else {}))
        for row in plan["runs"]])


def read_plan(workdir: str | os.PathLike[str],
              sweep: str | None = None) -> dict[str, Any]:
  """The plan: `sweep`, a name; `sweeps`, run ids by the sweeps' names; `runs`,
  a row a run, with its `overrides`, `params_total`, `tokens`, `steps`,
  `flops_total`, and `asked_at` by the clock of the file system.

  Args:
    sweep: whose runs; unset: all, and `sweep` is the newest's name.

  Raises:
    FileNotFoundError: no sweep, or none of that name, was launched there.
    RecordError: the plan is damaged.
  """
  plan = _existing(workdir)
  if sweep is None:
    return plan | dict(sweep=list(plan["sweeps"])[-1])
  if sweep not in plan["sweeps"]:
    raise FileNotFoundError(
        f"no sweep {sweep!r} was launched in {workdir}; there are: "
        f"{', '.join(map(repr, plan['sweeps']))}")
  rows = {row["run_id"]: row for row in plan["runs"]}
  return plan | dict(
      sweep=sweep, runs=[rows[name] for name in plan["sweeps"][sweep]])


def read_specs(workdir: str | os.PathLike[str],
               sweep: str | None = None) -> list[RunSpec]:
  """The planned runs, ready to be launched; as `read_plan`."""
  plan = read_plan(workdir, sweep)
  specs = []
  for row in plan["runs"]:
    budget = row["budget"] | dict(
        flops=flops_lib.Flops(**row["budget"]["flops"]))
    specs.append(RunSpec(
        row["run_id"], config_lib.from_dict(_nested(_config(plan, row))),
        row["overrides"], budget_lib.Budget(**budget)))
  return specs


class LaunchBusyError(RuntimeError):
  """Somebody else is writing the plan, and does not come to an end."""


@contextlib.contextmanager
def _changing(workdir: pathlib.Path) -> Iterator[None]:
  """Alone at the plan; waits for others."""
  end = time.monotonic() + _PLAN_SECONDS
  with contextlib.ExitStack() as held:
    while True:
      try:
        held.enter_context(lease.hold(workdir))
        break
      except lease.BusyError as error:
        if time.monotonic() > end:
          raise LaunchBusyError(
              f"{workdir / PLAN} is being changed by {error.holder}, for "
              "longer than that takes; stop it, and start again") from error
        time.sleep(0.05)
    yield


def _row(spec: RunSpec, asked_at: float) -> dict[str, Any]:
  budget = spec.budget
  return dict(
      run_id=spec.run_id, overrides=dict(spec.overrides), asked_at=asked_at,
      params_total=budget.params_total, tokens=budget.tokens,
      steps=budget.steps, flops_total=budget.flops_total,
      budget=dataclasses.asdict(budget),
      config=flat(config_lib.to_dict(spec.config)))


def _write(workdir: pathlib.Path, sweeps: Mapping[str, Sequence[str]],
           rows: Sequence[Mapping[str, Any]]) -> None:
  """Of the configs each row has what is not the same in all."""
  configs = [row["config"] for row in rows]
  base = {key: value for key, value in configs[0].items()
          if all(key in one and one[key] == value for one in configs)
          } if configs else {}
  records.write_json(workdir / PLAN, dict(
      sweeps=sweeps, base=base, runs=[
          dict(row, config={key: value for key, value in row["config"].items()
                            if key not in base}) for row in rows]))


def _read(workdir: pathlib.Path) -> dict[str, Any] | None:
  path = workdir / PLAN
  try:
    plan = json.loads(path.read_bytes())
    if not {"sweeps", "base", "runs"} <= plan.keys():
      raise ValueError("it lacks keys")
  except FileNotFoundError:
    return None
  except (ValueError, AttributeError) as error:
    raise records.RecordError(
        f"{path} is damaged or of another version ({error}); delete it and "
        "launch the sweep again: no run is lost") from error
  return plan


def _existing(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  plan = _read(pathlib.Path(workdir))
  if plan is None:
    raise FileNotFoundError(
        f"no sweep was launched in {workdir}: there is no {PLAN}")
  return plan


def _config(plan: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
  """A row's whole config, by dotted keys."""
  return plan["base"] | row["config"]


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
  result: dict[str, Any] = {}
  for key, value in values.items():
    *groups, name = key.split(".")
    functools.reduce(lambda inner, group: inner.setdefault(group, {}),
                     groups, result)[name] = value
  return result
