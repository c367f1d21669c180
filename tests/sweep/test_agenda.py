# SPDX-License-Identifier: Apache-2.0
"""What is next in a sweep, as the records of its runs stand."""

import pathlib
from typing import Any, Callable

import ml_collections
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import agenda as agenda_lib
from tfjax.sweep import ledger
from tfjax.train import lease
from tfjax.train import records


class Shop:
  """A planned sweep, its agenda, and the records that its runs leave."""

  def __init__(self, workdir: pathlib.Path, specs: list[sweep.RunSpec],
               **others: Any):
    self.workdir, self.specs, self._others = workdir, specs, others
    ledger.write_plan(workdir, "test", specs)
    self.agenda = self.another()

  def another(self) -> agenda_lib.Agenda:
    return agenda_lib.Agenda(self.specs, self.workdir, **self._others)

  def take(self) -> list[int] | None:
    """The places of the runs that are next."""
    unit = self.agenda.take()
    if unit is None:
      return None
    self.unit = unit
    return [self.specs.index(spec) for spec in unit.specs]

  def write(self, index: int, status: str, **others: Any) -> None:
    spec = self.specs[index]
    records.write_result(self.workdir / spec.run_id, dict(
        run_id=spec.run_id, status=status,
        config_hash=config_lib.config_hash(spec.config), **others))

  def do(self, index: int, status: str = "complete") -> None:
    """Takes a run, which ends so."""
    assert self.take() == [index]
    self.write(index, status)
    self.agenda.back(self.unit)

  def directory(self, index: int) -> pathlib.Path:
    return self.workdir / self.specs[index].run_id


@pytest.fixture(name="shop")
def shop_fixture(base: ml_collections.ConfigDict, tmp_path: pathlib.Path
                 ) -> Callable[..., Shop]:
  def make(changes: dict[str, Any], *cells: dict[str, Any],
           **others: Any) -> Shop:
    config_lib.override(base, {"sweep.ensemble": "off"} | changes)
    return Shop(tmp_path, sweep.plan(base, cells), **others)
  return make


STEPS = [{"duration.steps": steps} for steps in (10, 30, 20)]


def test_the_longest_comes_first_and_all_are_done_once(shop: Callable) -> None:
  sweep_ = shop({}, *STEPS)
  assert [sweep_.take() for _ in range(4)] == [[1], [2], [0], None]
  sweep_ = shop({}, *STEPS)
  sweep_.do(1)
  assert sweep_.take() == [2]
  sweep_.agenda.back(sweep_.unit)  # its worker has died
  assert sweep_.take() == [2]
  sweep_.agenda.put_off(sweep_.unit)
  sweep_.agenda.back(sweep_.unit)
  sweep_.do(0, "diverged")
  assert not sweep_.agenda.done
  sweep_.do(2, "stopped")
  assert sweep_.agenda.done and sweep_.take() is None
  assert [spec.run_id for spec in sweep_.agenda.settled()] == [
      sweep_.specs[index].run_id for index in (1, 0, 2)]
  assert sweep_.agenda.settled() == []


def test_another_s_run_is_left_and_taken_over(shop: Callable) -> None:
  sweep_ = shop({}, *STEPS)
  sweep_.directory(1).mkdir()
  with lease.hold(sweep_.directory(1)):
    sweep_.do(2)
    sweep_.do(0)
    assert sweep_.take() is None and not sweep_.agenda.done
  assert sweep_.take() == [1]


def test_a_failure_is_tried_again_once_it_is_asked_for(shop: Callable) -> None:
  sweep_ = shop({}, *STEPS)
  sweep_.write(1, "failed")
  assert sweep_.take() == [2]  # it failed since it was asked for
  ledger.ask(sweep_.workdir, [sweep_.specs[1].run_id])
  sweep_.agenda = sweep_.another()
  sweep_.do(1, "failed")
  assert sweep_.take() == [2]
  sweep_.agenda = sweep_.another()  # as another launcher has it
  assert sweep_.take() == [2]


def test_a_record_of_another_config_settles_nothing(shop: Callable) -> None:
  sweep_ = shop({}, *STEPS)
  sweep_.write(1, "complete")
  path = sweep_.directory(1) / "result.json"
  path.write_text(path.read_text().replace('"config_hash": "', '"config_hash"'
                                           ': "x'))
  assert sweep_.take() == [1]


WSD = {"optimizer.schedule": "wsd", "sweep.share_trunk": True,
       "optimizer.warmup_steps": 1}


def _trunk(shop: Callable) -> tuple[Shop, int, int]:
  sweep_ = shop(WSD, {"duration.steps": 10}, {"duration.steps": 30})
  assert sweep_.take() == [1]
  step, = sweep_.unit.options["keep_steps"]
  return sweep_, 1, step


def test_a_branch_waits_for_its_trunk_s_checkpoint(shop: Callable) -> None:
  sweep_, trunk, step = _trunk(shop)
  assert sweep_.take() is None
  (sweep_.directory(trunk) / "checkpoints" / str(step)).mkdir(parents=True)
  assert sweep_.take() == [0]
  assert sweep_.unit.options["branch"] == dict(
      run_id=sweep_.specs[trunk].run_id, step=step)


def test_a_later_launch_of_what_is_left_knows_the_trunk(
    shop: Callable) -> None:
  """Neither does a branch begin anew, nor is it taken for another's trunk."""
  sweep_ = shop(WSD, *STEPS)
  assert sweep_.take() == [1]
  for step in sweep_.unit.options["keep_steps"]:
    (sweep_.directory(1) / "checkpoints" / str(step)).mkdir(parents=True)
  sweep_.write(1, "complete")
  sweep_.agenda = agenda_lib.Agenda(
      [sweep_.specs[0], sweep_.specs[2]], sweep_.workdir)
  assert sweep_.take() == [2]
  given = sweep_.unit.options
  assert given["branch"]["run_id"] == sweep_.specs[1].run_id
  assert "keep_steps" not in given
  assert sweep_.take() == [0]
  assert sweep_.unit.options["branch"]["run_id"] == sweep_.specs[1].run_id


def test_a_branch_goes_on_alone_once_its_trunk_has_failed(
    shop: Callable) -> None:
  sweep_, trunk, _ = _trunk(shop)
  sweep_.write(trunk, "failed")
  sweep_.agenda.back(sweep_.unit)
  assert sweep_.take() == [0]
  # Asked for again, the trunk has another try, and the branch waits for it.
  ledger.write_plan(sweep_.workdir, "test", sweep_.specs)
  sweep_.agenda = sweep_.another()
  assert sweep_.take() == [trunk] and sweep_.take() is None


def test_what_waits_for_nobody_goes_on_alone(
    shop: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
  """Its trunk was stopped by a person, and nobody here goes on with it."""
  sweep_, trunk, _ = _trunk(shop)
  sweep_.write(trunk, "interrupted")
  sweep_.agenda.leave(sweep_.specs[trunk])
  assert sweep_.take() is None
  assert sweep_.take() is None  # somebody may take it up yet
  monkeypatch.setattr(agenda_lib, "_STUCK_SECONDS", 0.0)
  assert sweep_.take() == [0]


def test_rungs_are_waited_for_and_the_worst_is_stopped(shop: Callable) -> None:
  rates = [{"optimizer.learning_rate": rate} for rate in (1e-3, 2e-3)]
  sweep_ = shop({"sweep.halving": 2, "sweep.halving_start": 0.25,
                 "duration.steps": 20, "train.log_every_steps": 1}, *rates)
  for place in range(2):
    index, = sweep_.take()
    if place == 1:
      assert sweep_.take() is None  # the first has come to the rung
    assert sweep_.unit.options == dict(until_step=5)
    sweep_.directory(index).mkdir(exist_ok=True)
    (sweep_.directory(index) / "metrics.jsonl").write_text("".join(
        f'{{"kind": "train", "step": {step}, "loss": {2 + index}}}\n'
        for step in range(1, 6)))
    sweep_.write(index, "interrupted", steps=5)
    sweep_.agenda.back(sweep_.unit)
  assert sweep_.take() == [0]
  assert sweep_.unit.options == dict(until_step=None)
  assert sweep_.take() is None
  assert [spec.run_id for spec in sweep_.agenda.settled()] == [
      sweep_.specs[1].run_id]
  state = ledger.run_state(sweep_.workdir, sweep_.specs[1].run_id)
  assert state.status == "stopped"


def test_an_ensemble_is_one_unit_until_it_is_broken_up(
    shop: Callable) -> None:
  seeds = [{"seed": seed} for seed in range(4)]
  sweep_ = shop({"sweep.ensemble": "on"}, *seeds)
  assert sweep_.take() == [0, 1, 2, 3] and sweep_.take() is None
  assert sweep_.unit.runner == agenda_lib.ENSEMBLE_RUNNER
  sweep_.write(2, "complete")
  sweep_.agenda.back(sweep_.unit)
  assert sweep_.take() == [0, 1, 3]
  for index in (0, 1, 3):
    sweep_.write(index, "failed")
  sweep_.agenda.break_up(sweep_.unit)
  # Others know of it, too.
  asked_at = [row["asked_at"] for row in ledger.read_plan(
      sweep_.workdir)["runs"]]
  assert min(asked_at[index] for index in (0, 1, 3)) > asked_at[2]
  sweep_.agenda.back(sweep_.unit)
  assert {sweep_.take()[0] for _ in range(3)} == {0, 1, 3}
  assert sweep_.unit.runner == agenda_lib.RUNNER
  sweep_ = shop({"sweep.ensemble": "on"}, *seeds, runner="mine:run")
  assert len(sweep_.take()) == 1
