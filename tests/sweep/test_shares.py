# SPDX-License-Identifier: Apache-2.0
"""What of the machine each worker gets, and that it follows from the whole
sweep."""

import pathlib
from typing import Any, Sequence

import ml_collections
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import shares
from tfjax.train import tuning

class Told:
  """A launcher that notes of how many runs the whole sweep is."""

  seen: list[int] = []

  def __init__(self, *_: Any):
    self.outcomes, self.stopping = {}, False

  def run(self, specs: Sequence[sweep.RunSpec], workers: int | None,
          num_runs: int) -> None:
    del specs, workers
    self.seen.append(num_runs)


@pytest.mark.parametrize("gpus, workers, runs, mesh, expected", [
    # As many as the mesh needs: with more the run would be refused.
    (8, None, 3, {"mesh.data": 1}, ["0", "1", "2"]),
    (8, None, 3, {"mesh.data": 2}, ["0,1", "2,3", "4,5"]),
    (8, 1, 3, {"mesh.data": 1, "mesh.fsdp": 2}, ["0,1"]),
    (2, None, 3, {"mesh.data": 2}, [None]),
    # Where the number is the run's own, it takes its first ones.
    (8, None, 3, {"mesh.data": 1, "runtime.num_devices": 1},
     ["0,1", "2,3", "4,5"]),
    # And where the mesh takes all there are, it gets them.
    (8, None, 3, {}, ["0,1", "2,3", "4,5"])])
def test_a_share_is_what_the_mesh_needs(
    base: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch,
    gpus: int, workers: int | None, runs: int, mesh: dict[str, int],
    expected: list[str | None]) -> None:
  monkeypatch.setattr(tuning, "has_accelerator", lambda: True)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
  config_lib.override(base, mesh)
  config = config_lib.resolve(base)
  found = shares.of([config] * runs, workers, runs)
  assert [share.environment.get("CUDA_VISIBLE_DEVICES")
          for share in found] == expected


def test_a_part_of_a_sweep_gets_the_shares_of_the_whole(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sweep.LAUNCHERS, "told", f"{__name__}:Told")
  specs = sweep.plan(base, sweep.axis("seed", range(6)))

  def num_runs(some: Sequence[sweep.RunSpec], **given: Any) -> int:
    sweep.launch(some, tmp_path, launcher="told", **given)
    return Told.seen.pop()
  assert num_runs(specs[:4], sweep="few") == 4
  assert num_runs(specs, sweep="all") == 6
  # As of a retry, and of one of several sweeps that are launched together.
  assert num_runs(specs[1:2], planned=True) == 6
  assert num_runs(specs[:4], sweep="few", planned=True) == 6
