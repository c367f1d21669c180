# SPDX-License-Identifier: Apache-2.0
"""A run from config to record: how it ends, resumes and is refused."""

import json
import math
import os
import pathlib
import signal
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tfjax import config as config_lib
from tfjax import train
from tfjax.data import store as store_lib
from tfjax.train import evaluation
from tfjax.train import loop
from tfjax.train import records
from tfjax.train import step as step_lib

TIMINGS = ("seconds", "tokens_per_second")
# What result.json promises to hold, known or null.
FIELDS = """
    run_id sweep status status_reason family objective seed params_total
    params_embedding params_non_embedding params_active tokens_seen
    unique_tokens epochs steps batch_tokens flops_total flops_matmul
    flops_attention flops_head flops_recompute flops_convention loss
    loss_stderr bits_per_byte tokenizer bytes_per_token device_kind
    device_count device_seconds tokens_per_second mfu energy_kwh
    energy_source co2e_kg co2e_source config_hash code_version packages
    """.split()


def rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  """The metrics of a run, timings apart."""
  return [{k: v for k, v in row.items() if k not in TIMINGS}
          for row in records.read_metrics(run_dir / "metrics.jsonl")]


def final_parameters(run_dir: pathlib.Path) -> list[np.ndarray]:
  with ocp.CheckpointManager(run_dir / "checkpoints") as manager:
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(
        state=ocp.args.StandardRestore()))
  return [np.asarray(x) for x in jax.tree.leaves(restored.state)]


def strict(path: pathlib.Path) -> dict[str, Any]:
  def refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
  return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def test_a_run_leaves_its_whole_record(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"train.log_every_steps": 4,
                        "evaluation.every_steps": 3})
  seen = []
  record = train.run(config, tmp_path, sweep="grid", on_row=seen.append)
  run_dir = tmp_path / record.run_id
  result = strict(run_dir / "result.json")
  assert set(FIELDS) <= set(result)
  assert train.RunRecord(**result) == record
  assert records.read_metrics(run_dir / "metrics.jsonl") == seen
  assert config_lib.from_dict(strict(run_dir / "config.json")) == config
  # By hand: 7680 parameters and 46,176 FLOPs a token, see the budget's test.
  assert (record.status, record.status_reason, record.sweep) == (
      "complete", None, "grid")
  assert (record.steps, record.batch_tokens, record.tokens_seen) == (
      6, 128, 768)
  assert (record.params_total, record.params_embedding) == (7680, 4368)
  assert record.flops_total == 768 * 46_176
  assert record.flops_total == (record.flops_matmul + record.flops_attention +
                                record.flops_head)
  windows = (store_lib.build(config.data).train_tokens - 1) // 16
  assert record.epochs == pytest.approx(768 / (16 * windows))
  assert record.unique_tokens == 768
  assert (record.device_kind, record.device_count) == ("cpu", 1)
  assert record.mfu is None and record.energy_kwh is None
  assert record.loss_stderr > 0
  assert record.tokens_per_second == pytest.approx(
      768 / record.device_seconds)
  assert record.bits_per_byte * record.bytes_per_token == pytest.approx(
      record.loss / math.log(2), rel=0.05)  # bytes of the other split
  # The first, every fourth and the last step; evaluations at 3 and 6.
  assert [(row["kind"][0], row["step"]) for row in seen] == [
      ("t", 1), ("e", 3), ("t", 4), ("t", 6), ("e", 6)]
  assert seen[-1]["loss"] == record.loss and seen[3]["loss"] == (
      record.train_loss)
  assert [row["tokens"] for row in seen] == [128, 384, 512, 768, 768]
  assert seen[0]["flops"] == 128 * 46_176


@pytest.mark.parametrize("changes, predicted, counts, loss_bytes", [
    ({"model.family": "bert"}, 2, "predicted from the others", 1),
    # 16 tokens: 2 of noise in a span, sentinel and end.
    ({"model.family": "t5"}, 4, "their sentinels and the end", None),
    ({"model.family": "bart", "objective.corruption": "infilling"}, 16,
     "masked in the source", None),
    ({"model.family": "llama", "objective.prefix_lm": True}, 9,
     "behind a random prefix", None)], ids=lambda x: str(x)[:24])
def test_every_objective_takes_the_same_step(
    changes: dict[str, Any], predicted: int, counts: str,
    loss_bytes: int | None, make_config, tmp_path: pathlib.Path) -> None:
  record = train.run(make_config(changes), tmp_path)
  assert record.status == "complete"
  assert record.family == changes["model.family"]
  assert counts in record.loss_counts
  assert record.tokens_seen == 6 * 8 * 16
  assert record.tokens_predicted == 6 * 8 * predicted
  assert record.flops_total == pytest.approx(
      record.flops_encoder + record.flops_decoder + record.flops_head)
  assert (record.flops_decoder == 0) == (record.objective == "masked")
  assert record.entropy_rate is None  # it is of the next token
  if loss_bytes:  # every target is a byte, as separators are not masked
    assert record.bits_per_byte == pytest.approx(
        record.loss / math.log(2) / loss_bytes)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exactly_as_many_steps_as_asked(
    steps: int, make_config, tmp_path: pathlib.Path) -> None:
  record = train.run(make_config({"duration.steps": steps}), tmp_path)
  run_dir = tmp_path / record.run_id
  assert record.steps == steps
  assert [r["step"] for r in rows(run_dir) if r["kind"] == "train"] == list(
      range(1, steps + 1))
  (saved,) = [p.name for p in (run_dir / "checkpoints").iterdir()]
  assert saved == str(steps)
  assert records.read_result(run_dir)["tokens_seen"] == steps * 128


def test_one_compilation_a_run_and_none_for_the_next_of_its_kind(
    make_config, tmp_path: pathlib.Path) -> None:
  compiled = []

  def listen(event: str, _: float, **details) -> None:
    if event.endswith("backend_compile_duration"):
      compiled.append(details.get("fun_name", ""))
  jax.monitoring.register_event_duration_secs_listener(listen)
  # A width that no other test has, so that this process has not seen it.
  kind = {"model.d_ff": 56, "evaluation.every_steps": 2}
  try:
    train.run(make_config(kind), tmp_path)
    first = [name for name in compiled if "_train" in name]
    compiled.clear()
    train.run(make_config(kind | {
        "duration.steps": 9, "optimizer.learning_rate": 0.02}), tmp_path)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(first) == 1
  assert not compiled


def test_a_run_does_not_depend_on_the_devices(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  fed: dict[int, list[np.ndarray]] = {}
  put = step_lib.put

  def listen(target, batch):
    fed.setdefault(target.mesh.size, []).append(batch.inputs.tokens)
    return put(target, batch)
  monkeypatch.setattr(step_lib, "put", listen)
  found = {}
  for devices in (1, 2, 8):
    config = make_config({"runtime.num_devices": devices})
    record = train.run(config, tmp_path / str(devices))
    assert record.device_count == devices
    found[devices] = rows(tmp_path / str(devices) / record.run_id)
  for devices in (2, 8):
    assert len(fed[devices]) == len(fed[1])
    for left, right in zip(fed[devices], fed[1]):
      np.testing.assert_array_equal(left, right)
    for row, other in zip(found[1], found[devices]):
      tight = 1e-6 if row["step"] == 1 else 1e-5
      assert other["loss"] == pytest.approx(row["loss"], rel=tight)
      assert (other["step"], other["tokens"]) == (row["step"], row["tokens"])


def test_a_finished_run_is_not_run_again(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  config = make_config()
  record = train.run(config, tmp_path)

  def never(*_):
    raise AssertionError("trained again")
  monkeypatch.setattr(loop, "_Run", never)
  assert train.run(config, tmp_path) == record
  with pytest.raises(ValueError, match="finished run of another config"):
    train.run(make_config({"seed": 9}), tmp_path, run_id=record.run_id)


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"optimizer.learning_rate": 1e30, "duration.steps": 12,
                        "optimizer.warmup_steps": 0})
  record = train.run(config, tmp_path)
  assert record.status == "diverged"
  assert 1 < record.steps < 12
  assert f"step {record.steps} is" in record.status_reason
  assert record.loss is None and record.bits_per_byte is None
  assert record.tokens_seen == record.steps * 128
  run_dir = tmp_path / record.run_id
  assert strict(run_dir / "result.json")["status"] == "diverged"
  last = rows(run_dir)[-1]
  assert (last["step"], last["loss"]) == (record.steps, None)
  assert train.run(config, tmp_path) == record


def test_an_evaluation_that_is_not_finite_is_diverged_too(
    make_config, tmp_path: pathlib.Path) -> None:
  """The last step's loss is of the parameters before its update."""
  record = train.run(make_config({
      "optimizer.learning_rate": 1e30, "duration.steps": 1,
      "optimizer.warmup_steps": 0}), tmp_path)
  assert record.loss is None
  assert record.status == "diverged"
  assert "held-out" in record.status_reason


def test_what_training_raises_is_recorded(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  def fail(*_):
    raise RuntimeError("the disk is on fire")
  config = make_config()
  with monkeypatch.context() as patch:
    patch.setattr(evaluation, "evaluate", fail)
    with pytest.raises(RuntimeError, match="on fire"):
      train.run(config, tmp_path)
  result = strict(tmp_path / records.run_id(config) / "result.json")
  assert result["status"] == "failed"
  assert result["status_reason"] == "RuntimeError: the disk is on fire"
  assert result["config_hash"] == config_lib.config_hash(config)
  assert result["loss"] is None and set(FIELDS) <= set(result)
  assert train.run(config, tmp_path).status == "complete"


def test_a_bad_config_stops_before_any_compute(
    make_config, tmp_path: pathlib.Path) -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    train.run(make_config({"duration.tokens": 10**9}), tmp_path)
  assert error.value.key == "duration.tokens"
  assert "data.max_epochs=" in str(error.value)
  assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize("key", ["train.batch_size", "evaluation.batch_size"])
def test_a_batch_that_does_not_divide_over_the_devices_is_named(
    key: str, make_config, tmp_path: pathlib.Path) -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    train.run(make_config({key: 12, "runtime.num_devices": 8}), tmp_path)
  assert error.value.key == key
  assert "multiple of 8" in str(error.value)


def interrupt(number: signal.Signals, step: int):
  """Sends this process a signal when a step's row is written."""
  def on_row(row: dict[str, Any]) -> None:
    if row["step"] == step:
      os.kill(os.getpid(), number)
  return on_row


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_where_it_stopped(
    number: signal.Signals, make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"duration.steps": 12})
  whole = train.run(config, tmp_path / "whole")
  before = signal.getsignal(number)
  record = train.run(config, tmp_path, on_row=interrupt(number, 5))
  assert signal.getsignal(number) is before
  run_dir = tmp_path / record.run_id
  assert (record.status, record.resumes) == ("interrupted", 0)
  assert 5 <= record.steps <= 7
  assert record.status_reason == f"stopped after step {record.steps} of 12"
  assert record.loss is None
  assert rows(run_dir)[-1]["step"] == record.steps
  assert strict(run_dir / "result.json")["status"] == "interrupted"
  again = train.run(config, tmp_path)
  assert (again.status, again.resumes, again.steps) == ("complete", 1, 12)
  assert again.loss == whole.loss
  assert again.device_seconds > record.device_seconds
  whole_dir = tmp_path / "whole" / whole.run_id
  assert rows(run_dir) == rows(whole_dir)
  for left, right in zip(final_parameters(run_dir),
                         final_parameters(whole_dir), strict=True):
    np.testing.assert_array_equal(left, right)


def test_a_signal_before_the_first_step_ends_the_run_at_once(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """Tokenising a corpus can take hours, and there is nothing to save yet."""
  config = make_config()
  with monkeypatch.context() as patch:
    patch.setattr(store_lib, "build", lambda _: signal.raise_signal(
        signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
      train.run(config, tmp_path)
  assert not list(tmp_path.glob("*/result.json"))
  assert train.run(config, tmp_path).status == "complete"


def test_the_second_signal_ends_a_run_at_once(
    make_config, tmp_path: pathlib.Path) -> None:
  def twice(row: dict[str, Any]) -> None:
    if row["step"] == 3:
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt):
    train.run(make_config(), tmp_path, on_row=twice)


def test_a_run_that_another_process_has_just_finished_is_left_alone(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  config = make_config()
  claim = loop._claim

  def late(run_dir: pathlib.Path):
    monkeypatch.setattr(loop, "_claim", claim)
    train.run(config, tmp_path)
    return claim(run_dir)
  monkeypatch.setattr(loop, "_claim", late)
  assert train.run(config, tmp_path).resumes == 0


def test_a_directory_in_use_is_refused(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config()
  refused = []

  def meanwhile(row: dict[str, Any]) -> None:
    if row["step"] == 1:
      with pytest.raises(loop.RunDirectoryBusyError, match="another process"):
        train.run(config, tmp_path)
      refused.append(row)
  assert train.run(config, tmp_path, on_row=meanwhile).status == "complete"
  assert refused


def test_a_resume_on_another_corpus_is_refused(
    make_config, tmp_path: pathlib.Path) -> None:
  path = tmp_path / "text.txt"
  lines = [f"line {i} has some {i * i} words of its own" for i in range(400)]
  path.write_text("\n".join(lines), encoding="utf-8")
  stamp = path.stat()
  config = make_config({
      "data.corpus": "files", "data.files": (str(path),),
      "data.text_unit": "line", "data.validation_fraction": 0.3,
      "data.cache_dir": str(tmp_path / "stores"), "duration.steps": 12})
  stopped = train.run(config, tmp_path, on_row=interrupt(signal.SIGTERM, 3))
  path.write_text("\n".join(lines + ["one more line"]), encoding="utf-8")
  with pytest.raises(ValueError, match="the corpus has changed.*delete the run "
                     "directory"):
    train.run(config, tmp_path)
  path.write_text("\n".join(lines), encoding="utf-8")
  os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
  again = train.run(config, tmp_path)
  assert again.run_id == stopped.run_id and again.status == "complete"


def test_a_resume_under_another_config_is_refused(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"duration.steps": 12})
  train.run(config, tmp_path, run_id="mine",
            on_row=interrupt(signal.SIGTERM, 3))
  other = make_config({"duration.steps": 12, "optimizer.learning_rate": 0.5})
  with pytest.raises(ValueError, match="another config"):
    train.run(other, tmp_path, run_id="mine")
  assert train.run(config, tmp_path, run_id="mine").resumes == 1


def test_checkpoints_are_as_many_as_asked(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"checkpoint.every_steps": 2, "checkpoint.keep": 2})
  record = train.run(config, tmp_path)
  saved = {p.name for p in (tmp_path / record.run_id / "checkpoints").iterdir()}
  assert saved == {"4", "6"}
