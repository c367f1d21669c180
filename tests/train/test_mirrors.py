# SPDX-License-Identifier: Apache-2.0
"""The mirrors' parts: columns, the reader of rows, wandb, TensorBoard."""

import json
import pathlib
import struct
import sys
import types
from typing import Any, Iterator

import pytest

from tfjax.train.mirrors import columns
from tfjax.train.mirrors import follow
from tfjax.train.mirrors import reader
from tfjax.train.mirrors import tensorboard_files
from tfjax.train.mirrors import wandb_run


def row(step: int, loss: float = 2.0, **others: Any) -> dict[str, Any]:
  return dict(kind="train", step=step, tokens=10 * step, loss=loss, **others)


def write(run_dir: pathlib.Path, rows: list[dict[str, Any]],
          **result: Any) -> None:
  """A run directory as far as its mirrors look at one."""
  config = dict(
      model=dict(family="gpt2", size=None, d_model=48, num_layers=3),
      objective=dict(name="causal"),
      tracking=dict(wandb="online", project="p", entity="", tags=["pilot"],
                    tensorboard=False, init_timeout_seconds=1.0))
  run_dir.mkdir(exist_ok=True)
  (run_dir / "config.json").write_text(json.dumps(config))
  fresh = run_dir / "fresh"
  fresh.write_text("".join(json.dumps(one) + "\n" for one in rows))
  fresh.replace(run_dir / "metrics.jsonl")
  (run_dir / "result.json").unlink(missing_ok=True)
  if result:
    (run_dir / "result.json").write_text(json.dumps(result))


# --- Columns -------------------------------------------------------------


def test_columns_of_a_row() -> None:
  assert columns.of_row(dict(
      kind="train", step=3, tokens=300, flops=1.5e9, loss=2.5, mfu=None,
      device_seconds=7200.0, seconds=1800.0, grad_norm=0.1)) == {
          "step": 3, "tokens": 300, "flops": 1.5e9, "train/loss": 2.5,
          "device_hours": 2.0, "seconds": 1800.0, "train/grad_norm": 0.1}
  assert columns.of_row(dict(kind="evaluation", step=3, loss=2.0)) == {
      "step": 3, "evaluation/loss": 2.0}


def test_the_hours_of_a_branch_begin_with_its_trunks() -> None:
  way = [dict(device_seconds=None, shared_device_seconds=1800.0, shared=True),
         dict(device_seconds=900.0, shared_device_seconds=3600.0)]
  assert [columns.of_row(dict(kind="train", step=1, **row))["device_hours"]
          for row in way] == [0.5, 1.25]
  assert columns.summary(dict(
      occupied_device_seconds=1800.0, shared_device_seconds=3600.0,
      loss=None)) == dict(occupied_device_seconds=1800.0,
                          shared_device_seconds=3600.0, device_hours=1.5)
  assert columns.summary(dict(loss=2.0)) == dict(loss=2.0)


def test_who_a_run_is(tmp_path: pathlib.Path) -> None:
  write(tmp_path, [])
  (tmp_path / columns.NOTE).write_text(json.dumps(
      dict(sweep="grid", derived=dict(params_total=7))))
  about = columns.about(tmp_path)
  assert about.tags == ("pilot", "gpt2", "causal", "d48l3")
  assert about.group == "grid"
  assert about.config["derived"] == {"params_total": 7}
  # A third of the plan is done: 60 tokens a step, 2 of 6 steps.
  write(tmp_path, [], status="interrupted", sweep="other", params_total=8,
        tokens_planned=360, batch_tokens=60, tokens_seen=120, flops_total=4e6)
  about = columns.about(tmp_path)
  assert about.group == "other"
  assert about.config["derived"] == dict(
      params_total=8, tokens_planned=360, batch_tokens=60, steps_planned=6,
      flops_planned=1.2e7)


# --- The reader ----------------------------------------------------------


def test_the_reader_follows_appends_cuts_and_half_lines(
    tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  follower = reader.Reader(path)
  assert not follower.poll() and not follower.rows
  lines = [json.dumps(row(step)) + "\n" for step in (1, 2, 3)]
  path.write_text(lines[0] + lines[1][:7])
  assert not follower.poll() and [one["step"] for one in follower.rows] == [1]
  with open(path, "a", encoding="utf-8") as file:
    file.write(lines[1][7:] + lines[2])
  assert not follower.poll()
  assert [one["step"] for one in follower.rows] == [1, 2, 3]
  fresh = tmp_path / "fresh"
  fresh.write_text(lines[0] + json.dumps(row(2, 9.0)) + "\n" + lines[2])
  fresh.replace(path)  # of the same length
  assert follower.poll() and follower.rows[1]["loss"] == 9.0
  path.write_text(lines[0])
  assert follower.poll() and len(follower.rows) == 1
  path.write_text(lines[0] + "{}\n")
  with pytest.raises(ValueError, match="holds a line that is no row"):
    follower.poll()


# --- wandb ---------------------------------------------------------------


class Server:
  """What a wandb server would hold of one run, and how it was reached."""

  def __init__(self, can_rewind: bool = True):
    self.can_rewind = can_rewind
    self.history: list[dict[str, Any]] = []
    self.inits: list[dict[str, Any]] = []
    self.summary: dict[str, Any] = {}
    self.exit_code: int | None = None
    self.reachable = True

  def steps(self) -> list[tuple[int, float]]:
    return [(one["step"], one["train/loss"]) for one in self.history]

  def init(self, **arguments: Any) -> types.SimpleNamespace:
    if not self.reachable and arguments["mode"] == "online":
      raise OSError("no route to host")
    if arguments["mode"] == "offline":
      self.history.clear()
    if "resume_from" in arguments:
      if not self.can_rewind:
        raise RuntimeError("not on this plan")
      del self.history[int(arguments["resume_from"].split("=")[1]) + 1:]
    self.inits.append(arguments)
    directory = f"{arguments['dir']}/wandb/offline-run-1-{arguments.get('id')}"
    pathlib.Path(directory).mkdir(exist_ok=True)

    def finish(exit_code: int | None = None) -> None:
      self.exit_code = exit_code
    return types.SimpleNamespace(
        starting_step=len(self.history), url="http://w/p/r",
        dir=f"{directory}/files", log=self.history.append, finish=finish,
        summary=self.summary, define_metric=lambda *_, **__: None,
        config=types.SimpleNamespace(update=lambda *_, **__: None))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
  made = Server()
  module = types.ModuleType("wandb")
  module.init, module.Settings = made.init, types.SimpleNamespace
  monkeypatch.setitem(sys.modules, "wandb", module)
  monkeypatch.setattr(follow, "_reachable", True)
  monkeypatch.setattr(follow, "_following", set())
  yield made


def mirror(run_dir: pathlib.Path, mode: str | None = None
           ) -> follow.Follower:
  """Brings the mirrors up to date with a run that nobody is at."""
  follower = follow.Follower(run_dir, mode)
  follower.close(seconds=0)
  follower.advance()
  assert follower.is_done
  return follower


def pairs(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
  return [(one["step"], one["loss"]) for one in rows]


def test_a_run_that_was_killed_and_resumed_is_in_wandb_once(
    server: Server, tmp_path: pathlib.Path) -> None:
  rows = [row(step, 5 - step) for step in range(1, 7)]
  write(tmp_path, rows[:4])
  assert not mirror(tmp_path).problems
  assert server.exit_code == 1  # no result: it was killed
  # Cut back to a checkpoint after step 2, done again at another speed.
  write(tmp_path, rows[:2])
  live = follow.Follower(tmp_path)
  live.advance()
  again = [dict(one, seconds=9.0) for one in rows]
  write(tmp_path, [*rows[:2], *again[2:]], status="complete")
  live.advance()
  live.close()
  live.advance()
  assert live.is_done and not live.problems
  assert server.steps() == pairs(rows)
  assert all(one["resume"] == "allow" for one in server.inits)
  assert {one["id"] for one in server.inits} == {tmp_path.name}
  assert (server.exit_code, server.summary) == (0, {"status": "complete"})


def test_what_was_rolled_back_is_rewound(
    server: Server, tmp_path: pathlib.Path) -> None:
  rows = [row(step) for step in range(1, 6)]
  write(tmp_path, rows)
  live = follow.Follower(tmp_path)
  live.advance()
  assert server.steps() == pairs(rows)
  new = [*rows[:2], row(3, 7.0), row(4, 8.0), row(5, 9.0), row(6, 9.5)]
  write(tmp_path, new[:3])
  live.advance()
  assert server.steps() == pairs(new[:3])
  write(tmp_path, new, status="complete")
  live.close()
  live.advance()
  assert server.steps() == pairs(new) and not live.problems
  assert [one.get("resume_from") for one in server.inits] == [
      None, f"{tmp_path.name}?_step=1"]
  # From the records alone it comes to the same.
  mirror(tmp_path)
  assert server.steps() == pairs(new) and len(server.inits) == 3


def test_rows_that_are_no_more_are_rewound_at_the_end(
    server: Server, tmp_path: pathlib.Path) -> None:
  rows = [row(step) for step in range(1, 6)]
  write(tmp_path, rows)
  mirror(tmp_path)
  write(tmp_path, rows[:3], status="diverged")
  assert not mirror(tmp_path).problems
  assert server.steps() == pairs(rows[:3]) and server.exit_code == 1


def test_a_server_that_cannot_rewind_gets_each_step_once(
    server: Server, tmp_path: pathlib.Path) -> None:
  server.can_rewind = False
  rows = [row(step) for step in range(1, 5)]
  write(tmp_path, rows)
  mirror(tmp_path)
  new = [*rows[:2], row(3, 7.0), row(4, 8.0), row(5, 9.0)]
  write(tmp_path, new, status="complete")
  follower = mirror(tmp_path)
  assert server.steps() == [*pairs(rows), (5, 9.0)]
  assert "holds 2 rows that the run has since done otherwise" in (
      follower.problems[0])


def test_a_history_of_another_place_is_taken_by_its_length(
    server: Server, tmp_path: pathlib.Path) -> None:
  """Where it is not on record what wandb was sent: rows are not doubled."""
  rows = [row(step) for step in range(1, 5)]
  write(tmp_path, rows[:3])
  mirror(tmp_path)
  (tmp_path / "wandb" / "sent.txt").unlink()
  write(tmp_path, rows, status="complete")
  mirror(tmp_path)
  assert server.steps() == pairs(rows)


def test_offline_there_is_one_directory_that_is_whole(
    server: Server, tmp_path: pathlib.Path) -> None:
  rows = [row(step) for step in range(1, 5)]
  write(tmp_path, rows)
  old = tmp_path / "wandb" / f"offline-run-0-{tmp_path.name}"
  other = tmp_path / "wandb" / "offline-run-0-another"
  old.mkdir(parents=True)
  other.mkdir()
  for _ in range(2):
    mirror(tmp_path, "offline")
    assert server.steps() == pairs(rows)
  assert not old.exists() and other.exists()
  assert not (tmp_path / "wandb" / "sent.txt").exists()
  # A rollback while it is followed: written anew.
  live = follow.Follower(tmp_path, "offline")
  live.advance()
  new = [*rows[:2], row(3, 7.0)]
  write(tmp_path, new)
  live.advance()
  assert server.steps() == pairs(new)


def test_a_server_that_is_not_reachable_is_asked_once(
    server: Server, tmp_path: pathlib.Path) -> None:
  server.reachable = False
  for name in ("a", "b"):
    write(tmp_path / name, [row(1)], status="complete")
  assert "not reachable (no route to host)" in mirror(
      tmp_path / "a").problems[0]
  server.reachable = True
  assert not mirror(tmp_path / "b").problems
  assert [one["mode"] for one in server.inits] == ["offline", "offline"]
  # Asked for by name it is tried, and said where it fails.
  server.reachable = False
  found = mirror(tmp_path / "a", "online")
  assert "no route to host" in found.problems[0]
  assert len(server.inits) == 2


def test_two_processes_do_not_write_the_same_mirror(
    server: Server, tmp_path: pathlib.Path) -> None:
  write(tmp_path, [row(1)], status="complete")
  with follow.locked(tmp_path) as mine:
    assert mine
    second = follow.Follower(tmp_path)
    second.close(seconds=0)
    second.advance()
    assert not second.is_done and not server.inits
  second.advance()
  assert second.is_done and server.steps() == [(1, 2.0)]


def test_a_mirror_that_waits_for_its_turn_leaves_no_files_open(
    server: Server, tmp_path: pathlib.Path) -> None:
  del server
  write(tmp_path, [row(1)])
  with follow.locked(tmp_path):
    second = follow.Follower(tmp_path)
    second.advance()
    before = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    for _ in range(20):
      second.advance()
    assert len(list(pathlib.Path("/proc/self/fd").iterdir())) == before


def test_a_result_that_is_not_there_yet_is_waited_for(
    server: Server, tmp_path: pathlib.Path) -> None:
  write(tmp_path, [row(1)])
  follower = follow.Follower(tmp_path)
  follower.close(seconds=60)
  follower.advance()
  assert not follower.is_done
  (tmp_path / "result.json").write_text('{"status": "complete"}')
  follower.advance()
  assert follower.is_done and server.summary == {"status": "complete"}


def test_online_that_takes_too_long_to_finish_is_said(
    server: Server, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 0)
  write(tmp_path, [row(1)], status="complete")
  assert "not taken everything" in mirror(tmp_path).problems[0]


# --- TensorBoard ---------------------------------------------------------


def events(directory: pathlib.Path) -> list[tuple[int, str, float]]:
  """(step, tag, value) of the scalars in the one file of a directory."""
  # pylint: disable=import-outside-toplevel
  from tensorboardX import crc32c
  from tensorboardX.proto import event_pb2
  (path,) = directory.iterdir()
  data, at, found = path.read_bytes(), 0, []
  while at < len(data):
    (length,) = struct.unpack_from("<Q", data, at)
    body = data[at + 12:at + 12 + length]
    (checksum,) = struct.unpack_from("<I", data, at + 12 + length)
    crc = crc32c.crc32c(body)
    assert checksum == ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff
    at += length + 16
    event = event_pb2.Event.FromString(body)
    found += [(event.step, value.tag, value.simple_value)
              for value in event.summary.value]
  return found


def test_tensorboard_files_hold_the_rows(tmp_path: pathlib.Path) -> None:
  rows = [row(step, 1 / step) for step in (1, 2, 3)]
  old = tmp_path / "tensorboard" / "events.out.tfevents.1.host"
  old.parent.mkdir()
  old.touch()  # of the part of the run before
  board = tensorboard_files.TensorBoardFiles(tmp_path)
  board.update(rows[:2], replaced=False)
  board.update(rows, replaced=False)
  expected = [(one["step"], tag, pytest.approx(value, rel=1e-6))
              for one in rows for tag, value in (
                  ("tokens", one["tokens"]), ("train/loss", one["loss"]))]
  assert events(tmp_path / "tensorboard") == expected
  # Rolled back: what was undone is gone.
  board.update([rows[0], row(2, 9.0)], replaced=True)
  assert [one[::2] for one in events(tmp_path / "tensorboard")] == [
      (1, 10.0), (1, 1.0), (2, 20.0), (2, 9.0)]
  board.finish(rows, None)
  # Resumed: one file still, which holds all.
  board = tensorboard_files.TensorBoardFiles(tmp_path)
  board.update(rows, replaced=False)
  board.finish(rows, None)
  assert events(tmp_path / "tensorboard") == expected
