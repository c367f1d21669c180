# SPDX-License-Identifier: Apache-2.0
"""The live page's state, curves and server; the page itself is tested in
tests/scripts/test_serve.py."""

import contextlib
import http.client
import json
import os
import pathlib
import sys
import threading
import time
from typing import Any, Callable, Iterator

import ml_collections
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import ledger
from tfjax.sweep import live
from tfjax.sweep import live_rows
from tfjax.sweep import live_state
from tfjax.sweep import watch as watch_lib
from tfjax.train import lease
from tfjax.train import records

WriteRun = Callable[..., pathlib.Path]


@pytest.fixture(name="specs")
def specs_fixture(base: ml_collections.ConfigDict,
                  tmp_path: pathlib.Path) -> list[sweep.RunSpec]:
  """Runs of 10, 20 and 30 steps of one size, planned as sweep "some"."""
  specs = sweep.plan(base, sweep.axis("duration.steps", [10, 20, 30]))
  ledger.write_plan(tmp_path, "some", specs)
  return specs


def _row(step: int, loss: float | None, kind: str = "train") -> str:
  return json.dumps(dict(kind=kind, step=step, tokens=8 * step,
                         flops=100.0 * step, loss=loss)) + "\n"


# --- Curves ------------------------------------------------------------------


def test_thinning_keeps_ends_and_every_spike() -> None:
  rng = np.random.default_rng(0)
  x = np.arange(1.0, 20_001.0)
  y = 3 + rng.normal(size=len(x)) * 0.01
  y[[7, 1234, 19_000]] = 9.0, 8.0, -5.0
  kept = live_rows.thin(x, y, 300)
  assert len(kept) <= 300 and (np.diff(kept) > 0).all()
  assert {0, 7, 1234, 19_000, 19_999} <= set(kept.tolist())
  # Both axes: of the first hundredth some are left, and so of the last half.
  assert (kept < 200).sum() > 40 and (kept > 10_000).sum() > 40


def test_few_points_are_left_as_they_are() -> None:
  x = np.array([1.0, 5.0, 6.0])
  assert live_rows.thin(x, x, 300).tolist() == [0, 1, 2]
  assert live_rows.thin(x[:0], x[:0], 300).tolist() == []


def test_rows_are_read_once_as_they_come(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  follower = live_rows.Follower(path)
  assert follower.read(1 << 20) == 0 and follower.version == 0
  path.write_text(_row(1, 5.0) + _row(2, 4.0)[:20])
  assert follower.read(1 << 20) > 0
  assert follower.curves()["train"] == [[1], [5.0]]
  version = follower.version
  assert follower.read(1 << 20) == 0 and follower.version == version
  with open(path, "a", encoding="utf-8") as file:
    file.write(_row(2, 4.0)[20:] + "not a row\n" + _row(3, None)
               + _row(3, 3.5, "evaluation") + '{"kind": "train"}\n')
  assert 0 < follower.read(1 << 20) < len(path.read_bytes())
  assert follower.curves() == dict(
      per_step=dict(tokens=8.0, flops=100.0), train=[[1, 2], [5.0, 4.0]],
      evaluation=[[3], [3.5]])
  assert follower.damaged == 2 and follower.version > version


def test_what_is_too_much_at_once_comes_next_time(
    tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(_row(step, 1.0) for step in range(1, 101)))
  follower, times = live_rows.Follower(path), 0
  while times == 0 or follower.behind:
    assert follower.read(1000) <= 1000
    times += 1
  assert times > 5 and follower.damaged == 0
  assert follower.curves()["train"][0] == list(range(1, 101))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_that_a_resume_has_cut_is_read_anew(
    tmp_path: pathlib.Path, in_place: bool) -> None:
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(_row(step, 5.0) for step in range(1, 9)))
  follower = live_rows.Follower(path)
  follower.read(1 << 20)
  # As long as it was before, so that its size tells nothing.
  text = "".join(_row(step, 4.0) for step in range(1, 10))
  if in_place:
    path.write_text(text)
  else:
    file = records.MetricsFile(path, 4)
    for line in text.splitlines()[4:]:
      file.write(json.loads(line))
    file.close()
  follower.read(1 << 20)
  steps, losses = follower.curves()["train"]
  assert steps == list(range(1, 10))
  assert losses == ([4.0] * 9 if in_place else [5.0] * 4 + [4.0] * 5)
  path.unlink()
  follower.read(1 << 20)
  assert follower.curves()["train"] == [[], []] and not follower.behind


def test_another_file_that_ends_alike_is_read_anew(
    tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(_row(step, 5.0) for step in range(1, 9)))
  follower = live_rows.Follower(path)
  follower.read(1 << 20)
  other = tmp_path / "other"
  other.write_text("".join(
      _row(step, 4.0 if step < 5 else 5.0) for step in range(1, 10)))
  other.replace(path)
  follower.read(1 << 20)
  assert follower.curves()["train"][1] == [4.0] * 4 + [5.0] * 5


# --- Where runs stand --------------------------------------------------------


def test_time_left_by_hand(specs: list[sweep.RunSpec], write_run: WriteRun,
                           tmp_path: pathlib.Path) -> None:
  """A step takes a device-second, whatever the run: 60 in all."""
  short, middle, long = specs
  watch = watch_lib.Watch(tmp_path)
  watch.refresh(now=0.0)
  assert watch.share_done == 0.0
  assert (watch.seconds_left(), watch.device_seconds_left()) == (None, None)
  write_run(short, "complete", 10)
  with lease.hold(write_run(middle, "running", 5)):
    watch.refresh(now=10.0)
    assert watch.counts() == dict(complete=1, running=1, pending=1)
    assert watch.share_done == pytest.approx(15 / 60)
    # 15 device-seconds in 10 seconds, 15 + 30 are left.
    assert watch.devices_at_work() == pytest.approx(1.5)
    assert watch.device_seconds_left() == pytest.approx(45)
    # The longest, of 30, has the 1.5 devices that one run had.
    assert watch.seconds_left() == pytest.approx(45 / 1.5)
    with lease.hold(write_run(long, "running", 1)):
      watch.refresh(now=20.0)
      # 16 in 20 seconds: 0.8 for two runs, of which one has 29 to go.
      assert watch.seconds_left() == pytest.approx(29 / 0.4)
  watch.refresh(now=21.0)  # nobody is at it
  assert watch.counts() == dict(complete=1, interrupted=2)
  assert watch.seconds_left() is None


def test_what_nobody_watched_is_no_speed(
    specs: list[sweep.RunSpec], write_run: WriteRun,
    tmp_path: pathlib.Path) -> None:
  with contextlib.ExitStack() as held:
    for spec in specs[1:]:
      (tmp_path / spec.run_id).mkdir()
      held.enter_context(lease.hold(tmp_path / spec.run_id))
    write_run(specs[1], "running", 5)
    watch = watch_lib.Watch(tmp_path)
    watch.refresh(now=0.0)
    write_run(specs[2], "running", 20)  # since when it runs, nobody knows
    watch.refresh(now=10.0)
    assert watch.devices_at_work() is None and watch.seconds_left() is None


def test_a_trunk_is_counted_once(
    base: ml_collections.ConfigDict, write_run: WriteRun,
    tmp_path: pathlib.Path) -> None:
  for key, value in {"optimizer.schedule": "wsd", "sweep.share_trunk": True,
                     "data.max_epochs": 10.0}.items():
    group, name = key.split(".")
    base[group][name] = value
  specs = sweep.plan(base, sweep.axis("duration.steps", [100, 200]))
  ledger.write_plan(tmp_path, "some", specs)
  watch = watch_lib.Watch(tmp_path)
  watch.refresh()
  branch, trunk = (watch.runs[spec.run_id] for spec in specs)
  assert trunk.flops_total == specs[1].budget.flops_total
  # The decay alone is the branch's own, a fifth of its steps.
  share = base.optimizer.decay_fraction * specs[0].budget.flops_total
  assert branch.flops_total == pytest.approx(share)
  # The record of a failure does not know, but its rows tell a branch's.
  metrics = write_run(specs[0], "failed", 90) / watch_lib.METRICS
  lines = metrics.read_text().splitlines()
  metrics.write_text("\n".join([*lines[:-1], json.dumps(json.loads(
      lines[-1]) | dict(shared_device_seconds=5.0))]) + "\n")
  watch.refresh()
  assert branch.flops_total == pytest.approx(share)
  assert branch.flops_done == pytest.approx(share / 2)
  metrics.write_text("\n".join(lines) + "\n")
  watch.refresh()
  assert branch.flops_total == pytest.approx(specs[0].budget.flops_total)
  assert branch.flops_done == pytest.approx(0.9 * branch.flops_total)
  # As if it could not branch off: its record says that it shares nothing.
  write_run(specs[0], "complete", 100)
  watch.refresh()
  assert branch.flops_done == branch.flops_total == pytest.approx(
      specs[0].budget.flops_total)


def test_who_will_find_no_checkpoint_of_its_trunk_has_all_to_do(
    base: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
  config_lib.override(base, {
      "optimizer.schedule": "wsd", "sweep.share_trunk": True,
      "data.max_epochs": 10.0})
  specs = sweep.plan(base, sweep.axis("duration.steps", [100, 200]))
  ledger.write_plan(tmp_path, "some", specs)
  (tmp_path / specs[1].run_id / "checkpoints" / "150").mkdir(parents=True)
  watch = watch_lib.Watch(tmp_path)
  watch.refresh()
  assert watch.runs[specs[0].run_id].flops_total == pytest.approx(
      specs[0].budget.flops_total)


def test_a_failure_that_is_asked_for_again_is_waiting(
    specs: list[sweep.RunSpec], write_run: WriteRun,
    tmp_path: pathlib.Path) -> None:
  write_run(specs[0], "failed", 3, status_reason="no luck")
  watch = watch_lib.Watch(tmp_path)
  watch.refresh()
  run = watch.runs[specs[0].run_id]
  assert (run.state.status, run.flops_left, run.flops_settled) == (
      "failed", 0.0, 0.0)
  time.sleep(0.01)
  ledger.ask(tmp_path, [specs[0].run_id])
  watch.refresh()
  run = watch.runs[specs[0].run_id]
  assert run.state.status == "pending" and run.flops_left > 0
  assert run.state.reason.endswith("it failed before: no luck")


# --- The page's JSON ---------------------------------------------------------


def _snapshot(state: live_state.State, **place: Any) -> dict[str, Any]:
  state.refresh()
  return json.loads(state.snapshot(**place))


def test_before_the_sweep_there_is_a_word(tmp_path: pathlib.Path) -> None:
  found = _snapshot(live_state.State(tmp_path / "nowhere"))
  assert found["runs"] == [] and found["seconds_left"] is None
  assert "no sweep was launched" in found["problems"][0]
  (tmp_path / ledger.PLAN).write_text("{")
  assert "damaged" in _snapshot(live_state.State(tmp_path))["problems"][0]


def test_only_what_has_changed_is_sent(
    specs: list[sweep.RunSpec], write_run: WriteRun,
    tmp_path: pathlib.Path) -> None:
  state = live_state.State(tmp_path)
  write_run(specs[0], "complete", 10)
  write_run(specs[1], "running", 2)
  first = _snapshot(state)
  assert first["curves"].keys() == {spec.run_id for spec in specs[:2]}
  assert first["curves"][specs[1].run_id]["train"] == [[1, 2], [5.9, 5.8]]
  place = dict(epoch=first["epoch"], after=first["version"])
  assert _snapshot(state, **place)["curves"] == {}
  write_run(specs[1], "running", 1)
  assert _snapshot(state, **place)["curves"].keys() == {specs[1].run_id}
  other = dict(place, epoch="of another server")
  assert len(_snapshot(state, **other)["curves"]) == 2


def test_curves_come_bit_by_bit_and_then_all_are_there(
    specs: list[sweep.RunSpec], write_run: WriteRun, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(live_state, "_MOST_BYTES", 1)
  for spec in specs[:2]:
    write_run(spec, "running", 5)  # the third has no file
  state = live_state.State(tmp_path)
  behind = [_snapshot(state)["behind"] for _ in range(4)]
  assert behind == [True, True, False, False]
  assert len(json.loads(state.snapshot())["curves"]) == 2


def test_costs_are_sums_of_what_is_known(
    specs: list[sweep.RunSpec], write_run: WriteRun,
    tmp_path: pathlib.Path) -> None:
  write_run(specs[0], "complete", 10, price_usd=0.5, energy_kwh=None)
  write_run(specs[1], "running", 4)
  records.write_json(tmp_path / "cost.json", dict(
      total=dict(flops=1e9, device_seconds=70.0, price_usd=None), basis="sums"))
  cost = _snapshot(live_state.State(tmp_path))["cost"]
  assert cost["begun"] == 2
  assert cost["so_far"]["device_seconds"] == dict(sum=14.0, unknown=0)
  assert cost["so_far"]["price_usd"] == dict(sum=0.5, unknown=1)
  assert cost["so_far"]["co2e_kg"] == dict(sum=None, unknown=2)
  flops = sum(spec.budget.flops_total for spec in specs)
  assert cost["so_far"]["flops"]["sum"] == pytest.approx(14 / 60 * flops)
  assert cost["at_the_end"]["flops"] == pytest.approx(flops)
  assert cost["at_the_end"]["device_seconds"] == pytest.approx(60)
  assert cost["forecast"]["device_seconds"] == 70.0
  assert cost["forecast"]["price_usd"] is None and cost["basis"] == "sums"
  (tmp_path / "cost.json").write_text("[]")
  cost = _snapshot(live_state.State(tmp_path))["cost"]
  assert cost["forecast"] is None and "cannot be read" in cost["basis"]


def test_failures_come_with_reason_log_and_command(
    specs: list[sweep.RunSpec], write_run: WriteRun,
    tmp_path: pathlib.Path) -> None:
  write_run(specs[0], "failed", 3, status_reason="no luck",
            log_tail="the last words")
  log = write_run(specs[1], "diverged", 3, status_reason="nan") / ledger.LOG
  log.write_text("x" * 5000 + "\nend")
  path = write_run(specs[2], "running", 3) / watch_lib.RESULT
  path.write_text("{")
  found = _snapshot(live_state.State(tmp_path))
  failed, diverged, damaged = found["failures"]
  assert (failed["reason"], failed["log"]) == ("no luck", "the last words")
  assert diverged["log"].endswith("x\nend") and len(diverged["log"]) == 4000
  assert damaged["status"] == "damaged" and str(path) in damaged["reason"]
  assert [one["is_retried"] for one in found["failures"]] == [
      True, False, False]
  assert found["retry"].endswith(f"sweep.py retry --workdir={tmp_path}")


# --- The server --------------------------------------------------------------


@pytest.fixture(name="server")
def server_fixture(tmp_path: pathlib.Path) -> Iterator[live.Server]:
  """A server of tmp_path, whose report is that of `make_report`."""
  script = ("import pathlib, sys; d = pathlib.Path(sys.argv[1]); "
            "(d / 'figures').mkdir(exist_ok=True); "
            "(d / 'figures' / 'a.svg').write_text('<svg/>'); "
            "(d / 'report.html').write_text('the report')")
  with live.Server(tmp_path, 0, [
      sys.executable, "-c", script, str(tmp_path)]) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def _get(server: live.Server, path: str,
         host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
  connection = http.client.HTTPConnection(*server.server_address, timeout=10)
  with contextlib.closing(connection):
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_the_page_is_served_to_this_machine_alone(
    server: live.Server) -> None:
  assert server.server_address[0] == "127.0.0.1"
  status, body, headers = _get(server, "/")
  assert status == 200 and b"page.js" in body
  assert "default-src 'none'" in headers["Content-Security-Policy"]
  for name in ("page.js", "chart.js", "words.js", "style.css"):
    status, body, _ = _get(server, f"/{name}")
    assert status == 200
    assert b"http" not in body.replace(b"http://www.w3.org/2000/svg", b"")
  assert _get(server, "/state.json?epoch=%00&after=-1")[0] == 200
  assert _get(server, "/", "localhost:9999")[0] == 200  # through a tunnel
  for host in ("evil.example", f"evil.example:{server.server_address[1]}",
               "127.0.0.1.evil.example", "[::1]"):
    assert _get(server, "/state.json", host)[0] == 403


def test_no_address_is_a_path(server: live.Server,
                              tmp_path: pathlib.Path) -> None:
  (tmp_path / "secret.svg").write_text("secret")
  for path in ("/../secret.svg", "/figures/../secret.svg", "/secret.svg",
               "/figures/..%2fsecret.svg", "/page/../live.py", "//etc/passwd",
               "/figures/", "/report.html"):
    status, body, _ = _get(server, path)
    assert status == 404 and b"secret" not in body


def test_the_report_is_made_once_all_has_ended(
    server: live.Server, specs: list[sweep.RunSpec], write_run: WriteRun,
    tmp_path: pathlib.Path) -> None:
  def report() -> dict[str, Any]:
    time.sleep(0.6)  # answers may be half a second old
    return json.loads(_get(server, "/state.json")[1])["report"]
  for spec in specs[:2]:
    write_run(spec, "complete", spec.budget.steps)
  assert report() == dict(state="none", text="", figures=[])
  write_run(specs[2], "failed", 3)
  end = time.monotonic() + 30
  while (found := report())["state"] == "making":
    assert time.monotonic() < end
  assert found == dict(state="ready", text="", figures=["a"])
  assert _get(server, "/report.html")[1] == b"the report"
  assert _get(server, "/figures/a.svg")[1] == b"<svg/>"
  # A run that is taken up again: the report is of an earlier state.
  (tmp_path / specs[2].run_id / watch_lib.RESULT).unlink()
  assert report() == dict(state="old", text="", figures=[])


def test_a_report_that_cannot_be_made_is_said_so(
    specs: list[sweep.RunSpec], write_run: WriteRun,
    tmp_path: pathlib.Path) -> None:
  for spec in specs:
    write_run(spec, "complete", spec.budget.steps)
  report = live.Report(tmp_path, [
      sys.executable, "-c", "raise SystemExit('no fit: too few')"])
  names = [spec.run_id for spec in specs]
  report.update(names, True)
  end = time.monotonic() + 30
  while report.state == "making" and time.monotonic() < end:
    time.sleep(0.05)
  report.update(names, True)  # not again for the same runs
  assert (report.state, report.text) == ("failed", "no fit: too few")


def test_a_taken_port_is_named(server: live.Server,
                               tmp_path: pathlib.Path) -> None:
  port = server.server_address[1]
  with pytest.raises(live.ServeError, match=f"port {port} .*--port=0"):
    live.Server(tmp_path, port, [])
  with pytest.raises(live.ServeError, match="between 0 and 65535"):
    live.Server(tmp_path, 70_000, [])


def test_refreshing_is_cheap(base: ml_collections.ConfigDict,
                             write_run: WriteRun,
                             tmp_path: pathlib.Path) -> None:
  """200 runs with 1000 rows each, of which 8 go on."""
  spec, = sweep.plan(base, [{"duration.steps": 1000, "data.max_epochs": 99.0}])
  write_run(spec, "complete", 1000)
  ledger.write_plan(tmp_path, "some", [spec])
  path = tmp_path / ledger.PLAN
  plan = json.loads(path.read_text())
  row, = plan["runs"]
  plan["runs"] = [dict(row, run_id=f"run-{number}") for number in range(200)]
  plan["sweeps"] = dict(some=[one["run_id"] for one in plan["runs"]])
  path.write_text(json.dumps(plan))
  for one in plan["runs"]:
    (tmp_path / one["run_id"]).mkdir()
    for name in ("config.json", watch_lib.METRICS, watch_lib.RESULT):
      os.link(tmp_path / spec.run_id / name, tmp_path / one["run_id"] / name)
  state = live_state.State(tmp_path)
  while _snapshot(state)["behind"]:
    pass
  lines = (tmp_path / spec.run_id / watch_lib.METRICS).read_text()
  for one in plan["runs"][:8]:
    metrics = tmp_path / one["run_id"] / watch_lib.METRICS
    metrics.unlink()
    metrics.write_text(lines)
  _snapshot(state)
  for one in plan["runs"][:8]:
    with open(tmp_path / one["run_id"] / watch_lib.METRICS, "a",
              encoding="utf-8") as file:
      file.write(_row(1001, 1.0))
  place = dict(epoch=state.epoch, after=json.loads(state.snapshot())["version"])
  begun = time.process_time()
  found = _snapshot(state, **place)
  # 20 ms on the machine that it was written on.
  assert time.process_time() - begun < 0.5
  assert len(found["curves"]) == 8 and len(found["runs"]) == 200
