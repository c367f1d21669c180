# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled programs, over processes that die at any moment."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Callable

import pytest

from tfjax import config as config_lib

PROGRAM = """
import json, os, pathlib, signal, sys
from tfjax import config, train
from tfjax.train import compilation
if sys.argv[3:]:
  real = os.replace
  def die(source, target):
    if str(target).endswith("-cache"):
      os.kill(os.getpid(), signal.SIGKILL)  # it is written, and not yet there
    real(source, target)
  os.replace = die
record = train.run(config.from_dict(json.loads(sys.argv[1])), sys.argv[2])
print(json.dumps([record.compile_cache_hits, record.compile_cache_misses,
                  record.compile_seconds, record.loss]))
"""


@pytest.fixture(name="program")
def program_fixture(make_config: Callable, tmp_path: pathlib.Path,
                    monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
  """Trains in a process of its own, with a cache that begins empty."""
  cache = tmp_path / "cache"
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
  config = json.dumps(config_lib.to_dict(make_config({
      "runtime.compilation_cache_dir": str(cache)})))
  return lambda name, *more: subprocess.run(
      [sys.executable, "-c", PROGRAM, config, str(tmp_path / name), *more],
      stdout=subprocess.PIPE, text=True, check=False,
      env=os.environ | {"PYTHONPATH": str(
          pathlib.Path(__file__).parents[2])}).stdout


def test_what_one_process_compiles_others_read(
    program: Callable, tmp_path: pathlib.Path) -> None:
  assert program("killed", "die") == ""
  entries = list((tmp_path / "cache").glob("*-cache"))
  assert not entries  # nothing is there in part
  hits, misses, seconds, loss = json.loads(program("first"))
  assert hits == 0 < misses
  again = json.loads(program("second"))
  assert again[:2] == [misses, 0] and again[3] == loss
  assert again[2] < seconds
