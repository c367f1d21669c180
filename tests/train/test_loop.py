# SPDX-License-Identifier: Apache-2.0
"""A run from config to record: how it ends, resumes and is refused."""

import dataclasses
import errno
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any, Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tfjax import config as config_lib
from tfjax import train
from tfjax.data import store as store_lib
from tfjax.train import claim
from tfjax.train import clock
from tfjax.train import course
from tfjax.train import evaluation
from tfjax.train import interrupts
from tfjax.train import loop
from tfjax.train import records
from tfjax.train import step as step_lib
from tfjax.train import watchdog

# What result.json promises to hold, known or null.
FIELDS = """
    run_id sweep status status_reason family objective seed params_total
    params_embedding params_non_embedding params_active tokens_seen
    unique_tokens epochs steps batch_tokens dtype flops_total flops_matmul
    flops_attention flops_head flops_recompute flops_convention
    flops_by_component flops_by_convention loss
    loss_stderr bits_per_byte tokenizer bytes_per_token device_kind
    device_count device_seconds tokens_per_second mfu peak_flops_per_second
    peak_source wall_seconds startup_seconds compile_seconds input_seconds
    step_seconds evaluation_seconds checkpoint_seconds lost_seconds goodput
    occupied_device_seconds hardware price_usd price_source energy_kwh
    energy_source region pue co2e_kg co2e_source config_hash code_version
    packages
    """.split()


def rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  """The metrics of a run, without what they took."""
  return [{k: v for k, v in row.items() if k not in records.MEASURED}
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
  assert (record.process_count, record.mesh) == (
      1, dict(data=1, fsdp=1, sequence=1, tensor=1))
  assert (record.bad_steps, record.rollbacks, record.failed_saves,
          record.tokens_undone) == (0, 0, 0, 0)
  assert record.init_from is None and record.stopped_by is None
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
    first = [name for name in compiled if "train" in name]
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
    fed.setdefault(target.size, []).append(batch.inputs.tokens)
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
  monkeypatch.setattr(course, "Run", never)
  assert train.run(config, tmp_path) == record


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1,
                                    signal.SIGINT])
def test_an_interrupted_run_goes_on_where_it_stopped(
    number: signal.Signals, make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"duration.steps": 12})
  whole = train.run(config, tmp_path / "whole")
  before = signal.getsignal(number)
  record = train.run(config, tmp_path, on_row=interrupt(number, 5))
  assert signal.getsignal(number) is before
  run_dir = tmp_path / record.run_id
  assert (record.status, record.resumes) == ("interrupted", 0)
  assert record.stopped_by == number.name
  assert 5 <= record.steps <= 7
  assert record.status_reason == f"stopped after step {record.steps} of 12"
  assert record.loss is None
  assert rows(run_dir)[-1]["step"] == record.steps
  assert strict(run_dir / "result.json")["status"] == "interrupted"
  again = train.run(config, tmp_path)
  assert (again.status, again.resumes, again.steps) == ("complete", 1, 12)
  assert again.stopped_by is None
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


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGUSR1])
def test_the_second_signal_ends_a_run_at_once(
    first: signal.Signals, make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(interrupts, "_ECHO_SECONDS", 0.0)

  def twice(row: dict[str, Any]) -> None:
    if row["step"] == 3:
      signal.raise_signal(first)
      signal.raise_signal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt):
    train.run(make_config(), tmp_path, on_row=twice)


def test_the_same_signal_through_group_and_launcher_is_one(
    make_config, tmp_path: pathlib.Path) -> None:
  def twice(row: dict[str, Any]) -> None:
    if row["step"] == 3:
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGINT)
  record = train.run(make_config({"duration.steps": 12}), tmp_path,
                     on_row=twice)
  assert (record.status, record.stopped_by) == ("interrupted", "SIGINT")


def test_a_signal_that_is_ignored_stays_so(
    make_config, tmp_path: pathlib.Path) -> None:
  """A sweep's worker leaves Ctrl-C to its parent."""
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    record = train.run(make_config(), tmp_path,
                       on_row=interrupt(signal.SIGINT, 2))
  finally:
    signal.signal(signal.SIGINT, before)
  assert record.status == "complete"


def test_a_run_that_another_process_has_just_finished_is_left_alone(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  config = make_config()
  directory = claim.directory

  def late(run_dir: pathlib.Path):
    monkeypatch.setattr(claim, "directory", directory)
    train.run(config, tmp_path)
    return directory(run_dir)
  monkeypatch.setattr(claim, "directory", late)
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


@pytest.fixture(name="corpus")
def _corpus(make_config, tmp_path: pathlib.Path
            ) -> Callable[[bool], config_lib.ExperimentConfig]:
  """corpus(True) has one line more than corpus(False), in the same file."""
  path = tmp_path / "text.txt"
  lines = [f"line {i} has some {i * i} words of its own" for i in range(400)]

  def write(more: bool) -> config_lib.ExperimentConfig:
    path.write_text("\n".join(lines + ["one more line"] * more), "utf-8")
    os.utime(path, ns=(0, int(more)))
    return make_config({
        "data.corpus": "files", "data.files": (str(path),),
        "data.text_unit": "line", "data.validation_fraction": 0.3,
        "data.cache_dir": str(tmp_path / "stores"), "duration.steps": 12})
  return write


def test_a_resume_on_another_corpus_is_refused(
    corpus, tmp_path: pathlib.Path) -> None:
  config = corpus(False)
  stopped = train.run(config, tmp_path, on_row=interrupt(signal.SIGTERM, 3))
  corpus(True)
  with pytest.raises(records.RecordError, match="the corpus has changed.*"
                     "delete the run directory"):
    train.run(config, tmp_path)
  corpus(False)
  again = train.run(config, tmp_path)
  assert again.run_id == stopped.run_id and again.status == "complete"


def test_a_finished_run_on_another_corpus_is_refused(
    corpus, tmp_path: pathlib.Path) -> None:
  config = corpus(False)
  record = train.run(config, tmp_path)
  path = tmp_path / record.run_id / "result.json"
  corpus(True)
  with pytest.raises(records.RecordError, match="the corpus has changed since "
                     "this run was finished"):
    train.run(config, tmp_path)
  (tmp_path / "text.txt").unlink()  # no telling any more
  assert train.run(config, tmp_path) == record
  corpus(True)
  path.write_text(json.dumps(strict(path) | {"token_store": None}), "utf-8")
  assert train.run(config, tmp_path).loss == record.loss


def test_a_resume_under_another_config_is_refused(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"duration.steps": 12, "train.log_every_steps": 1})
  train.run(config, tmp_path, run_id="mine",
            on_row=interrupt(signal.SIGTERM, 3))
  files = [tmp_path / "mine" / name for name in ("config.json", "result.json")]
  before = [path.read_text("utf-8") for path in files]
  other = make_config({
      "duration.steps": 12, "optimizer.learning_rate": 0.5,
      "model.family": "llama", "train.log_every_steps": 3})
  with pytest.raises(records.RecordError) as error:
    train.run(other, tmp_path, run_id="mine")
  first, *lines, remedy = str(error.value).splitlines()
  assert first == f"{tmp_path / 'mine'} holds an unfinished run of another " + (
      "config:")
  assert "  optimizer.learning_rate: 0.001 there, 0.5 here" in lines
  assert "  model.family: 'gpt2' there, 'llama' here" in lines
  assert "  model.norm: 'layer_norm' there, 'rms_norm' here" in lines
  assert not any("log_every" in line for line in lines)
  for word in ("run_id", "workdir", "delete", "init_from"):
    assert word in remedy
  assert [path.read_text("utf-8") for path in files] == before
  # The checkpoint knows too, and of what this version does not have.
  files[0].unlink()
  fewer = make_config({"duration.steps": 12, "optimizer.learning_rate": 0.5})
  with pytest.raises(records.RecordError, match="learning_rate: 0.001 there"):
    train.run(fewer, tmp_path, run_id="mine")
  values = json.loads(before[0])
  del values["seed"]
  values["train"]["magic"] = 1
  files[0].write_text(json.dumps(values), "utf-8")
  with pytest.raises(records.RecordError) as error:
    train.run(config, tmp_path, run_id="mine")
  assert str(error.value).splitlines()[1:-1] == [
      "  seed: no such key there, 0 here",
      "  train.magic: 1 there, no such key here"]
  files[0].write_text(before[0], "utf-8")
  assert train.run(config, tmp_path, run_id="mine").resumes == 1


def test_a_run_from_before_a_field_was_added_goes_on(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  config = make_config({"duration.steps": 12})
  added = [entry.name for entry in dataclasses.fields(config.model)
           if entry.metadata["added"]]
  assert "parametrization" in added
  to_dict = config_lib.to_dict

  def older(config: config_lib.ExperimentConfig) -> dict[str, Any]:
    values = to_dict(config)
    for name in added:
      del values["model"][name]
    return values
  with monkeypatch.context() as patched:
    patched.setattr(config_lib, "to_dict", older)
    train.run(config, tmp_path, run_id="mine",
              on_row=interrupt(signal.SIGTERM, 3))
  other = make_config({
      "duration.steps": 12, "model.parametrization": "mup",
      "model.base_d_model": 8, "model.base_head_dim": 8})
  with pytest.raises(records.RecordError) as error:
    train.run(other, tmp_path, run_id="mine")
  assert ("  model.parametrization: no such key there, 'mup' here" in
          str(error.value).splitlines())
  assert train.run(config, tmp_path, run_id="mine").resumes == 1


def test_a_finished_run_of_another_config_is_refused(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config()
  record = train.run(config, tmp_path, run_id="mine")
  with pytest.raises(records.RecordError, match="a finished run of another "
                     r"config:\n  seed: 0 there, 9 here\n"):
    train.run(make_config({"seed": 9}), tmp_path, run_id="mine")
  assert train.run(config, tmp_path, run_id="mine") == record


def test_checkpoints_are_as_many_as_asked(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config({"checkpoint.every_steps": 2, "checkpoint.keep": 2})
  record = train.run(config, tmp_path)
  saved = {p.name for p in (tmp_path / record.run_id / "checkpoints").iterdir()}
  assert saved == {"4", "6"}


def test_time_and_devices_add_up_over_an_interruption(
    make_config, tmp_path: pathlib.Path) -> None:
  changes = {"duration.steps": 12}
  one = train.run(make_config(changes | {"runtime.num_devices": 1}), tmp_path,
                  on_row=interrupt(signal.SIGTERM, 5))
  two = train.run(make_config(changes | {"runtime.num_devices": 2}), tmp_path)
  assert (one.device_count, two.device_count, two.resumes) == (1, 2, 1)
  assert two.mesh["data"] == 2
  seconds = two.tokens_seen / two.tokens_per_second
  # Saving is not training: both clocks stood at what was saved.
  assert two.device_seconds == pytest.approx(
      one.device_seconds + 2 * (seconds - one.device_seconds), rel=1e-3)
  saved = json.loads((tmp_path / two.run_id / "checkpoints" / "12" /
                      "counters" / "metadata").read_text("utf-8"))
  assert saved["tokens"] == 12 * 128
  assert saved["flops"] == 12 * 128 * 46_176
  assert saved["device_seconds"] == pytest.approx(two.device_seconds)
  assert saved["resumes"] == 1 and saved["store"] == two.token_store
  assert saved["config"]["runtime"]["num_devices"] == 2


def test_weights_alone_come_from_another_run(
    make_config, tmp_path: pathlib.Path) -> None:
  first = train.run(make_config({
      "duration.steps": 20, "optimizer.learning_rate": 0.03}), tmp_path)
  source = str(tmp_path / first.run_id)
  changes = {"duration.steps": 1, "optimizer.learning_rate": 1e-12}
  second = train.run(make_config(changes | {"init_from": source}), tmp_path)
  scratch = train.run(make_config(changes), tmp_path)
  assert second.loss == pytest.approx(first.loss, rel=1e-6)
  assert abs(scratch.loss - first.loss) > 0.1
  assert (first.init_from, second.init_from) == (None, source)
  assert (second.steps, second.resumes) == (1, 0)
  with pytest.raises(config_lib.ConfigError) as error:
    train.run(make_config({"init_from": str(tmp_path)}), tmp_path)
  assert error.value.key == "init_from"
  # Of the same shapes, but multiplied by other numbers.
  for path in (source, f"{source}/checkpoints"):
    with pytest.raises(config_lib.ConfigError, match=(
        "init_from: .*parametrization='standard'")):
      train.run(make_config({
          "init_from": path, "model.parametrization": "mup",
          "model.base_d_model": 8, "model.base_head_dim": 4}), tmp_path)


@pytest.mark.parametrize("every_steps, steps", [
    (None, {"6", "11", "12"}), (8, {"6", "8", "12"})])
def test_checkpoints_come_by_the_clock(
    every_steps: int | None, steps: set[str], make_config,
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  now = [0.0]
  monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])

  def tick(row: dict[str, Any]) -> None:
    # Rows come one step late: the clock moves while step + 1 is on its way.
    now[0] += {4: 11.0, 7: 8.0, 9: 4.0}.get(row["step"], 0.0)
  config = make_config({"checkpoint.every_seconds": 10.0, "duration.steps": 12,
                        "checkpoint.every_steps": every_steps,
                        "checkpoint.keep": 9})
  record = train.run(config, tmp_path, on_row=tick)
  saved = {p.name for p in (tmp_path / record.run_id / "checkpoints").iterdir()}
  assert saved == steps


def test_a_save_that_fails_is_counted_and_training_goes_on(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  save, tried = ocp.CheckpointManager.save, []

  def full(self, step: int, *args, **kwargs):
    tried.append(step)
    if step in (2, 4):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return save(self, step, *args, **kwargs)
  monkeypatch.setattr(ocp.CheckpointManager, "save", full)
  config = make_config({"checkpoint.every_steps": 2})
  record = train.run(config, tmp_path)
  assert tried == [2, 4, 6]
  assert (record.status, record.failed_saves) == ("complete", 2)
  assert train.run(config, tmp_path) == record


def test_a_stop_that_could_not_be_saved_says_so(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  monkeypatch.setattr(ocp.CheckpointManager, "save", full)
  record = train.run(make_config(), tmp_path,
                     on_row=interrupt(signal.SIGTERM, 3))
  assert (record.status, record.failed_saves) == ("interrupted", 1)
  assert "could not be saved" in record.status_reason
  assert "from step 0" in record.status_reason


def test_a_run_whose_last_save_fails_says_how_to_have_its_parameters(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  save, config = ocp.CheckpointManager.save, make_config(
      {"checkpoint.every_steps": 4})

  def full(self, step: int, *args, **kwargs):
    if step == 6:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return save(self, step, *args, **kwargs)
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, "save", full)
    record = train.run(config, tmp_path)
  assert record.status == "complete" and math.isfinite(record.loss)
  assert "could not be saved" in record.status_reason
  assert "from step 4" in record.status_reason
  (tmp_path / record.run_id / "result.json").unlink()
  again = train.run(config, tmp_path)
  assert (again.loss, again.status_reason, again.resumes) == (
      record.loss, None, 1)


def test_a_result_whose_rows_are_lost_is_measured_again(
    make_config, tmp_path: pathlib.Path, caplog) -> None:
  config = make_config()
  record = train.run(config, tmp_path)
  run_dir = tmp_path / record.run_id
  (run_dir / "result.json").unlink()  # as if killed before it was written
  (run_dir / "metrics.jsonl").unlink()
  again = train.run(config, tmp_path)
  assert (again.status, again.loss) == ("complete", record.loss)
  assert [row["kind"] for row in rows(run_dir)] == ["evaluation"]
  assert "up to step 6 have been lost" in caplog.text


def test_a_record_of_another_version_is_read(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config()
  record = train.run(config, tmp_path)
  path = tmp_path / record.run_id / "result.json"
  result = strict(path) | {"of_another_version": 1}
  path.write_text(json.dumps(result), encoding="utf-8")
  assert train.run(config, tmp_path) == record
  del result["config_hash"]
  path.write_text(json.dumps(result), encoding="utf-8")
  with pytest.raises(records.RecordError, match="another config"):
    train.run(config, tmp_path)


@pytest.mark.parametrize("result_too", [False, True])
def test_rows_that_cannot_be_written_stop_the_run(
    result_too: bool, make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch, caplog) -> None:
  write, replace = records.MetricsFile.write, os.replace

  def fill(self, row: dict[str, Any]) -> None:
    if row["step"] == 7:
      self.close()
      self._file = open("/dev/full", "ab", buffering=0)  # a full disk, really
    write(self, row)

  def replace_unless_result(source, target) -> None:
    if pathlib.Path(target).name == "result.json":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    replace(source, target)
  config = make_config({"duration.steps": 12, "checkpoint.every_steps": 5})
  whole, seen = train.run(config, tmp_path / "whole"), []
  with monkeypatch.context() as patch:
    patch.setattr(records.MetricsFile, "write", fill)
    if result_too:
      patch.setattr(os, "replace", replace_unless_result)
    with pytest.raises(records.WriteError) as error:
      train.run(config, tmp_path, on_row=lambda row: seen.append(row["step"]))
  # Row 7 is read in step 8; step 9 is the last, as all processes agree.
  assert seen == list(range(1, 10))
  for words in ("metrics.jsonl cannot be written", "No space left on device",
                "make room", "is kept"):
    assert words in str(error.value)
  run_dir = tmp_path / whole.run_id
  assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["5"]
  if result_too:
    assert not (run_dir / "result.json").exists()
    assert "the failure itself is not on record" in caplog.text
  else:
    result = strict(run_dir / "result.json")
    assert result["status"] == "failed"
    assert "metrics.jsonl cannot be written" in result["status_reason"]
  assert not list(run_dir.glob(".*.json.*"))
  again = train.run(config, tmp_path)
  assert (again.status, again.resumes) == ("complete", 1)
  assert rows(run_dir) == rows(tmp_path / "whole" / whole.run_id)


def test_the_watchdog_is_told_where_training_is(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  told = []
  monkeypatch.setattr(watchdog.Watchdog, "at", lambda self, phase, step: (
      told.append((phase, step))))
  train.run(make_config({
      "duration.steps": 3, "checkpoint.every_steps": 2}), tmp_path)
  told.remove(("start", 0))
  assert told == [
      ("compile", 0), ("data", 1), ("step", 1), ("data", 2), ("step", 2),
      ("checkpoint", 2), ("data", 3), ("step", 3), ("evaluation", 3),
      ("checkpoint", 3)]


# --- The command -------------------------------------------------------------


def command(config: config_lib.ExperimentConfig, workdir: pathlib.Path
            ) -> list[str]:
  """scripts/train.py on that config, in a file."""
  path = workdir / "experiment.py"
  path.write_text(
      "import json\nfrom tfjax import config as config_lib\n"
      "def get_config():\n  config = config_lib.default()\n"
      f"  config_lib.override(config, json.loads({json.dumps(flat(config))!r}))"
      "\n  return config\n", "utf-8")
  script = pathlib.Path(__file__).parents[2] / "scripts" / "train.py"
  return [sys.executable, str(script), f"--config={path}",
          f"--workdir={workdir}"]


def flat(config: config_lib.ExperimentConfig) -> dict[str, Any]:
  """What differs from the defaults, by dotted key."""
  found = {}

  def walk(values: dict, defaults: dict, prefix: str) -> None:
    for name, value in values.items():
      if isinstance(value, dict):
        walk(value, defaults[name], f"{prefix}{name}.")
      elif value != defaults[name]:
        found[prefix + name] = value
  walk(config_lib.to_dict(config), config_lib.default().to_dict(), "")
  return found


def test_a_second_process_is_refused(
    make_config, tmp_path: pathlib.Path) -> None:
  config = make_config()
  done = []

  def meanwhile(row: dict[str, Any]) -> None:
    if row["step"] == 1:
      done.append(subprocess.run(command(config, tmp_path), check=False,
                                 capture_output=True, text=True))
  record = train.run(config, tmp_path, on_row=meanwhile)
  assert (record.status, len(done)) == ("complete", 1)
  assert done[0].returncode == 2
  assert f"another process is training in {tmp_path / record.run_id}" in (
      done[0].stderr)


@pytest.mark.parametrize("number, code", [
    (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_the_exit_code_says_whether_to_requeue(
    number: signal.Signals, code: int, make_config,
    tmp_path: pathlib.Path) -> None:
  config = make_config({"duration.steps": 20_000, "data.max_epochs": 1e6})
  with subprocess.Popen(command(config, tmp_path), text=True,
                        stdout=subprocess.PIPE) as process:
    for line in process.stdout:
      if "step      20" in line:
        process.send_signal(number)
        break
    rest = process.stdout.read()
  assert process.returncode == code, rest
  assert "stopped after step" in rest
  result = records.read_result(tmp_path / records.run_id(config))
  assert result["stopped_by"] == number.name
