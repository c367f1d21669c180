# SPDX-License-Identifier: Apache-2.0
"""What of this machine each worker process gets: cores, and GPUs.

Nothing here starts JAX: accelerators and their memory are the workers'.
"""

import dataclasses
import os
import pathlib
from typing import Mapping, Sequence

from tfjax import config as config_lib
from tfjax.cost import cores as cores_lib
from tfjax.train import tuning

# How each vendor's runtime is told which GPUs are a process's, and the files
# by which they are counted where nobody has told this one.
_VARIABLES = {"CUDA_VISIBLE_DEVICES": ("/dev", "nvidia[0-9]*"),
              "ROCR_VISIBLE_DEVICES": ("/dev/dri", "renderD[0-9]*")}
# Of a GPU's memory, what several workers on it take together; JAX would give
# each of them three quarters.
_MEMORY = 0.9
_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Share:
  """One worker's: its cores, and what its environment says of devices."""

  cores: tuple[int, ...]
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def of(configs: Sequence[config_lib.ExperimentConfig], workers: int | None,
       num_runs: int) -> list[Share]:
  """A share a worker.

  They follow from `num_runs`, of the whole sweep, and not from what is left of
  it: on more or fewer cores a run that is resumed would end with other bits.

  Args:
    configs: of what is to be run.
    workers: how many are wanted; unset: one a core, or, where there are
      accelerators, as many as have the devices that a run needs.
  """
  cores = cores_lib.usable()
  variable, gpus = _gpus() if tuning.has_accelerator() else (None, [])
  needed = max(config.runtime.num_devices or config.mesh.num_devices
               for config in configs)
  if workers is None:
    workers = len(cores)
    if tuning.has_accelerator():
      workers = max(1, len(gpus) // needed)
  workers = min(workers, num_runs)
  size = max(1, len(cores) // workers)
  count = min(workers, len(configs))
  most = len(gpus)
  # Such a run is refused where others of its GPUs would stand idle.
  if any(config.mesh.data is not None and config.runtime.num_devices is None
         for config in configs):
    most = min(most, needed)
  environments = _environments(variable, gpus, workers, most)
  return [Share(tuple(cores[(index * size + place) % len(cores)]
                      for place in range(size)), environments[index])
          for index in range(count)]


def _environments(variable: str | None, gpus: Sequence[str], workers: int,
                  most: int) -> list[dict[str, str]]:
  """Of each worker; `most`: GPUs that it has a use for."""
  size = min(len(gpus) // workers, most)
  if not gpus or size == len(gpus):
    return [{} for _ in range(workers)]
  found = [{variable: ",".join(
      gpus[index * size:(index + 1) * size] if size
      else [gpus[index % len(gpus)]])} for index in range(workers)]
  if not size and _FRACTION not in os.environ:
    fraction = _MEMORY / -(-workers // len(gpus))
    for environment in found:
      environment[_FRACTION] = f"{fraction:.3f}"
  return found


def _gpus() -> tuple[str | None, list[str]]:
  """The variable that names GPUs, and those that are ours."""
  for variable in _VARIABLES:
    if variable in os.environ:
      return variable, [name for name in os.environ[variable].split(",")
                        if name not in ("", "-1")]
  for variable, (directory, pattern) in _VARIABLES.items():
    if count := len(list(pathlib.Path(directory).glob(pattern))):
      return variable, [str(index) for index in range(count)]
  return None, []
