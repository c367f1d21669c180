# SPDX-License-Identifier: Apache-2.0
"""Trains one experiment.

    scripts/train.py --config=experiments/quickstart.py --workdir=runs/single \
        [--config.key=value ...] [--help_config]

Started again, it goes on from its checkpoint; a finished run is not run again.
Exits with 0 when the run is complete, 1 when it failed or diverged, 2 when it
cannot be run (a bad config, a directory that cannot be used), 75 when SIGTERM
or SIGUSR1 stopped it and a scheduler should start it again, 130 when a person
stopped it.
"""

import logging
import os
import pathlib
import signal
import sys
from typing import Sequence

_FAILED, _REQUEUE, _STOPPED = 1, os.EX_TEMPFAIL, 130

# Until there is a state to save, the seconds of the imports included, and
# after the second one.
for _number in (signal.SIGTERM, signal.SIGUSR1):
  signal.signal(_number, lambda *_: sys.exit(_REQUEUE))

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# pylint: disable=wrong-import-position
from absl import app
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from tfjax import commandline
from tfjax import config as config_lib
from tfjax import train
from tfjax.data import corpora
from tfjax.train import cluster
from tfjax.train import lease
from tfjax.train import loop
from tfjax.train import records
from tfjax.train import tuning

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "experiment file; --config.key=value overrides a value")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/single", "the run gets a directory of its own below it")
_HELP = flags.DEFINE_bool(
    "help_config", False, "list every config key with its type and meaning")
flags.mark_flag_as_required("config")


def main(arguments: Sequence[str]) -> int:
  if len(arguments) > 1:
    return commandline.refuse(f"unknown argument {arguments[1]!r}")
  if _HELP.value:
    print("\n".join(config_lib.describe()))
    return 0
  absl_logging.set_verbosity(absl_logging.WARNING)
  try:
    config_dict = _CONFIG.value
    config_lib.override(config_dict, commandline.overrides())
    config = config_lib.resolve(config_dict)
    tuning.restart_tuned(config.runtime, config.mesh)
    logging.getLogger("tfjax").setLevel(logging.INFO)
    record = train.run(config, _WORKDIR.value, on_row=_print_row)
  except (records.WriteError, cluster.PeerError, lease.LostError) as error:
    commandline.refuse(error)
    return _FAILED
  except (config_lib.ConfigError, corpora.DataError, records.RecordError,
          loop.RunDirectoryBusyError, OSError) as error:
    return commandline.refuse(error)
  except KeyboardInterrupt:
    return _STOPPED
  print(f"{record.status}: {pathlib.Path(_WORKDIR.value) / record.run_id}")
  if record.loss is not None:
    error = ("" if record.loss_stderr is None
             else f" +- {record.loss_stderr:.4f}")
    print(f"held-out loss {record.loss:.4f}{error} nats a token, "
          + ("" if record.bits_per_byte is None
             else f"{record.bits_per_byte:.4f} bits a byte, ") +
          f"after {record.tokens_seen:,} tokens and "
          f"{record.flops_total:.3g} FLOPs (the loss counts "
          f"{record.loss_counts})")
  if record.status_reason:
    print(record.status_reason)
  print(_taken(record))
  return _exit_code(record)


def _taken(record: records.RunRecord) -> str:
  """One line: what the run took, and what of it is not known."""
  if record.wall_seconds is None:
    return "what it took is not on record"
  phases = ("startup", "compile", "input", "step", "evaluation", "checkpoint",
            "lost")
  spent = {name: getattr(record, f"{name}_seconds") or 0.0 for name in phases}
  spent["other"] = record.wall_seconds - sum(spent.values())
  split = ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items()
                    if seconds >= 0.05)

  def share(value: float | None, form: str, unknown: str) -> str:
    return unknown if value is None else format(value, form)

  def amount(value: float | None, unit: str, name: str) -> str:
    if value is None:
      return f"{name} unknown"
    return f"{value:,.2f} {unit}" if value >= 1 else f"{value:.3g} {unit}"

  mfu_unknown = ("unknown (no peak of this device is known)"
                 if record.peak_flops_per_second is None else
                 "unknown (devices of several kinds)")
  return (f"took {record.wall_seconds:.1f} s ({split}), goodput "
          + ", ".join([
              share(record.goodput, ".0%", "unknown"),
              "MFU " + share(record.mfu, ".1%", mfu_unknown),
              amount(record.energy_kwh, "kWh", "energy"),
              amount(record.price_usd, "USD", "price"),
              amount(record.co2e_kg, "kg CO2e", "CO2e")]))


def _exit_code(record: records.RunRecord) -> int:
  if record.status == "interrupted":
    return _STOPPED if record.stopped_by == "SIGINT" else _REQUEUE
  return 0 if record.status == "complete" else _FAILED


def _print_row(row: dict[str, object]) -> None:
  """One line of metrics on the terminal."""
  if row["kind"] == "rollback":
    print(f"rollback   step {row['step']:>7}  to step {row['to_step']}: "
          f"{row['reason']}", flush=True)
    return
  rate = row.get("tokens_per_second")
  print(f"{row['kind']:<10} step {row['step']:>7}  loss {row['loss']:.4f}"
        + (f"  {rate:,.0f} tokens/s" if rate else "")
        + ("  bad" if row.get("bad") else ""), flush=True)


if __name__ == "__main__":
  app.run(main, flags_parser=commandline.parse)
