# SPDX-License-Identifier: Apache-2.0
"""Whose a run directory is: one process's at a time, and one config's.

In a run of many processes the main one alone looks and writes here; what it
finds reaches the others through `shared`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any, Callable, Iterator, Mapping

from tfjax import config as config_lib
from tfjax.data import corpora
from tfjax.data import store as store_lib
from tfjax.train import cluster
from tfjax.train import lease
from tfjax.train import records


class RunDirectoryBusyError(RuntimeError):
  """Another process is training in this run directory."""


@contextlib.contextmanager
def directory(run_dir: pathlib.Path) -> Iterator[None]:
  """Holds the run directory; `tfjax.train.lease` says how.

  A process that has lost it to another, after it stood still, gets a
  `lease.LostError` when it next writes a file of the run.

  Raises:
    RunDirectoryBusyError: another process has it.
    WriteError: the claim cannot be written, on a full disk for one.
  """
  with contextlib.ExitStack() as stack:
    try:
      run_dir.mkdir(parents=True, exist_ok=True)
      stack.enter_context(lease.hold(run_dir))
    except lease.BusyError as error:
      raise RunDirectoryBusyError(
          f"another process is training in {run_dir} ({error.holder}); wait "
          "for it, or stop it") from None
    except OSError as error:
      raise records.write_error(run_dir / lease.DIRECTORY, error) from error
    yield


def is_held(run_dir: str | os.PathLike[str]) -> bool:
  """Whether a living process holds the run directory."""
  return lease.holder(run_dir) is not None


def finished_record(
    run_dir: pathlib.Path, config: config_lib.ExperimentConfig,
) -> records.RunRecord | None:
  """The record of a finished run of this config, if it is there.

  Raises:
    RecordError: it is of another config, or of a corpus that has changed.
  """
  result = records.read_result(run_dir)
  if result is None or result["status"] not in records.FINISHED:
    return None
  if result.get("config_hash") != config_lib.config_hash(config):
    held = _config_json(run_dir)
    raise _other_config(run_dir, "a finished run", (
        {} if held is None else differences(held, config)))
  refuse_other_store(run_dir, "was finished", result.get("token_store"),
                     _store_name(config.data))
  return records.record_of(result)


def prepare(run_dir: pathlib.Path,
            config: config_lib.ExperimentConfig) -> None:
  """Makes the claimed directory this config's: config.json, no result yet.

  Raises:
    RecordError: there are checkpoints of another config; nothing is changed.
    WriteError: the disk is full.
  """
  held = _config_json(run_dir)
  saved = (run_dir / "checkpoints").glob("[0-9]*")
  if held is not None and any(path.name.isdigit() for path in saved):
    refuse_other_config(run_dir, held, config)
  records.write_json(run_dir / "config.json", config_lib.to_dict(config))
  (run_dir / "result.json").unlink(missing_ok=True)


def refuse_other_config(
    run_dir: pathlib.Path, held: Mapping[str, Any],
    config: config_lib.ExperimentConfig) -> None:
  """Raises a RecordError that shows how a checkpoint's config differs.

  `held`: that config, as `config.to_dict` gives it.
  """
  if found := differences(held, config):
    raise _other_config(run_dir, "an unfinished run", found)


def refuse_other_store(run_dir: pathlib.Path, what: str, held: str | None,
                       store: str | None) -> None:
  """Raises a RecordError where two known token stores are not the same."""
  if None not in (held, store) and held != store:
    raise records.RecordError(
        f"{run_dir}: the corpus has changed since this run {what} (token "
        f"store {held} then, {store} now); delete the run directory to train "
        "on the new one, or choose another run_id or workdir")


# Of a model: they change what its parameters compute, and not their shapes.
_MULTIPLIERS = ("parametrization", "base_d_model", "base_head_dim",
                "base_num_layers")


def refuse_other_parametrization(source: pathlib.Path,
                                 model: config_lib.ModelConfig) -> None:
  """Raises a ConfigError where the weights of a run, in the directory
  `source` or its checkpoints', would be multiplied by other numbers here."""
  source = source.expanduser().resolve()
  held = _config_json(source) or _config_json(source.parent)
  if held is None:
    return  # Weights alone: nothing tells.
  for name in _MULTIPLIERS:
    default = getattr(config_lib.ModelConfig, name)
    there, here = held.get("model", {}).get(name, default), getattr(model, name)
    if there != here:
      raise config_lib.ConfigError(
          "init_from", f"the weights of {source} were trained with model.{name}="
          f"{there!r}, and {here!r} would multiply them by other numbers; set "
          f"model.{name} to {there!r}")


def differences(
    held: Mapping[str, Any], config: config_lib.ExperimentConfig,
) -> dict[str, tuple[str, str]]:
  """Dotted keys that affect the result and differ: (there, here) as text.

  `held` may be of another version of the code, which has other keys; one that
  lacks a field that was added since had it at its default.
  """
  here = config_lib.to_dict(config)
  found = {}
  for key, affects_result, is_as_before in _keys(config):
    if affects_result:
      values = _value(held, key), _value(here, key)
      if values[0] != values[1] and not (
          is_as_before and values[0] == _NO_KEY):
        found[key] = values
  known = {key for key, *_ in _keys(config)}
  for key in _leaves(held):
    if key not in known:
      found[key] = _value(held, key), _NO_KEY
  return found


def shared(action: Callable[[], Any]) -> Any:
  """What `action` does at the main process, returned or raised at all.

  What it returns must be JSON.
  """
  outcome = {}
  if cluster.is_main():
    try:
      outcome = dict(value=action())
    except Exception as error:
      cluster.broadcast(dict(
          error=[kind.__name__ for kind in type(error).__mro__],
          message=str(error)))
      raise
  outcome = cluster.broadcast(outcome)
  if "error" in outcome:
    if config_lib.ConfigError.__name__ in outcome["error"]:
      raise config_lib.ConfigError("", outcome["message"])
    kinds = {kind.__name__: kind for kind in (
        RunDirectoryBusyError, lease.LostError, records.RecordError,
        records.WriteError, corpora.DataError, OSError, Exception)}
    raise next(kinds[name] for name in outcome["error"] if name in kinds)(
        outcome["message"])
  return outcome["value"]


# --- Details -----------------------------------------------------------------

_NO_KEY = "no such key"


def _other_config(run_dir: pathlib.Path, what: str,
                  found: Mapping[str, tuple[str, str]]
                  ) -> records.RecordError:
  lines = [f"  {key}: {there} there, {here} here"
           for key, (there, here) in found.items()]
  return records.RecordError("\n".join([
      f"{run_dir} holds {what} of another config:",
      *(lines or ["  (its config.json does not tell which)"]),
      "choose another run_id or workdir, or delete the directory to train "
      "anew; to start from its weights alone, train elsewhere with "
      f"init_from={str(run_dir)!r}"]))


def _store_name(config: config_lib.DataConfig) -> str | None:
  """The name of the token store of the corpus as it is now, if it is."""
  try:
    return store_lib.name(config)
  except (config_lib.ConfigError, corpora.DataError, OSError):
    return None  # Gone since: the record stands.


def _config_json(run_dir: pathlib.Path) -> dict[str, Any] | None:
  path = run_dir / "config.json"
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
      raise ValueError("it is no JSON object")
    return values
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise records.RecordError(
        f"{path} is damaged ({error}), so that nobody can tell whose the "
        "directory is; delete the directory, or choose another run_id or "
        "workdir") from error


def _keys(config: Any, prefix: str = "",
          affects: bool = True) -> Iterator[tuple[str, bool, bool]]:
  """Every dotted key; whether it affects the result; whether it was added
  later and is at its default, which is how it was before."""
  for entry in dataclasses.fields(config):
    key = f"{prefix}{entry.name}"
    matters = affects and entry.metadata["affects_result"]
    value = getattr(config, entry.name)
    if dataclasses.is_dataclass(value):
      yield from _keys(value, f"{key}.", matters)
    else:
      yield key, matters, entry.metadata["added"] and value == entry.default


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}"


def _value(values: Any, key: str) -> str:
  """The value at a dotted key, as text."""
  for name in key.split("."):
    if not isinstance(values, Mapping) or name not in values:
      return _NO_KEY
    values = values[name]
  return repr(values)
