# SPDX-License-Identifier: Apache-2.0
"""A run's files: config.json, metrics.jsonl, result.json. They are the truth.

result.json and config.json are replaced whole or not at all; metrics.jsonl is
appended to, and cut back to the checkpoint when a run resumes.
"""

from collections.abc import Collection
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
from typing import Any

from tfjax import config as config_lib
from tfjax.cost import peaks
from tfjax.train import lease
from tfjax.train.mirrors import columns

# Ended for good. A run that is stopped was hopeless (`tfjax.sweep.halving`).
FINISHED = ("complete", "diverged", "stopped")
# Columns of metrics.jsonl that tell what training took, not what came of it:
# all that two runs of one config differ in.
MEASURED = ("seconds", "device_seconds", "shared_device_seconds",
            "tokens_per_second", "mfu", "energy_kwh")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy",
            "grain", "tokenizers", "tfjax")


class RecordError(ValueError):
  """A run directory whose content stands in the way. Names it and a remedy."""


class WriteError(OSError):
  """A file of a run that cannot be written, on a full disk for one."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """One run, as result.json holds it. Unknown is None.

  Tokens and FLOPs are of training: `tokens_seen` are read, `tokens_predicted`
  (its planned mean) have a loss; `tokens_undone` were read by steps that a
  rollback has undone, and are in neither. Losses are nats a predicted token,
  bits a byte are of the text that was predicted. `flops_total` is of
  `flops_convention`, recomputation left out; its components make it up.

  `wall_seconds` is the time of all parts of a run, from the claim of its
  directory to its result. In it are: `startup_seconds` (claim, data, a new
  state or the checkpoint's), `compile_seconds` (also within other phases, as
  far as JAX tells), `input_seconds` (the devices wait for the next batch, at
  most), `step_seconds` (all other time inside training steps, those that a
  rollback undid too), `evaluation_seconds`, `checkpoint_seconds` (that
  training waits for one to be saved, or gone back to), and `lost_seconds`
  (after the newest checkpoint of a part that was killed or failed, as far as
  its rows tell; its steps were done again). `goodput` is `step_seconds` less
  those of steps that rollbacks undid, over `wall_seconds`.

  `occupied_device_seconds` is `wall_seconds` times the devices of the time,
  what is paid for: of it are price, energy and CO2e. `device_seconds` is
  `input_seconds` and `step_seconds` times the devices of the time; from it
  comes `mfu`, which is achieved over peak FLOP/s. `tokens_per_second` are the
  run's own, on all devices, by the time on the wall in these phases.
  `energy_kwh` is of the machine alone, `co2e_kg` with the PUE where that is
  known. Each source says how its number was obtained.

  A run that branched off another one's trunk (`tfjax.sweep.branch`) has the
  tokens and FLOPs of its whole way, as a law asks for; of them `shared_flops`,
  and of occupied device-seconds `shared_device_seconds`, were spent before
  `branch_step` and are in `branched_from`'s record: all times, price, energy
  and CO2e here are its own alone. Its rows up to there are the trunk's, marked
  `shared`, and what they took is the `shared_device_seconds` of rows. A member
  of an ensemble has its share of what all `ensemble_members` have spent,
  `wall_seconds` too, which are a part of the ensemble's.

  Devices, processes, mesh, peak and hardware are those of the last part of a
  run that was interrupted. A run that failed has what it has spent.
  """

  run_id: str
  status: str  # complete | diverged | stopped | failed | interrupted
  status_reason: str | None = None
  sweep: str | None = None
  family: str | None = None
  objective: str | None = None
  seed: int | None = None
  params_total: int | None = None
  params_embedding: int | None = None
  params_non_embedding: int | None = None
  params_head: int | None = None
  params_active: int | None = None
  tokens_seen: int | None = None
  tokens_planned: int | None = None
  tokens_predicted: float | None = None
  tokens_undone: int | None = None
  unique_tokens: int | None = None
  epochs: float | None = None
  steps: int | None = None
  batch_tokens: int | None = None
  dtype: str | None = None  # of the matrix products
  flops_total: float | None = None
  flops_matmul: float | None = None
  flops_attention: float | None = None
  flops_head: float | None = None
  flops_recompute: float | None = None
  flops_encoder: float | None = None
  flops_decoder: float | None = None
  flops_convention: str | None = None
  flops_by_component: dict[str, float] | None = None
  flops_by_convention: dict[str, float] | None = None
  loss: float | None = None
  loss_stderr: float | None = None
  bits_per_byte: float | None = None
  train_loss: float | None = None
  loss_counts: str | None = None  # which tokens, in words
  corpus: str | None = None
  tokenizer: str | None = None
  vocab_size: int | None = None
  bytes_per_token: float | None = None
  entropy_rate: float | None = None
  token_store: str | None = None
  attention: str | None = None
  device_kind: str | None = None
  device_count: int | None = None
  process_count: int | None = None
  mesh: dict[str, int] | None = None  # devices along each axis
  device_seconds: float | None = None
  tokens_per_second: float | None = None
  mfu: float | None = None
  peak_flops_per_second: float | None = None  # of one device
  peak_source: str | None = None
  wall_seconds: float | None = None
  startup_seconds: float | None = None
  compile_seconds: float | None = None
  input_seconds: float | None = None
  step_seconds: float | None = None
  evaluation_seconds: float | None = None
  checkpoint_seconds: float | None = None
  lost_seconds: float | None = None
  goodput: float | None = None
  occupied_device_seconds: float | None = None
  hardware: str | None = None
  price_usd: float | None = None
  price_source: str | None = None
  energy_kwh: float | None = None
  energy_source: str | None = None
  region: str | None = None
  pue: float | None = None
  co2e_kg: float | None = None
  co2e_source: str | None = None
  resumes: int | None = None
  bad_steps: int | None = None  # skipped, rolled back, or the end of the run
  rollbacks: int | None = None
  failed_saves: int | None = None  # checkpoints that could not be written
  stopped_by: str | None = None  # the signal's name, if this run has ended so
  init_from: str | None = None
  branched_from: str | None = None
  branch_step: int | None = None
  shared_flops: float | None = None
  shared_device_seconds: float | None = None
  ensemble_members: int | None = None
  compile_cache_hits: int | None = None  # programs, of the last part
  compile_cache_misses: int | None = None
  config_hash: str | None = None
  code_version: str | None = None
  packages: dict[str, str] | None = None
  python_version: str | None = None
  host_cpu: str | None = None
  started_at: str | None = None
  finished_at: str | None = None


def run_id(config: config_lib.ExperimentConfig) -> str:
  """A readable prefix and the hash of what determines the result."""
  model = config.model
  size = columns.size_label(dataclasses.asdict(model))
  (key, value), = ((k, v) for k, v in dataclasses.asdict(
      config.duration).items() if v is not None)
  amount = str(value) if isinstance(value, int) else f"{value:g}"
  prefix = f"{model.family}-{size}-{amount.replace('+', '')}-{key}"
  return f"{prefix}-{config_lib.config_hash(config)}"


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file that is there whole or not at all; NaN becomes null.

  Raises:
    WriteError: it cannot be written; the old one is as it was.
  """
  write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file that is there whole or not at all.

  Raises:
    WriteError: it cannot be written; the old one is as it was.
    LostError: its directory was this process's, and is another's now.
  """
  _check_ours(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise write_error(path, error) from error


def _check_ours(path: pathlib.Path) -> None:
  try:
    lease.check(path.parent)
  except OSError as error:
    raise write_error(path, error) from error


def write_error(path: pathlib.Path, error: OSError) -> WriteError:
  """What to raise where a file of a run, or its claim, cannot be written."""
  return WriteError(f"{path} cannot be written ({error}); make room, or make "
                    "it writable, and start again: what is saved is kept")


def write_result(run_dir: pathlib.Path, result: dict[str, Any]) -> None:
  pathlib.Path(run_dir).mkdir(parents=True, exist_ok=True)
  write_json(pathlib.Path(run_dir) / "result.json", result)


def read_result(run_dir: pathlib.Path) -> dict[str, Any] | None:
  """The run's result, or None where it has not ended.

  Raises:
    RecordError: the file is damaged.
  """
  path = pathlib.Path(run_dir) / "result.json"
  try:
    result = json.loads(path.read_bytes())
    if not isinstance(result, dict) or "status" not in result:
      raise ValueError("it has no status")
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (ValueError, TypeError) as error:
    raise RecordError(f"{path} is damaged ({error}); delete it to run the run "
                      "again") from error
  return result


def record_of(result: dict[str, Any]) -> RunRecord:
  """A result as it was read; another version of the code may have written
  more."""
  known = {field.name for field in dataclasses.fields(RunRecord)}
  return RunRecord(
      **{name: value for name, value in result.items() if name in known})


def finite(value: Any) -> Any:
  """JSON has no NaN: a number that is none is unknown."""
  if isinstance(value, dict):
    return {key: finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl, without a last one that a kill cut short.

  Raises:
    RecordError: another line is damaged.
  """
  rows = []
  # What follows the last line's end is the row that was cut short.
  for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
    try:
      row = json.loads(line)
      if "step" not in row:
        raise ValueError("it has no step")
    except (ValueError, TypeError) as error:
      raise RecordError(f"{path} is damaged in line {number} ({error}); delete "
                        "that line, and its row alone is lost") from error
    rows.append(row)
  return rows


def _line(row: dict[str, Any]) -> str:
  return json.dumps(finite(row), allow_nan=False) + "\n"


class MetricsFile:
  """metrics.jsonl of one run, open for appending.

  Every method raises a WriteError where the file cannot be written, and a
  LostError where the run has become another process's. That one has a file of
  its own (`cut` puts a new one in its place): no row can get into it.
  """

  def __init__(self, path: pathlib.Path, last_step: int,
               kept: Collection[dict[str, Any]] = ()):
    """Opens it as `cut` leaves it."""
    self._path = path
    self._file = None
    self.cut(last_step, kept)

  def cut(self, last_step: int,
          kept: Collection[dict[str, Any]] = ()) -> None:
    """Keeps the rows up to `last_step`, and of the later ones those that are
    in `kept`; drops the others and a broken one."""
    _check_ours(self._path)
    self.close()
    path = self._path
    rows = read_metrics(path) if path.exists() else []
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
      with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(_line(row) for row in rows
                        if row["step"] <= last_step or row in kept)
        file.flush()
        os.fsync(file.fileno())  # these rows are nowhere else
      os.replace(temporary, path)
      # Unbuffered: what a full disk refuses must not be tried again later.
      self._file = open(path, "ab", buffering=0)
    except OSError as error:
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
      raise write_error(path, error) from error

  def write(self, row: dict[str, Any]) -> None:
    _check_ours(self._path)
    data = _line(row).encode()
    try:
      while data:  # a disk that has filled up takes a part
        data = data[self._file.write(data):]
    except OSError as error:
      raise write_error(self._path, error) from error

  def sync(self) -> None:
    """Returns when every row is on disk: called before a checkpoint."""
    _check_ours(self._path)
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise write_error(self._path, error) from error

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


def now() -> str:
  return datetime.datetime.now(datetime.timezone.utc).isoformat(
      timespec="seconds")


@functools.cache
def provenance() -> dict[str, Any]:
  """What code ran on what: versions, host."""
  packages = {}
  for name in PACKAGES:
    try:
      packages[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return dict(code_version=_code_version(), packages=packages,
              python_version=platform.python_version(),
              host_cpu=peaks.host_cpu())


def _code_version() -> str | None:
  """The checkout's commit, `+` when changed since; None outside of one."""
  here = pathlib.Path(__file__).resolve().parents[2]
  if not (here / ".git").exists():
    return None
  def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(here), *arguments], check=True,
                          capture_output=True, text=True).stdout.strip()
  try:
    dirty = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")
  except (OSError, subprocess.CalledProcessError):
    return None
