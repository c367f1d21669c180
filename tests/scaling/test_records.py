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


def test_what_a_run_has_cost(tmp_path, write_run, paid):
  write_run(tmp_path / "new", 1000, 10000, 3.0, **paid)
  write_run(tmp_path / "old", 1000, 10000, 3.0)
  frame = scaling.load(tmp_path).set_index("run_id")
  for name, value in paid.items():
    assert frame[name]["new"] == value, name
  old = frame.loc["old"]
  for name in ("wall_seconds", "lost_seconds", "occupied_device_seconds",
               "price_usd", "pue", "goodput", "peak_flops_per_second"):
    assert math.isnan(old[name]) and frame[name].dtype == "float64"
  for name in ("hardware", "region", "price_source", "peak_source"):
    assert old[name] is None


@pytest.mark.parametrize("name, value, problem", [
    ("price_usd", -0.01, "at least 0, or null, not -0.01"),
    ("energy_kwh", math.inf, "finite"), ("co2e_kg", math.nan, "finite"),
    ("pue", 0.9, "at least 1, or null, not 0.9"),
    ("lost_seconds", -1, "at least 0"), ("wall_seconds", "3", "a number"),
    ("occupied_device_seconds", -1, "at least 0"), ("region", 3, "text")])
def test_what_no_run_can_have_cost(tmp_path, write_run, name, value, problem):
  write_run(tmp_path / "run", 1000, 10000, 3.0, **{name: value})
  with pytest.raises(scaling.RecordError, match=problem) as error:
    scaling.load(tmp_path)
  assert str(tmp_path / "run" / "result.json") in str(error.value)
  assert repr(name) in str(error.value)


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


# --- Shape of the model ------------------------------------------------------


def test_the_shape_of_the_model_comes_from_its_config(tmp_path, write_run):
  directory = write_run(tmp_path / "run", 1000, 10000, 3.0)
  (directory / "config.json").write_text(json.dumps(
      {"model": {"d_model": 64, "num_layers": 3},
       "optimizer": {"learning_rate": 2e-3}}))
  frame = scaling.load(tmp_path)
  assert frame[["d_model", "num_layers", "learning_rate"]].values.tolist() == [
      [64, 3, 2e-3]]
  assert frame["d_model"].dtype == "float64"
  assert frame["schedule"].tolist() == [None]


def test_a_shape_that_is_not_known(tmp_path, write_run):
  write_run(tmp_path / "a", 1000, 10000, 3.0)  # its config is empty
  (write_run(tmp_path / "b", 1000, 10000, 3.0) / "config.json").unlink()
  assert scaling.load(tmp_path)["num_layers"].isna().all()


@pytest.mark.parametrize("text, problem", [
    ('{"model": {"d_model": "64"}}', "'model.d_model' must be a number"),
    ('{"model": {"num_layers": true}}', "'model.num_layers' must be a number"),
    ('{"model": 3}', "'model' must be an object"),
    ('{"optimizer": {"schedule": 1}}', "'optimizer.schedule' must be text"),
    ('{"model": ', "not valid JSON"), ("[]", "must be a JSON object")])
def test_a_bad_config_names_its_file(tmp_path, write_run, text, problem):
  path = write_run(tmp_path / "run", 1000, 10000, 3.0) / "config.json"
  path.write_text(text)
  with pytest.raises(scaling.RecordError, match=problem) as error:
    scaling.load(tmp_path)
  assert str(path) in str(error.value)


# --- Tables of others --------------------------------------------------------

_ROWS = [{"name": "a", "params": 1e6, "loss": 3.25},
         {"name": "b", "params": 2e6, "loss": 3.125}]


@pytest.mark.parametrize("ending, text", [
    (".csv", "name,params,loss\na,1e6,3.25\nb,2000000,3.125\n"),
    (".csv", "\ufeffname, params, loss\r\na, 1e6, 3.25\r\nb, 2e6, 3.125\r\n"),
    (".CSV", ',name,params,loss\n0,a,1e6,3.25\n\n1,"b",2e6,3.125\n'),
    (".tsv", "name\tparams\tloss\na\t1e6\t3.25\nb\t2e6\t3.125"),
    (".json", json.dumps(_ROWS)),
    (".json", '{"name": ["a", "b"], "params": [1e6, 2e6], '
     '"loss": [3.25, 3.125]}'),
    (".json", pd.DataFrame(_ROWS).to_json()),
    (".jsonl", "".join(json.dumps(row) + "\n\n" for row in _ROWS)),
])
def test_a_table_of_runs_trained_elsewhere(tmp_path, ending, text):
  path = tmp_path / f"runs{ending}"
  path.write_bytes(text.encode())
  frame = records.load_table(path)
  assert frame.to_dict("records") == _ROWS


def test_a_parquet_table(tmp_path):
  pytest.importorskip("pyarrow", reason="reading parquet needs pyarrow")
  pd.DataFrame(_ROWS).to_parquet(tmp_path / "runs.parquet")
  frame = records.load_table(tmp_path / "runs.parquet")
  assert frame.to_dict("records") == _ROWS


@pytest.mark.parametrize("name, text, problem", [
    ("runs.xlsx", "x", r"unknown ending '.xlsx'; known: .csv, .tsv, .json, "),
    ("runs", "x", "unknown ending ''"),
    ("runs.csv", "", "is empty"),
    ("runs.csv", "\n\n", "no two columns"),
    ("runs.csv", "params,loss\n", "holds no rows"),
    ("runs.json", "[]", "holds no rows"),
    ("runs.jsonl", "\n", "holds no rows"),
    ("runs.csv", "params;loss\n1;2\n", "no two columns separated by ','; its "
     "first line is 'params;loss'"),
    ("runs.csv", "loss,params, loss\n1,2,3\n", "columns of one name: loss"),
    ("runs.csv", "params,loss\n1,2\n\n1,2,3\n", "line 4 has 3 values under 2 "),
    ("runs.csv", "params,loss\n1,2\n1\n", "line 3 has 1 values under 2"),
    ("runs.csv", "params,l\xf6ss\n1,2\n", "cannot be read"),
    ("runs.json", '{"params": 1}', "cannot be read"),
    ("runs.json", '[{"params": 1}, 2]', "must be a list of objects"),
    ("runs.json", "[{", "cannot be read"),
    ("runs.jsonl", '{"params": 1}\n{"par\n', "line 2 is not valid JSON"),
    ("runs.jsonl", '{"params": 1}\n3\n', "line 2 is not a JSON object"),
    ("runs.parquet", "PAR1 not so", "cannot be read"),
])
def test_a_table_that_cannot_be_read(tmp_path, name, text, problem):
  (tmp_path / name).write_bytes(text.encode("latin-1"))
  with pytest.raises(scaling.RecordError, match=problem) as error:
    records.load_table(tmp_path / name)
  assert str(tmp_path / name) in str(error.value)


def test_no_such_table(tmp_path):
  with pytest.raises(FileNotFoundError, match="no file .*nowhere.csv"):
    records.load_table(tmp_path / "nowhere.csv")
  with pytest.raises(FileNotFoundError, match="it is a directory"):
    records.load_table(tmp_path)
