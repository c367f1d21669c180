# SPDX-License-Identifier: Apache-2.0
"""The command line of scripts: --config=FILE with --config.key=value.

On top of `ml_collections.config_flags`: --config.key=None unsets a value, and
a mistake is one line that names the key and what would be valid.
"""

import re
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from tfjax import config as config_lib

EXIT_REFUSED = 2

_unset: dict[str, None] = {}  # keys given as --config.key=None


def parse(arguments: list[str]) -> list[str]:
  """For `app.run(flags_parser=...)`; exits where the command line is bad."""
  try:
    if path := _config_file(arguments):
      config_lib.module(path)  # says better than config_flags what is wrong
    kept = [one for one in arguments if not _is_unset(one)]
    return flags.FLAGS(kept)
  except (flags.Error, config_lib.ConfigError, FileNotFoundError) as error:
    sys.exit(refuse(error))


def overrides() -> dict[str, Any]:
  """What was given as --config.key=value, by dotted key."""
  return {**config_flags.get_override_values(flags.FLAGS["config"]), **_unset}


def refuse(problem: object) -> int:
  """Says why nothing is run; returns the exit code."""
  print(f"error: {problem}", file=sys.stderr)
  return EXIT_REFUSED


def _config_file(arguments: list[str]) -> str | None:
  """The file of --config=FILE or --config FILE, the last of several."""
  found = None
  for argument, following in zip(arguments, [*arguments[1:], None]):
    if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
      found = following if match[1] is None else match[1]
  return found


def _is_unset(argument: str) -> bool:
  """Takes note of --config.key=None, which config_flags cannot express."""
  match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", argument, re.DOTALL)
  if not match:
    return False
  key, value = match.groups()
  _check_known(key)
  if value != "None":
    return False
  config_lib.override(config_lib.default(), {key: None})  # is it optional?
  _unset[key] = None
  return True


def _check_known(key: str) -> None:
  """Raises the ConfigError that names the valid keys."""
  node: Any = config_lib.default()
  for name in key.split("."):
    if not hasattr(node, "keys") or name not in node:
      config_lib.override(config_lib.default(), {key: None})
    node = node[name]
