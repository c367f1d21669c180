# SPDX-License-Identifier: Apache-2.0
"""What a run or a sweep will cost, before it runs.

    scripts/plan.py --config=experiments/gpt3.py --hardware=h100 \
        --num_devices=64 [--region=...] [--mfu=0.4] [--price=2.5] [--run] \
        [--config.key=value ...] [--json=FILE]
    scripts/plan.py --config=experiments/quickstart.py --workdir=W \
        [--workers=N] [--sweep=NAME ...] [--sweep_arg=name=value ...] \
        [--overrides=FILE.json]

Prints parameters, tokens, FLOPs, memory, hours, price, energy, CO2e and the
learning rate of what get_sweep gives, or of the config alone with --run; of a
parametrization other than standard also what it does to every role. With
--hardware hours follow from an MFU, and no data is read. Without, this machine
is meant: every model is timed for a moment as the sweep would run it. --workdir
keeps the forecast in its cost.json, beside which a report sets what was spent.

    scripts/plan.py --config=experiments/gpt3.py --topology=v5p:4x4x8 \
        --config.mesh.fsdp=32 [--config.key=value ...] [--json=FILE]
    scripts/plan.py --config=experiments/quickstart.py --devices=8

compile the config's train step for a machine that is not here: whether it
fits, what moves, how fast a step could be, and what to change (plan_compiled).
A topology needs libtpu (pip install -e '.[tpu]') and no TPU; --devices are
simulated on the CPU.

Exits with 0 when it fits or that is not known, 1 when it does not, 2 when it
cannot be planned.
"""

import json
import math
import pathlib
import sys
from typing import Any, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# pylint: disable=wrong-import-position
from absl import app
from absl import flags
import jax
from ml_collections import config_flags
from rich import console as console_lib

import plan_compiled
import plan_curve
import plan_roles
import plan_show as show
import sweep_flags
from tfjax import commandline
from tfjax import config as config_lib
from tfjax import sweep
from tfjax.cost import estimates
from tfjax.cost import memory as memory_lib
from tfjax.data import corpora
from tfjax.sweep import calibrate
from tfjax.sweep import forecast as forecast_lib
from tfjax.train import ahead
from tfjax.train import records
from tfjax.train import tuning
from tfjax.train import ways_out

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "experiment file; --config.key=value overrides a value")
_JSON = flags.DEFINE_string(
    "json", None, "write everything to this file; -: to standard output, "
    "tables to standard error")
# What it costs.
_HARDWARE = flags.DEFINE_string(
    "hardware", None, "name in tfjax/cost/hardware.toml (cost.hardware); "
    "unset: this machine")
_NUM_DEVICES = flags.DEFINE_integer(
    "num_devices", None, "devices of a run, as JAX counts them, on --hardware; "
    "unset: those of the config's mesh", lower_bound=1)
_MFU = flags.DEFINE_float(
    "mfu", None, "share of the peak that model FLOPs reach on --hardware; "
    f"unset: {estimates.DEFAULT_MFU}", lower_bound=0.001, upper_bound=1.0)
_REGION = flags.DEFINE_string(
    "region", None, "name in tfjax/cost/regions.toml (cost.region)")
_PRICE = flags.DEFINE_float(
    "price", None, "USD a chip and hour (cost.price_usd_per_chip_hour)",
    lower_bound=0.0)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "runs at the same time: worker processes as of sweep.py, "
    "or on --hardware machines of --num_devices", lower_bound=1)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the sweep, for its cost.json")
_RUN = flags.DEFINE_bool("run", False, "the config alone, not its sweep")
_TIMING = flags.DEFINE_bool(
    "timing", True, "time every model on this machine; off: hours are unknown")
# What the compiler makes of it.
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPUs to compile for, such as v5e:16x16 or, for two "
    "slices, 2xv5e:16x16")
_DEVICES = flags.DEFINE_integer(
    "devices", None, "simulated CPU devices to compile for", lower_bound=1)
_MEMORY = flags.DEFINE_float(
    "memory_gib", None, "memory of a device; unset: the hardware's, and "
    "unknown for simulated devices", lower_bound=0.001)
_ADVICE = flags.DEFINE_bool(
    "advice", True, "also try the largest batch and, where the step does not "
    "fit, what to change; each try is compiled")
flags.mark_flag_as_required("config")

_WIDTH = 100
_FITS, _DOES_NOT = 0, 1
_GIB = 2**30
_COMPILED = ("topology", "devices", "memory_gib", "advice")


def main(arguments: Sequence[str]) -> int:
  if len(arguments) > 1:
    return commandline.refuse(f"unknown argument {arguments[1]!r}")
  if problem := _contradiction():
    return commandline.refuse(problem)
  # Before JAX starts: this process plans and compiles for what it does not
  # have. Accelerators that are here are the workers'.
  jax.config.update("jax_platforms", "cpu")
  console = console_lib.Console(stderr=_JSON.value == "-")
  if not console.is_terminal:
    console = console_lib.Console(stderr=_JSON.value == "-", width=_WIDTH)
  try:
    config = _CONFIG.value
    config_lib.override(config, commandline.overrides() | _cost_overrides())
    result = (_compiled(console, config)
              if _TOPOLOGY.value or _DEVICES.value else
              _forecast(console, config))
    _write_json(result)
  except (config_lib.ConfigError, sweep.PlanError, sweep.LaunchError,
          ahead.TopologyError, calibrate.CalibrationError, corpora.DataError,
          records.RecordError, OSError) as error:
    return commandline.refuse(error)
  except KeyboardInterrupt:
    return 130
  return _DOES_NOT if result["fits"] is False else _FITS


def _contradiction() -> str | None:
  """Flags that do not go together."""
  def given(*names: str) -> list[str]:
    return [f"--{name}" for name in names if flags.FLAGS[name].present]
  if _TOPOLOGY.value and _DEVICES.value:
    return ("give --topology (such as v5e:16x16) or --devices (such as 8), one "
            "of them")
  compiled = given("topology", "devices")
  others = given("hardware", "num_devices", "mfu", "region", "price", "workers",
                 "workdir", *sweep_flags.NAMES, "run", "timing")
  if compiled and others:
    return (f"{compiled[0]} compiles one step, for which {others[0]} has no "
            "meaning; leave one of them out")
  alone = given("memory_gib", "advice")
  if alone and not compiled:
    return f"{alone[0]} is for --topology or --devices"
  if given("hardware", "timing") == ["--hardware", "--timing"]:
    return "--timing is for this machine, and --hardware is another"
  if given("run") and given(*sweep_flags.NAMES):
    return f"--run plans no sweep, and {given(*sweep_flags.NAMES)[0]} does"
  for name in ("mfu", "price"):
    value = flags.FLAGS[name].value
    if value is not None and not math.isfinite(value):
      return f"--{name}={value}: must be a finite number"
  return None


def _cost_overrides() -> dict[str, Any]:
  """Flags that are short for keys of the config."""
  keys = {"cost.hardware": _HARDWARE.value, "cost.region": _REGION.value,
          "cost.price_usd_per_chip_hour": _PRICE.value}
  return {key: value for key, value in keys.items() if value is not None}


def _write_json(result: dict[str, Any]) -> None:
  if not _JSON.value:
    return
  text = json.dumps(result, indent=2, allow_nan=False) + "\n"
  if _JSON.value == "-":
    sys.stdout.write(text)
  else:
    pathlib.Path(_JSON.value).write_text(text, "utf-8")


def _compiled(console: console_lib.Console, config: Any) -> dict[str, Any]:
  # What is compiled for a topology cannot be read back from the cache.
  jax.config.update("jax_enable_compilation_cache", False)
  if _DEVICES.value:
    jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  resolved = estimates.with_vocabulary(config_lib.resolve(config))
  devices = (ahead.topology(_TOPOLOGY.value) if _TOPOLOGY.value
             else jax.devices())
  return plan_compiled.plan(
      console, resolved, devices, topology=_TOPOLOGY.value,
      memory=None if _MEMORY.value is None else round(_MEMORY.value * _GIB),
      advice=_ADVICE.value)


# --- What it will cost -------------------------------------------------------


def _forecast(console: console_lib.Console, config: Any) -> dict[str, Any]:
  """Plans, shows and keeps; returns all of it, ready for JSON."""
  resolved = config_lib.resolve(config)
  elsewhere = any((_HARDWARE.value, _NUM_DEVICES.value, _MFU.value)
                  ) or forecast_lib.is_elsewhere(resolved.cost)
  if not elsewhere:
    # As many as a worker may have, to lay out a run's mesh on.
    jax.config.update("jax_num_cpu_devices", max(
        tuning.available_cores(), resolved.mesh.num_devices))
  # Memory first: what cannot fit needs no data and no timing.
  specs = _specs(config, read_data=False)
  forecast = (forecast_lib.assumed(specs, _NUM_DEVICES.value, _MFU.value,
                                   _WORKERS.value) if elsewhere else
              forecast_lib.here(specs, _WORKERS.value))
  if not elsewhere and forecast.fits is not False:
    forecast = _timed(console, config)
  batch = _largest_batch(forecast)
  _show(console, forecast, batch)
  found = _ways(forecast)
  if forecast.fits is False:
    show.ways(console, found)
  elif _WORKDIR.value:
    forecast.write(_WORKDIR.value)
  return forecast.to_dict() | dict(
      fits=forecast.fits, seconds=forecast.seconds, largest_batch=batch,
      ways_out=[show.way_dict(way) for way in found])


def _specs(config: Any, read_data: bool) -> list[sweep.RunSpec]:
  """Of all sweeps that are meant, or of the config alone."""
  given = commandline.overrides() | _cost_overrides()
  module = config_lib.module(flags.FLAGS["config"].config_filename)
  if _RUN.value or not (hasattr(module, "get_sweep") or
                        sweep_flags.are_given()):
    return sweep.plan(config, [given], read_data=read_data)
  return sweep_flags.together(sweep.plan_all(
      config, sweep_flags.cells(config, given), read_data=read_data))


def _timed(console: console_lib.Console,
           config: Any) -> forecast_lib.Forecast:
  with console.status("planning; data that is new is tokenised once"):
    specs = _specs(config, read_data=True)
  if not _TIMING.value:
    return forecast_lib.here(specs, _WORKERS.value)
  with console.status("timing the real step of every model"):
    calibration = calibrate.measure(specs, _WORKERS.value)
  return forecast_lib.here(specs, _WORKERS.value, calibration)


def _largest_batch(forecast: forecast_lib.Forecast) -> int | None:
  """That fits, of a single run; CPUs compute any batch in small parts."""
  (spec, *others), (one, *_) = forecast.specs, forecast.estimates
  machine = one.machine
  if others or machine.backend == "cpu" or machine.available_bytes is None:
    return None
  return memory_lib.largest_batch(
      estimates.with_vocabulary(spec.config), one.mesh,
      machine.available_bytes, machine.backend)


def _show(console: console_lib.Console, forecast: forecast_lib.Forecast,
          batch: int | None) -> None:
  if len(forecast.specs) == 1:
    (spec,), (one,) = forecast.specs, forecast.estimates
    show.run(console, spec.config, one, batch)
  else:
    show.sweep_of_runs(console, forecast)
  plan_curve.schedules(console, forecast.specs)
  plan_roles.tables(console, forecast.specs)
  show.line(console, show.verdict(forecast))


def _ways(forecast: forecast_lib.Forecast) -> list[ways_out.Way]:
  """Out of the run that needs the most, where that does not fit."""
  if forecast.fits is not False:
    return []
  spec, one = max(
      zip(forecast.specs, forecast.estimates),
      key=lambda pair: pair[1].memory_bytes["total"])
  return ways_out.find(estimates.with_vocabulary(spec.config), one.machine)


if __name__ == "__main__":
  app.run(main, flags_parser=commandline.parse)
