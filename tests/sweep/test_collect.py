# SPDX-License-Identifier: Apache-2.0
"""One table of all runs, and what a directory can do without."""

import json
import os
import pathlib
import shutil
from typing import Any

import ml_collections
import pandas as pd
import pyarrow as pa
from pyarrow import parquet
import pytest

from tfjax import config as config_lib
from tfjax import scaling
from tfjax import sweep
from tfjax.sweep import cleaning
from tfjax.sweep import collect
from tfjax.train import claim
from tfjax.train import records


def write_run(workdir: pathlib.Path, spec: sweep.RunSpec,
              **result: Any) -> pathlib.Path:
  """A run as it lies there once begun, and ended if a result is given."""
  run_dir = workdir / spec.run_id
  run_dir.mkdir(parents=True)
  records.write_json(run_dir / "config.json", config_lib.to_dict(spec.config))
  if result:
    records.write_result(run_dir, dict(
        run_id=spec.run_id, config_hash=config_lib.config_hash(spec.config),
        **result))
  return run_dir


@pytest.fixture(name="specs")
def specs_fixture(base: ml_collections.ConfigDict) -> list[sweep.RunSpec]:
  return sweep.plan(base, sweep.product(
      sweep.axis("seed", [0, 1]), sweep.axis("duration.steps", [10, 20])))


@pytest.fixture(name="workdir")
def workdir_fixture(tmp_path: pathlib.Path,
                    specs: list[sweep.RunSpec]) -> pathlib.Path:
  """A complete run, one that failed, one that was killed, one not begun."""
  workdir = tmp_path / "sweep"
  workdir.mkdir()
  sweep.ledger.write_plan(workdir, "first", specs[:2])
  sweep.ledger.write_plan(workdir, "sweep", specs)
  write_run(workdir, specs[0], status="complete", loss=2.5, steps=10,
            params_total=2**53 + 1, flops_by_component={"head": 1.5, "x": 2},
            epochs=1, of_later=[1, "a"])
  write_run(workdir, specs[1], status="failed", status_reason='a "bad", one\n2',
            loss=None, steps=3)
  write_run(workdir, specs[2])
  return workdir


# --- Collect -----------------------------------------------------------------


def test_whole_numbers_stay_whole_beside_nulls(
    workdir: pathlib.Path, specs: list[sweep.RunSpec]) -> None:
  path = workdir / "runs.parquet"
  collect.write(collect.table(workdir), path)
  read = parquet.read_table(path)
  assert read["run_id"].to_pylist() == [spec.run_id for spec in specs]
  assert read["status"].to_pylist() == [
      "complete", "failed", "interrupted", "pending"]
  for name, kind, values in [
      ("params_total", pa.int64(), [2**53 + 1, None, None, None]),
      ("steps", pa.int64(), [10, 3, None, None]),
      ("loss", pa.float64(), [2.5, None, None, None]),
      ("epochs", pa.float64(), [1.0, None, None, None]),
      ("mfu", pa.float64(), [None] * 4),
      ("flops_by_component.head", pa.float64(), [1.5, None, None, None]),
      ("of_later", pa.string(), ['[1, "a"]', None, None, None]),
      ("overrides.seed", pa.int64(), [0, 0, 1, 1]),
      ("overrides.duration.steps", pa.int64(), [10, 20, 10, 20]),
      ("config.seed", pa.int64(), [0, 0, 1, None]),
      ("config.model.scan_layers", pa.bool_(), [False] * 3 + [None]),
      ("config.optimizer.learning_rate", pa.float64(), [1e-3] * 3 + [None]),
      ("config.model.rotary_base_local", pa.float64(), [None] * 4),
      ("config.data.files", pa.string(), ["[]"] * 3 + [None])]:
    assert (read.schema.field(name).type, read[name].to_pylist()) == (
        kind, values), name


def test_a_csv_says_the_same(workdir: pathlib.Path) -> None:
  collect.write(collect.table(workdir), workdir / "runs.csv")
  frame = pd.read_csv(workdir / "runs.csv", dtype=str, keep_default_na=False)
  assert list(frame["params_total"]) == [str(2**53 + 1), "", "", ""]
  assert frame["status_reason"][1] == 'a "bad", one\n2'
  assert list(frame["loss"]) == ["2.5", "", "", ""]
  # What fits are made of reads it, too.
  assert list(scaling.load_table(workdir / "runs.csv")["loss"].dropna()) == [
      2.5]


def test_values_of_another_version_are_not_bent(workdir: pathlib.Path,
                                                specs: list[sweep.RunSpec]
                                                ) -> None:
  run_dir = workdir / specs[1].run_id
  result = json.loads((run_dir / "result.json").read_text())
  records.write_result(run_dir, result | dict(params_total=1.5))
  frame = collect.table(workdir)
  assert frame["params_total"].to_pylist() == [
      str(2**53 + 1), "1.5", None, None]


def test_some_runs_and_runs_of_no_plan(workdir: pathlib.Path,
                                       specs: list[sweep.RunSpec]) -> None:
  some = [specs[2].run_id, specs[0].run_id]
  assert collect.table(workdir, some)["run_id"].to_pylist() == some
  (workdir / "sweep.json").unlink()
  assert set(collect.table(workdir)["run_id"].to_pylist()) == {
      spec.run_id for spec in specs[:3]}
  with pytest.raises(collect.CollectError, match="no runs in"):
    collect.table(workdir / "elsewhere")


def test_what_cannot_be_collected_is_named(
    workdir: pathlib.Path, specs: list[sweep.RunSpec]) -> None:
  with pytest.raises(collect.CollectError, match="'.xlsx' is not known"):
    collect.write(collect.table(workdir), workdir / "runs.xlsx")
  (workdir / "file").touch()
  with pytest.raises(collect.CollectError, match="cannot be written"):
    collect.write(collect.table(workdir), workdir / "file" / "runs.csv")
  (workdir / specs[0].run_id / "config.json").write_text('{"model": ')
  with pytest.raises(collect.CollectError, match=specs[0].run_id):
    collect.table(workdir)


def test_a_failed_write_leaves_the_old_table(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = workdir / "runs.csv"
  path.write_text("old")

  def fail(frame: pa.Table, temporary: pathlib.Path) -> None:
    del frame
    temporary.write_text("half of")
    raise OSError("no space left")
  monkeypatch.setitem(collect._WRITERS, ".csv", fail)
  with pytest.raises(collect.CollectError, match="no space left"):
    collect.write(collect.table(workdir), path)
  assert path.read_text() == "old"
  assert not list(workdir.glob(".runs*"))


# --- Clean -------------------------------------------------------------------


def save(run_dir: pathlib.Path, *names: str) -> None:
  """Checkpoints of 100 bytes, by their names."""
  for name in names:
    path = run_dir / "checkpoints" / name
    path.mkdir(parents=True)
    (path / "state").write_bytes(bytes(100))


def found(workdir: pathlib.Path) -> dict[str, int]:
  """What could be removed: bytes by path."""
  return {str(one.path.relative_to(workdir)): one.num_bytes
          for one in cleaning.find(workdir)}


def test_only_what_nothing_needs_is_removed(
    workdir: pathlib.Path, specs: list[sweep.RunSpec]) -> None:
  complete, failed, killed = (workdir / spec.run_id for spec in specs[:3])
  save(complete, "10", "20", "damaged")
  save(failed, "10")
  save(killed, "10", "20.orbax-checkpoint-tmp-1")
  (killed / ".metrics.jsonl.77").write_bytes(bytes(7))
  (killed / ".MODEL_CARD.md.77").write_bytes(bytes(3))
  (killed / ".claim").mkdir()
  (workdir / ".sweep.json.78").write_bytes(bytes(8))
  old = workdir / ".runs.parquet.79"
  old.write_bytes(bytes(9))
  os.utime(old, (1e9, 1e9))
  expected = {
      f"{complete.name}/checkpoints": 300,
      f"{killed.name}/checkpoints/20.orbax-checkpoint-tmp-1": 100,
      f"{killed.name}/.metrics.jsonl.77": 7,
      f"{killed.name}/.MODEL_CARD.md.77": 3, ".runs.parquet.79": 9}
  assert found(workdir) == expected
  with claim.directory(killed):  # somebody has taken it up
    assert len(found(workdir)) == 2
    gone = cleaning.remove(cleaning.find(workdir))
  assert [one.num_bytes for one in gone] == [300, 9]
  assert found(workdir) == {name: size for name, size in expected.items()
                            if killed.name in name}
  cleaning.remove(cleaning.find(workdir))
  assert found(workdir) == {}
  assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == [
      "10"]
  assert (failed / "checkpoints" / "10" / "state").exists()
  assert (complete / "result.json").exists()
  assert not (complete / "checkpoints").exists()


def test_a_run_that_was_taken_up_since_keeps_its_checkpoints(
    workdir: pathlib.Path, specs: list[sweep.RunSpec]) -> None:
  run_dir = workdir / specs[0].run_id
  save(run_dir, "10")
  one = cleaning.find(workdir)
  (run_dir / "result.json").unlink()
  assert len(one) == 1 and cleaning.remove(one) == []
  assert (run_dir / "checkpoints" / "10").exists()


def test_a_clean_that_was_killed_is_gone_on_with(
    workdir: pathlib.Path, specs: list[sweep.RunSpec]) -> None:
  run_dir = workdir / specs[0].run_id
  save(run_dir, "10")
  (run_dir / "checkpoints").rename(run_dir / ".checkpoints.deleted")
  assert found(workdir) == {f"{run_dir.name}/.checkpoints.deleted": 100}
  cleaning.remove(cleaning.find(workdir))
  assert found(workdir) == {}


def test_what_others_begin_with_stays(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  config_lib.override(base, {
      "optimizer.schedule": "wsd", "sweep.share_trunk": True})
  workdir = tmp_path / "sweep"
  workdir.mkdir()
  alone = sweep.plan(base, [{"seed": 1, "duration.steps": 20}])
  specs = sweep.plan(base, [
      *sweep.axis("duration.steps", [20, 10]),
      {"seed": 2, "init_from": str(workdir / alone[0].run_id)}])
  sweep.ledger.write_plan(workdir, "sweep", [*specs, *alone])
  trunk, branch, begun = (workdir / spec.run_id for spec in specs)
  for spec in (specs[0], alone[0]):
    save(write_run(workdir, spec, status="complete", steps=20), "8", "20")
  other = workdir / alone[0].run_id
  assert found(workdir) == {}
  write_run(workdir, specs[1], status="failed")
  assert found(workdir) == {}  # may be tried again
  shutil.rmtree(branch)
  write_run(workdir, specs[1], status="complete")
  assert list(found(workdir)) == [f"{trunk.name}/checkpoints"]
  write_run(workdir, specs[2], status="diverged")
  assert begun.exists() and set(found(workdir)) == {
      f"{trunk.name}/checkpoints", f"{other.name}/checkpoints"}
