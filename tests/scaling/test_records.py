# SPDX-License-Identifier: Apache-2.0
"""Run directories become tables, or errors that name the file."""

import json
import math

import pandas as pd
import pytest

from tfjax import scaling
from tfjax.scaling import records


def test_one_row_a_run_with_what_the_record_holds(write_ledger):
  frame = scaling.load(write_ledger(sizes=(1000, 2000), tokens=(10000,)))
  assert list(frame["run_id"]) == ["n1000-d10000", "n2000-d10000"]
  assert list(frame["params_total"]) == [1000, 2000]
  assert frame["flops_matmul"].tolist() == [6e7, 1.2e8]
  assert frame["packages"][0] == {"jax": "0.10.0"}


def test_unknown_stays_unknown(write_ledger):
  frame = scaling.load(write_ledger(
      sizes=(1000,), tokens=(10000,), tokenizer=None))
  assert math.isnan(frame["mfu"][0])
  assert frame["tokenizer"][0] is None
  assert frame["mfu"].dtype == "float64"


def test_runs_at_any_depth_and_never_in_checkpoints(tmp_path, write_run):
  write_run(tmp_path / "a" / "b" / "run", 1000, 10000, 3.0)
  write_run(tmp_path / "a" / "checkpoints" / "run", 1000, 10000, 3.0)
  assert list(scaling.load(tmp_path)["directory"]) == [
      str(tmp_path / "a" / "b" / "run")]


def test_a_directory_without_results_is_an_empty_table(tmp_path):
  frame = scaling.load(tmp_path)
  assert not len(frame)
  assert "params_total" in frame


def test_missing_directory(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    scaling.load(tmp_path / "nowhere")


@pytest.mark.parametrize("text, problem", [
    ('{"run_id": "a", "sta', "not valid JSON"),
    ("[1]", "must be a JSON object"),
    ('{"status": "complete"}', "has no 'run_id'"),
    ('{"run_id": "a", "status": "done"}', "'status' must be one of"),
    ('{"run_id": "a", "status": "complete", "loss": "3"}', "'loss' must be a"),
    ('{"run_id": "a", "status": "complete", "loss": true}', "'loss' must be a"),
    ('{"run_id": "a", "status": "complete", "corpus": 3}', "'corpus' must be"),
])
def test_a_bad_result_names_its_file_and_key(tmp_path, text, problem):
  (tmp_path / "run").mkdir()
  path = tmp_path / "run" / "result.json"
  path.write_text(text)
  with pytest.raises(scaling.RecordError, match=problem) as error:
    scaling.load(tmp_path)
  assert str(path) in str(error.value)


def test_begun_runs_are_listed(tmp_path, write_run):
  write_run(tmp_path / "finished", 1000, 10000, 3.0)
  (tmp_path / "begun").mkdir()
  (tmp_path / "begun" / "config.json").write_text("{}")
  assert records.unfinished(tmp_path) == [tmp_path / "begun"]


def test_curves(tmp_path, write_run):
  rows = records.curves(write_run(tmp_path / "run", 1000, 60000, 3.0))
  assert (rows["kind"] == "train").sum() == 60
  assert rows["loss"].iloc[-1] == 3.0
  assert rows["tokens"].iloc[-1] == 60000


@pytest.mark.parametrize("tail", [b'{"kind": "tr', b'{"kind": "\xc3'])
def test_a_half_written_last_line_is_left_out(tmp_path, write_run, tail):
  directory = write_run(tmp_path / "run", 1000, 60000, 3.0)
  whole = records.curves(directory)
  with open(directory / "metrics.jsonl", "ab") as file:
    file.write(tail)
  pd.testing.assert_frame_equal(records.curves(directory), whole)


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
  row = {"kind": "train", "step": 1, "tokens": 8, "flops": 64, "loss": 5.0}
  (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
  assert records.curves(tmp_path)["loss"].tolist() == [5.0]


@pytest.mark.parametrize("text, line", [
    ('{"loss": 1}\n{"lo\n{"loss": 2}\n', "line 2"),
    ('{"loss": 1}\n{"lo\n', "line 2"),
    ('3\n{"loss": 1}\n', "line 1"),
])
def test_any_other_broken_line_is_an_error(tmp_path, text, line):
  (tmp_path / "metrics.jsonl").write_text(text)
  with pytest.raises(scaling.RecordError, match=line):
    records.curves(tmp_path)


def test_no_metrics_is_no_curve(tmp_path):
  assert not len(records.curves(tmp_path))
