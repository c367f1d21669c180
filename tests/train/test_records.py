# SPDX-License-Identifier: Apache-2.0
"""A run's files: whole or not there, strict JSON, cut back on resume."""

import json
import math
import os
import pathlib
from typing import Any

import pytest

from tfjax.train import records


def strict(text: str) -> Any:
  def refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
  return json.loads(text, parse_constant=refuse)


def row(step: int, **fields) -> dict[str, Any]:
  return {"kind": "train", "step": step, "loss": 1.0 / step, **fields}


def test_a_record_goes_out_and_comes_back(tmp_path: pathlib.Path) -> None:
  assert records.read_result(tmp_path) is None
  record = {"run_id": "r", "status": "complete", "loss": 0.1 + 0.2,
            "mfu": float("nan"), "parts": [math.inf, {"deep": -math.inf}],
            "steps": 3}
  records.write_result(tmp_path / "new", record)
  path = tmp_path / "new" / "result.json"
  assert strict(path.read_text()) == records.read_result(path.parent) == {
      "run_id": "r", "status": "complete", "loss": 0.1 + 0.2, "mfu": None,
      "parts": [None, {"deep": None}], "steps": 3}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "r"}', "\0\0"])
def test_a_damaged_record_is_named_with_the_remedy(
    text: str, tmp_path: pathlib.Path) -> None:
  (tmp_path / "result.json").write_text(text)
  with pytest.raises(records.RecordError,
                     match="result.json is damaged.*delete it"):
    records.read_result(tmp_path)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = tmp_path / "result.json"
  records.write_json(path, {"loss": 1})
  with pytest.raises(TypeError):
    records.write_json(path, {"loss": 2, "bad": object()})
  assert json.loads(path.read_text()) == {"loss": 1}

  def crash(*_):
    raise OSError("power cut")
  monkeypatch.setattr(os, "replace", crash)
  with pytest.raises(OSError, match="power cut"):
    records.write_json(path, {"loss": 3})
  assert json.loads(path.read_text()) == {"loss": 1}


def test_the_file_is_on_disk_before_it_gets_its_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  calls = []
  fsync, replace = os.fsync, os.replace
  monkeypatch.setattr(os, "fsync", lambda n: (calls.append("fsync"), fsync(n)))
  monkeypatch.setattr(os, "replace", lambda a, b: (
      calls.append("replace"), replace(a, b)))
  records.write_json(tmp_path / "a.json", {})
  assert calls == ["fsync", "replace"]


def test_rows_are_cut_back_to_the_checkpoint(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  file = records.MetricsFile(path, 0)
  for step in range(1, 6):
    file.write(row(step, rate=math.nan if step == 2 else 0.1))
  file.write({"kind": "evaluation", "step": 3, "loss": 2.0})
  file.close()
  kept = records.MetricsFile(path, 3)
  kept.write(row(4, again=True))
  kept.close()
  got = [strict(line) for line in path.read_text().splitlines()]
  assert got == [row(1, rate=0.1), row(2, rate=None), row(3, rate=0.1),
                 {"kind": "evaluation", "step": 3, "loss": 2.0},
                 row(4, again=True)]
  assert got == records.read_metrics(path)
  assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_some_later_rows_are_kept_by_name(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  event = {"kind": "rollback", "step": 4, "to_step": 2, "reason": "nan"}
  lost = {"kind": "rollback", "step": 5, "to_step": 2, "reason": "nan"}
  file = records.MetricsFile(path, 0)
  for one in (row(1), row(2), row(3), event, row(3), lost):
    file.write(one)
  file.cut(2, [event])
  file.write(row(3, again=True))
  file.close()
  assert records.read_metrics(path) == [
      row(1), row(2), event, row(3, again=True)]


def test_a_full_disk_is_told_and_nothing_is_tried_twice(
    tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  file = records.MetricsFile(path, 0)
  file.write(row(1))
  file.close()
  file._file = open("/dev/full", "ab", buffering=0)
  with pytest.raises(records.WriteError, match=r"metrics.jsonl cannot be "
                     r"written \(\[Errno 28\] No space left .* make room"):
    file.write(row(2))
  file.close()
  assert records.read_metrics(path) == [row(1)]
  gone = tmp_path / "gone"
  with pytest.raises(records.WriteError, match="cannot be written"):
    records.MetricsFile(gone / "metrics.jsonl", 0)
  with pytest.raises(records.WriteError, match="cannot be written"):
    records.write_json(gone / "a.json", {})


def test_a_row_that_is_taken_in_pieces_is_whole(
    tmp_path: pathlib.Path) -> None:
  class Slow:
    taken = b""

    def write(self, data: bytes) -> int:
      self.taken += data[:7]
      return len(data[:7])

    def close(self) -> None:
      pass
  file = records.MetricsFile(tmp_path / "metrics.jsonl", 0)
  file.close()
  file._file = Slow()
  file.write(row(1))
  assert json.loads(file._file.taken) == row(1)


@pytest.mark.parametrize("broken", ['{"kind": "train", "st', '{"step": 3}',
                                    "\0\0\0"])
def test_a_half_written_last_row_is_dropped(
    broken: str, tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  whole = "".join(json.dumps(row(step)) + "\n" for step in (1, 2))
  path.write_text(whole + broken)
  assert records.read_metrics(path) == [row(1), row(2)]
  file = records.MetricsFile(path, 2)
  file.write(row(3))
  file.close()
  assert path.read_text() == whole + json.dumps(row(3)) + "\n"


@pytest.mark.parametrize("broken", [b"garb{age", b"\xff\xfe", b"[1]", b"7",
                                    b'{"kind": "train"}'])
def test_a_damaged_row_is_named_with_the_remedy(
    broken: bytes, tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  first, last = (json.dumps(row(step)).encode() for step in (1, 3))
  path.write_bytes(b"\n".join([first, broken, last, b""]))
  with pytest.raises(records.RecordError,
                     match="metrics.jsonl is damaged in line 2 .*delete that"):
    records.read_metrics(path)


def test_a_row_is_on_file_at_once(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  file = records.MetricsFile(path, 0)
  file.write(row(1))
  assert records.read_metrics(path) == [row(1)]
  file.sync()
  file.close()


def test_a_run_id_tells_what_it_is(make_config) -> None:
  config = make_config()
  name, _, digits = records.run_id(config).rpartition("-")
  assert name == "gpt2-3k-6-steps" and len(digits) == 12
  other = records.run_id(make_config({"seed": 1}))
  assert other != records.run_id(config)
  assert records.run_id(make_config({"tracking.project": "else"})) == (
      records.run_id(config))
  flops = records.run_id(make_config({"duration.flops": 1e15}))
  assert flops.startswith("gpt2-3k-1e15-flops-")
  assert not set(flops) & set("+/ ")


def test_provenance_names_what_ran() -> None:
  got = records.provenance()
  assert got["packages"]["jax"] and got["packages"]["tfjax"]
  assert set(got) == {"code_version", "packages", "python_version", "host_cpu"}
