# SPDX-License-Identifier: Apache-2.0
"""What a job of a sweep is asked of SLURM: the launcher's options, checked.

Nothing is submitted here.
"""

import dataclasses
import difflib
import json
import pathlib
import re
import shlex
from typing import Any, Mapping, Sequence

import tfjax
from tfjax.sweep import join
from tfjax.sweep.process import LaunchError
from tfjax.sweep.specs import RunSpec

# Name: (type, submitit's name for SLURM).
_NAMED = {
    "partition": (str, "partition"),
    "account": (str, "account"),
    "constraint": (str, "constraint"),
    "gpus_per_node": (int, "gpus_per_node"),
    "cpus_per_task": (int, "cpus_per_task"),
    "mem_gb": (float, "mem"),
    "timeout_min": (int, "time"),
    "array_parallelism": (int, "array_parallelism"),
}
_OWN = {"wait": bool, "workers_per_job": int, "linger_min": float}
# A job is one task on one node, and the signal is ours.
_TAKEN = ("nodes", "ntasks_per_node", "num_gpus", "use_srun")
_PARALLELISM = 256
_SIGNAL_SECONDS = 90

# Lines of the batch script. A signal that is meant for the script (scancel
# --full or --batch) it passes on to the step, in the background, as scancel
# waits where SLURM is about to end the job itself. srun, which kills its step
# when it gets SIGTERM, has a session of its own. It does not give the step the
# job's cores unless it is told.
_SETUP = (
    '[ -z "$SLURM_CPUS_PER_TASK" ] || '
    'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
    'job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"'
    '"${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"',
    """trap 'scancel --signal=TERM "$job" 2>/dev/null &' TERM""",
    "srun() {",
    '  setsid --wait srun "$@" &',
    "  step=$!",
    '  wait "$step"; code=$?',
    '  while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done',
    '  return "$code"',
    "}",
)


@dataclasses.dataclass(frozen=True)
class Request:
  """One job: submitit's parameters; devices: None where it is not known."""

  parameters: dict[str, Any]
  parallelism: int
  workers_per_job: int
  linger_min: float
  wait: bool
  devices: int | None


def read(options: Mapping[str, Any], sweep: str) -> Request:
  """The request that options by name make.

  Those are partition, account, constraint, gpus_per_node, cpus_per_task,
  mem_gb, timeout_min, array_parallelism (jobs at a time), workers_per_job
  (1), linger_min (how long a job stays when others are at all that is left),
  wait (true: until the runs are done), and submitit's own by their names with
  slurm_ before them. Unset, SLURM's defaults hold.

  Raises:
    LaunchError: a name is unknown, or its value is of another type.
  """
  own = {"wait": True, "workers_per_job": 1,
         "linger_min": join.LINGER_SECONDS / 60}
  given: dict[str, Any] = {}
  for name, value in options.items():
    if name in _OWN:
      own[name] = _typed(name, value, _OWN[name])
      continue
    if name in _NAMED:
      kind, target = _NAMED[name]
      value = _typed(name, value, kind)
    else:
      target = _submitits(name)
      value = _parsed(name, target, value)
    if target in given:
      raise LaunchError(f"launcher option {name!r} says again what another "
                        "one says; give one of them")
    given[target] = value
  if isinstance(given.get("mem"), (int, float)):
    given["mem"] = f"{round(given['mem'] * 1024)}MB"
  parallelism = given.setdefault("array_parallelism", _PARALLELISM)
  return Request(_parameters(given, sweep), parallelism,
                 devices=_devices(given), **own)


def check_devices(specs: Sequence[RunSpec], request: Request) -> None:
  """Raises a LaunchError where a run's mesh is larger than a job, if known."""
  for spec in specs:
    if spec.config.runtime.distributed == "on":
      raise LaunchError(
          f"{spec.run_id}: config.runtime.distributed=on asks for several "
          "processes, and a sweep trains each run in one; leave it at auto, "
          "or train the run by itself with scripts/launch/slurm.sbatch")
    needed = max(spec.config.mesh.num_devices,
                 spec.config.runtime.num_devices or 1)
    if request.devices is not None and needed > request.devices:
      raise LaunchError(
          f"{spec.run_id}: config.mesh and config.runtime.num_devices ask for "
          f"{needed} devices, a job has {request.devices}; set "
          f"gpus_per_node={needed}, or, where no node has as many, train the "
          "run by itself on several with scripts/launch/slurm.sbatch")


def _parameters(given: Mapping[str, Any], sweep: str) -> dict[str, Any]:
  """What submitit is told, with what every job of ours needs."""
  root = str(pathlib.Path(tfjax.__file__).absolute().parents[1])
  given = dict(given)
  seconds = given.pop("signal_delay_s", _SIGNAL_SECONDS)
  more = given.pop("additional_parameters", {})
  setup = given.pop("setup", [])
  path = f'export PYTHONPATH={shlex.quote(root)}"${{PYTHONPATH:+:$PYTHONPATH}}"'
  return {
      "job_name": f"tfjax-{sweep}",
      "time": None,  # the partition's limit, not submitit's five minutes
      "wckey": None,
      **given,
      "setup": [path, *_SETUP, *setup],
      "additional_parameters": {
          "requeue": True, "signal": f"TERM@{seconds}", **more},
  }


def _submitits(name: str) -> str:
  """The name of a slurm_* option in submitit; raises where there is none."""
  import submitit  # pylint: disable=import-outside-toplevel
  # pylint: disable-next=protected-access
  known = submitit.SlurmExecutor._valid_parameters()
  target = name.removeprefix("slurm_")
  if target in _TAKEN and name != target:
    raise LaunchError(
        f"launcher option {name!r} cannot be set: a job is one task on one "
        "node; to train one run on several, use scripts/launch/slurm.sbatch")
  if target in known and name != target:
    return target
  names = {one: f"slurm_{one}" for one in sorted(known)
           if one not in _TAKEN}
  names = {one: one for one in (*_NAMED, *_OWN)} | {
      one: full for one, full in names.items() if one not in _NAMED}
  close = [names[one] for one in difflib.get_close_matches(target, names)]
  hint = (f"did you mean {' or '.join(map(repr, close))}?" if close else
          f"there are: {', '.join(names.values())}")
  raise LaunchError(f"no launcher option {name!r} for 'slurm'; {hint}")


def _parsed(name: str, target: str, value: Any) -> Any:
  """One of submitit's values; what has come as text becomes what it takes."""
  if not isinstance(value, str):
    return value
  if target in ("setup", "teardown"):
    return [value]  # a line of the script
  if target == "srun_args":
    return shlex.split(value)
  if target == "additional_parameters":
    try:
      return dict(json.loads(value))
    except (TypeError, ValueError):
      raise LaunchError(f"launcher option {name}={value}: must be a JSON "
                        'object, such as {"nice": 5}') from None
  if value.lower() in ("true", "false"):
    return value.lower() == "true"
  return int(value) if value.isdecimal() else value


def _typed(name: str, value: Any, kind: type) -> Any:
  """The value, which may have come as text, in its type; numbers above 0."""
  text = str(value).strip()
  try:
    if kind is bool:
      return {"true": True, "1": True, "yes": True, "false": False,
              "0": False, "no": False}[text.lower()]
    if kind is str:
      return text
    number = kind(text)
    if number < 0 or (number == 0 and name != "gpus_per_node"):
      raise ValueError
    return number
  except (KeyError, ValueError):
    what = {bool: "true or false", int: "a whole number above 0",
            float: "a number above 0"}[kind]
    raise LaunchError(f"launcher option {name}={text}: must be {what}"
                      ) from None


def _devices(given: Mapping[str, Any]) -> int | None:
  """The GPUs of a job, where the options tell."""
  for name in ("gpus_per_node", "gpus_per_task"):  # 8, or a100:8
    if match := re.fullmatch(r"(?:\w+:)?(\d+)", str(given.get(name))):
      return int(match[1]) or None  # none: CPUs, as many devices as asked
  if match := re.fullmatch(r"gpu(?::\w+)?:(\d+)", str(given.get("gres"))):
    return int(match[1])
  return None
