# SPDX-License-Identifier: Apache-2.0
"""What all tests share: eight simulated devices, one cache of compiled code,
one of token stores, and a run that trains in a blink."""

import os
import pathlib
import signal
from typing import Any, Callable, Iterator

# Before JAX is imported. One cache for all tests, workers and the processes
# that they start, kept from one test run to the next.
XLA_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",
    # Half the compile time; the code is slower, and here runs a few times.
    XLA_FLAGS="--xla_backend_optimization_level=0 "
              "--xla_llvm_disable_expensive_passes=true",
    JAX_COMPILATION_CACHE_DIR=str(XLA_CACHE),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    # Not there: what was measured on this machine is not for tests.
    TFJAX_PEAKS=str(XLA_CACHE.with_name("no-peaks.json")),
    WANDB_MODE="offline",
    NETRC=os.devnull,
)
for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
  os.environ.pop(name, None)

# pylint: disable=wrong-import-position
import jax
import pytest

from tfjax import config as config_lib
from tfjax.train import step as step_lib
# pylint: enable=wrong-import-position

# What a shell starts in the background ignores Ctrl-C, and so would every test
# and process from here on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# The file with the most programs adds less than 30,000; 10,000 take 1 to 2 GB.
MAPS, MOST_MAPS = pathlib.Path("/proc/self/maps"), 10_000

MakeConfig = Callable[..., config_lib.ExperimentConfig]


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
  """Every program maps memory anew, and a process may have 65,530 maps (Linux):
  a worker that kept them all crashed within XLA."""
  yield
  if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MOST_MAPS:
    step_lib.forget_steps()
    jax.clear_caches()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Token stores, built once by whichever worker comes first."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  return base / "token-stores"


@pytest.fixture(scope="session")
def make_config(cache_dir: pathlib.Path) -> MakeConfig:
  """make_config({"train.batch_size": 4}): a tiny run with dotted changes."""
  def make(changes: dict[str, Any] | None = None, /
           ) -> config_lib.ExperimentConfig:
    config = config_lib.default()
    values = {
        "name": "test",
        "model.size": "3k",
        "model.context_length": 16,
        "data.corpus": "synthetic",
        "data.synthetic.num_bytes": 30_000,
        "data.synthetic.document_bytes": 500,
        "data.tokenizer.kind": "byte",
        "data.cache_dir": str(cache_dir),
        "duration.steps": 6,
        "train.batch_size": 8,
        "train.log_every_steps": 1,
        "evaluation.tokens": 256,
        "tracking.wandb": "disabled",
        "runtime.num_devices": 1,
        "runtime.compilation_cache_dir": os.environ[
            "JAX_COMPILATION_CACHE_DIR"],
    }
    changes = changes or {}
    if any(key.startswith("duration.") for key in changes):
      del values["duration.steps"]
    if "model.d_model" in changes:
      del values["model.size"]
    config_lib.override(config, values | changes)
    return config_lib.resolve(config)
  return make
