# SPDX-License-Identifier: Apache-2.0
"""Which rows and columns reach a fit, and what is said of the others."""

import decimal

import numpy as np
import pandas as pd
import pytest

from tfjax import scaling
from tfjax.scaling import laws
from tfjax.scaling import table

CHINCHILLA = laws.get("chinchilla")


def made_up(rows: int = 8, **changes) -> pd.DataFrame:
  """Runs from small to large, 20 tokens a parameter."""
  params = np.geomspace(1e6, 1e8, rows)
  frame = pd.DataFrame({"params": params, "tokens": 20 * params,
                        "loss": 2 + 100 / params**0.3})
  return frame.assign(**changes)


def prepare(frame, law="chinchilla", columns=(), holdout=0, **options):
  return table.prepare(frame, laws.get(law), columns=dict(columns),
                       holdout=holdout, **options)


def reasons(made: table.Table) -> dict[str, str]:
  return {e.run: e.reason for e in made.excluded}


def with_value(column: str, value: object, row: int = 3) -> pd.DataFrame:
  """The made-up table with one value changed."""
  frame = made_up().astype({column: object} if column in made_up() else {})
  frame.loc[row, column] = value
  return frame


# --- Columns -----------------------------------------------------------------


def test_a_plain_table_becomes_axes_target_and_cost():
  frame = made_up()[::-1]
  made = prepare(frame, holdout=2)
  assert list(made.fitted) == ["run", "row", "params", "tokens", "loss",
                               "recorded_flops", "flops", "weight", "group"]
  # From the smallest to the largest, places being the given frame's.
  assert made.fitted["row"].tolist() == [7, 6, 5, 4, 3, 2]
  assert made.held_out["row"].tolist() == [1, 0]
  assert made.fitted["run"][0] == made.fitted["group"][0] == "row 0"
  assert made.fitted["flops"][0] == pytest.approx(6 * 1e6 * 20e6)
  assert made.fitted["recorded_flops"].isna().all()
  assert (made.fitted["weight"] == 1).all()
  assert made.conventions == {"params": "params", "tokens": "tokens",
                              "loss": "loss", "flops": "6 N D"}


def test_names_of_run_records_come_first_and_a_choice_before_them():
  frame = made_up().rename(columns={"tokens": "tokens_seen"})
  frame["params_total"] = frame["params"] * 1.5
  frame["params_active"] = frame["params"] / 2
  made = prepare(frame)
  assert made.fitted["params"][0] == 1.5e6
  assert made.conventions["params"] == "params_total"
  assert made.conventions["tokens"] == "tokens_seen"
  assert made.conventions["notes"] == (
      "params is params_total; the table also has params, which differs")
  made = prepare(frame, columns={"params": "params_active", "tokens": None})
  assert made.fitted["params"][0] == 0.5e6
  assert made.conventions["params"] == "params_active"
  assert "notes" not in made.conventions


def test_two_columns_that_agree_need_no_note():
  frame = made_up()
  made = prepare(frame.assign(params_total=frame["params"]))
  assert "notes" not in made.conventions


def test_recorded_flops_are_used_and_gaps_are_told():
  frame = made_up()
  frame["flops"] = 7 * frame["params"] * frame["tokens"]
  made = prepare(frame)
  assert made.fitted["flops"][0] == pytest.approx(7 * 1e6 * 20e6)
  assert made.conventions["flops"] == "flops"
  frame.loc[0, "flops"] = np.nan
  made = prepare(frame)
  assert made.fitted["flops"][0] == pytest.approx(6 * 1e6 * 20e6)
  assert np.isnan(made.fitted["recorded_flops"][0])
  assert made.conventions["notes"] == (
      "flops are 6 N D in 1 of 8 rows, without flops")


def test_flops_and_tokens_per_parameter_are_derived():
  made = prepare(made_up(), "overtraining")
  assert made.fitted["tokens_per_parameter"].to_numpy() == pytest.approx(20)
  assert made.fitted["flops"][0] == pytest.approx(1.2e14)
  assert made.conventions["flops"] == "6 N D"
  assert made.conventions["tokens_per_parameter"] == "D / N"
  made = prepare(made_up(tokens_per_parameter=30.0), "overtraining")
  assert made.fitted["tokens_per_parameter"].to_numpy() == pytest.approx(30)
  assert made.conventions["tokens_per_parameter"] == "tokens_per_parameter"


def test_negative_counts_do_not_multiply_to_a_cost():
  frame = made_up()
  frame.loc[2, ["params", "tokens"]] *= -1
  made = prepare(frame, "compute")
  assert reasons(made) == {
      "row 2": "6 N D is nan; must be positive and finite"}


def test_width_and_depth_by_either_name():
  frame = made_up(d_model=np.arange(64, 72), num_layers=4)
  made = prepare(frame, "width_depth")
  assert made.fitted["width"].tolist() == list(range(64, 72))
  assert made.conventions["depth"] == "num_layers"
  made = prepare(frame, "width_depth", columns={"depth": "d_model"})
  assert made.fitted["depth"].tolist() == list(range(64, 72))


def test_every_law_finds_its_axes_under_their_own_names():
  for law in laws.LAWS.values():
    count = len(law.axes)
    frame = pd.DataFrame(
        {axis: np.geomspace(1e4, 1e6, 6) * (count - k)
         for k, axis in enumerate(law.axes)} | {
             law.target: np.linspace(0.9, 0.5, 6)})
    made = prepare(frame, law.name, space=law.space, holdout=1)
    for axis in (*law.axes, law.target):
      assert made.conventions[axis] == axis, law.name
      assert set(made.fitted[axis]) <= set(frame[axis]), law.name
    assert len(made.fitted) == 5, law.name


def test_without_a_cost_the_largest_run_has_the_least_loss():
  frame = pd.DataFrame({"loss": [2.0, 3.0, 2.5, 4.0],
                        "error": [0.5, 0.7, 0.6, 0.8]})
  made = prepare(frame, "downstream_error", space="linear", holdout=1)
  assert made.fitted["loss"].tolist() == [4.0, 3.0, 2.5]
  assert made.held_out["error"].tolist() == [0.5]
  assert made.fitted["flops"].isna().all()
  made = prepare(made_up().drop(columns="tokens")[::-1], "kaplan_params",
                 holdout=1)
  assert made.held_out["params"].tolist() == [1e8]


def test_a_missing_column_is_named_with_its_law():
  with pytest.raises(scaling.TableError, match=(
      "no column 'tokens_seen' or 'tokens', the tokens of law 'chinchilla'; "
      "it has params, loss")):
    prepare(made_up().drop(columns="tokens"))
  with pytest.raises(scaling.TableError, match="no column 'N'; it has params"):
    prepare(made_up(), columns={"params": "N"})


def test_a_choice_for_an_axis_that_the_law_lacks():
  with pytest.raises(scaling.TableError, match=(
      "'chinchilla' has no axis 'width' to take from a column; it has params, "
      "tokens, loss, flops")):
    prepare(made_up(), columns={"width": "params"})


def test_a_column_that_is_there_twice():
  frame = pd.concat([made_up(), made_up()[["loss"]]], axis=1)
  with pytest.raises(scaling.TableError, match="2 columns called 'loss'"):
    prepare(frame)


# --- Values ------------------------------------------------------------------


@pytest.mark.parametrize("column", ["params", "tokens", "loss"])
@pytest.mark.parametrize("value, shown", [
    (np.nan, "nan"), (np.inf, "inf"), (0.0, "0"), (-1.0, "-1"), (None, "nan")])
def test_numbers_that_no_run_can_have(column, value, shown):
  made = prepare(with_value(column, value))
  assert reasons(made) == {
      "row 3": f"{column} is {shown}; must be positive and finite"}
  assert made.fitted["row"].tolist() == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("value", [0.0, -1e18, np.inf])
def test_flops_that_no_run_can_have(value):
  frame = made_up()
  frame["flops"] = 6 * frame["params"] * frame["tokens"]
  frame.loc[3, "flops"] = value
  assert reasons(prepare(frame)) == {
      "row 3": f"flops is {value:g}; must be positive and finite, or empty"}


@pytest.mark.parametrize("value", ["3.1", "n/a", True, 1j, [3.1]])
@pytest.mark.parametrize("column", ["loss", "tokens"])
def test_what_is_no_number_is_named_with_its_row(column, value):
  frame = made_up().astype({column: object})
  frame.at[3, column] = value
  with pytest.raises(scaling.TableError) as error:
    prepare(frame)
  assert str(error.value) == (
      f"column {column!r} must hold numbers; row 3 has {value!r}")


def test_complex_numbers_are_no_numbers():
  with pytest.raises(scaling.TableError, match="must hold numbers; row 0 has"):
    prepare(made_up(loss=made_up()["loss"] + 1j))


def test_text_that_is_not_needed_is_left_alone():
  frame = made_up().rename(columns={"params": "params_total"})
  made = prepare(frame.assign(params="125M"))  # for readers
  assert made.conventions["params"] == "params_total"
  frame = pd.DataFrame({"loss": [4.0, 3, 2], "error": [0.8, 0.7, 0.6],
                        "params": "125M", "tokens": 1e9})
  made = prepare(frame, "downstream_error", space="linear")
  assert made.fitted["flops"].isna().all()
  assert made.conventions["flops"] is None


@pytest.mark.parametrize("kind", [object, "Float64", "category", np.float32])
def test_numbers_of_any_type_are_numbers(kind):
  frame = made_up()
  made = prepare(frame.astype({"loss": kind}))
  assert made.fitted["loss"].dtype == np.float64
  assert made.fitted["loss"].to_numpy() == pytest.approx(frame["loss"])


def test_decimals_and_missing_values_in_a_column_of_objects():
  frame = with_value("loss", decimal.Decimal("2.5"))
  frame.loc[4, "loss"] = pd.NA
  made = prepare(frame)
  assert made.fitted["loss"][3] == 2.5
  assert reasons(made) == {"row 4": "loss is nan; must be positive and finite"}


@pytest.mark.parametrize("space, kept", [("log", 3), ("linear", 4)])
def test_shares_may_be_zero_only_where_they_have_no_logarithm(space, kept):
  frame = pd.DataFrame({"loss": [4.0, 3.0, 2.5, 2.0, 1.9],
                        "accuracy": [0.0, 0.2, 0.3, 0.4, 40.0]})
  made = prepare(frame, "downstream_accuracy", space=space)
  assert len(made.fitted) == kept
  assert reasons(made)["row 4"] == (
      "accuracy is 40; must be a share from 0 to 1, not per cent")


def test_a_loss_below_zero_is_none_in_linear_space_either():
  assert "row 3" in reasons(prepare(with_value("loss", -1.0), space="linear"))


def test_other_targets_may_be_negative_in_linear_space():
  frame = pd.DataFrame({"params": np.geomspace(1e6, 1e8, 4),
                        "tokens": 1e9, "learning_rate": [3, 2, -1, 1.0]})
  assert len(prepare(frame, "learning_rate", space="linear").fitted) == 4
  assert len(prepare(frame, "learning_rate", space="log").fitted) == 3


def test_more_unique_tokens_than_tokens():
  frame = made_up()
  frame["unique_tokens"] = frame["tokens"]
  frame.loc[0, "unique_tokens"] = 3e7
  assert reasons(prepare(frame, "data_constrained")) == {
      "row 0": "3e+07 unique tokens are more than the 2e+07 that were seen"}


def test_a_target_that_never_moves():
  with pytest.raises(scaling.TableError, match="loss is 3 in every row"):
    prepare(made_up(loss=3.0))


def test_an_axis_that_never_moves_is_left_to_the_fit():
  assert len(prepare(made_up(tokens=1e9)).fitted) == 8


# --- Runs --------------------------------------------------------------------


def test_unfinished_runs_are_left_out_with_what_is_known_of_them():
  frame = made_up(run_id=list("abcdefgh"), status="complete",
                  status_reason=None)
  frame["status_reason"] = frame["status_reason"].astype(object)
  frame.loc[0, ["status", "status_reason"]] = "diverged", "loss was inf"
  frame.loc[1, "status"] = "interrupted"
  frame.loc[2, ["status", "status_reason"]] = "stopped", "number 3 of 4"
  frame.loc[3, "status"] = "crashed"
  frame.loc[4, "status"] = None
  frame.loc[0, "loss"] = np.nan  # The status comes first.
  made = prepare(frame)
  assert reasons(made) == {
      "a": "diverged: loss was inf", "b": "interrupted",
      "c": "stopped: number 3 of 4",
      "d": "status is 'crashed', not 'complete'",
      "e": "status is nan, not 'complete'"}
  assert made.fitted["run"].tolist() == ["f", "g", "h"]


def test_a_run_without_a_name_has_its_place():
  frame = made_up(run_id=["a", None, *"cdefgh"])
  assert prepare(frame).fitted["run"].tolist()[:2] == ["a", "row 1"]


def test_a_run_that_is_listed_twice_counts_once():
  frame = made_up(run_id=list("abcdefgh"))
  made = prepare(pd.concat([frame, frame[2:3]], ignore_index=True))
  assert reasons(made) == {"c": "repeats another row"}
  assert made.fitted["row"].tolist() == list(range(8))


def test_checkpoints_and_sweeps_do_not_repeat_a_run():
  frame = made_up(run_id="a")  # Eight checkpoints of one run.
  made = prepare(frame)
  assert len(made.fitted) == 8 and set(made.fitted["group"]) == {"a"}
  both = pd.concat([frame.assign(sweep="one"), frame.assign(sweep="two")])
  assert len(prepare(both).fitted) == 16
  # Of L(N), checkpoints differ in tokens that are no axis.
  assert len(prepare(made_up(run_id="a", params=[1e6] * 4 + [1e7] * 4),
                     "kaplan_params").fitted) == 8


def test_runs_of_two_names_are_two_runs():
  frame = made_up(run_id=list("abcdefgh"))
  for loss in (frame["loss"][2], 3.5):
    other = frame[2:3].assign(run_id="seed 1", loss=loss)
    assert len(prepare(pd.concat([frame, other])).fitted) == 9


def test_a_run_with_two_losses_has_none():
  frame = made_up(run_id=list("abcdefgh"))
  made = prepare(pd.concat([frame, frame[2:3].assign(loss=3.5)]))
  assert [(e.run, e.reason) for e in made.excluded] == [
      ("c", "contradicts another row of the same run in its loss")] * 2


def test_an_unfinished_run_does_not_hide_its_relaunch():
  frame = made_up(run_id=list("abcdefgh"), status="complete")
  killed = frame[2:3].assign(status="interrupted")
  made = prepare(pd.concat([killed, frame, frame[2:3]], ignore_index=True))
  assert [e.reason for e in made.excluded] == [
      "interrupted", "repeats another row"]
  assert made.fitted["row"].tolist() == list(range(1, 9))


def test_a_copied_row_without_a_name_counts_once():
  frame = made_up()
  made = prepare(pd.concat([frame, frame[2:3]], ignore_index=True))
  assert reasons(made) == {"row 8": "repeats another row"}


def test_rows_that_may_be_seeds_all_count():
  frame = made_up()
  again = pd.concat([frame, frame[2:3]], ignore_index=True)
  # Another column tells them apart,
  assert len(prepare(again.assign(seed=[0] * 8 + [1])).fitted) == 9
  # or the losses are too short to: 2.19 twice is no wonder.
  assert len(prepare(again.assign(loss=again["loss"].round(3))).fitted) == 9
  assert len(prepare(again.assign(loss=again["loss"].round(4))).fitted) == 8


def test_groups():
  frame = made_up(model=["x"] * 4 + ["y"] * 3 + [None])
  made = prepare(frame, group="model")
  assert made.fitted["group"].tolist() == ["x"] * 4 + ["y"] * 3
  assert reasons(made) == {"row 7": "its group is unknown"}
  with pytest.raises(scaling.TableError, match="no column 'family'"):
    prepare(frame, group="family")


@pytest.mark.parametrize("rows, holdout, usable", [(2, 0, 2), (8, 6, 8)])
def test_too_few_runs(rows, holdout, usable):
  with pytest.raises(scaling.TableError, match=(
      f"too few runs to fit: {usable} in the table, 0 not usable, {holdout} "
      "held out; at least 3")):
    prepare(made_up(rows), holdout=holdout)


def test_too_few_runs_says_why_the_others_are_not_usable():
  frame = made_up(4)
  frame.loc[1:2, "loss"] = np.nan
  with pytest.raises(scaling.TableError, match="row 1: loss is nan"):
    prepare(frame)
  with pytest.raises(scaling.TableError, match="0 in the table"):
    prepare(frame[:0])


# --- Weights -----------------------------------------------------------------


def test_weights_are_used_as_they_are():
  frame = made_up(w=[1.0, 2, 3, 4, 0, np.nan, -1, np.inf])
  made = prepare(frame, weights="w")
  assert made.fitted["weight"].tolist() == [1, 2, 3, 4]
  assert reasons(made) == {
      f"row {row}": f"w is {value}; must be positive and finite"
      for row, value in {4: "0", 5: "nan", 6: "-1", 7: "inf"}.items()}


def test_standard_errors_become_weights_of_mean_one():
  frame = made_up(4, loss=[4.0, 3, 2, 1], error=[0.1, 0.1, 0.2, 0.1])
  # 1 / error^2 is 100, 100, 25, 100: of mean 75 over the first three.
  made = prepare(frame, stderr="error", space="linear", holdout=1)
  assert made.fitted["weight"].tolist() == pytest.approx([4/3, 4/3, 1/3])
  assert made.held_out["weight"].tolist() == pytest.approx([4/3])
  # (loss / error)^2 is 1600, 900, 100.
  made = prepare(frame, stderr="error", space="log", holdout=1)
  assert made.fitted["weight"].to_numpy() * 2600 / 3 == pytest.approx(
      [1600, 900, 100])


@pytest.mark.parametrize("value, shown", [
    (0.0, "0"), (-0.1, "-0.1"), (np.nan, "nan"), (np.inf, "inf")])
def test_standard_errors_that_cannot_be(value, shown):
  frame = made_up(error=0.1)
  frame.loc[3, "error"] = value
  assert reasons(prepare(frame, stderr="error")) == {
      "row 3": f"error is {shown}; must be positive and finite"}


def test_weights_and_standard_errors_at_once():
  with pytest.raises(scaling.TableError, match="two answers to one question"):
    prepare(made_up(w=1.0), weights="w", stderr="w")


# --- What must be one --------------------------------------------------------


@pytest.mark.parametrize("column, one, other", [
    ("tokenizer", "bpe-1024", "byte"), ("vocab_size", 1024.0, 256.0),
    ("objective", "causal", "masked"), ("corpus", "sotu", "stdlib"),
    ("loss_counts", "all tokens", "masked tokens"),
    ("flops_convention", "6 N D", "6 N D + 12 L T d_model D")])
def test_runs_that_cannot_be_compared(column, one, other):
  frame = made_up(run_id=list("abcdefgh"),
                  **{column: [one] * 6 + [other] * 2})
  with pytest.raises(scaling.TableError) as error:
    prepare(frame)
  message = str(error.value)
  assert f"not comparable, they differ in {column}: " in message
  one, other = (int(v) if isinstance(v, float) else v for v in (one, other))
  assert f"{one!r} in 6 (a, b, c, ...)" in message
  assert f"{other!r} in 2 (g, h)" in message
  # What the message advises works.
  advice = message.rsplit("Fit each kind by itself: ", 1)[1]
  assert advice == f"frame[frame[{column!r}] == {min(one, other, key=str)!r}]"


def test_an_unknown_tokenizer_is_another_tokenizer():
  frame = made_up(tokenizer=["bpe"] * 7 + [None])
  with pytest.raises(scaling.TableError) as error:
    prepare(frame)
  assert "unknown in 1 (row 7)" in str(error.value)
  assert str(error.value).endswith("frame[frame['tokenizer'] == 'bpe']")


def test_what_is_shared_is_a_convention():
  made = prepare(made_up(tokenizer="bpe", vocab_size=1024.0, corpus=None))
  assert made.conventions["tokenizer"] == "bpe"
  assert made.conventions["vocab_size"] == 1024
  assert isinstance(made.conventions["vocab_size"], int)
  assert made.conventions["corpus"] is None


def test_schedules_that_differ_are_told():
  frame = made_up(schedule=["cosine"] * 3 + ["wsd"] * 4 + [None])
  assert prepare(frame).conventions["notes"] == (
      "runs of several learning-rate schedules are fitted as one, 3 of cosine "
      "and 4 of wsd: give each a workdir of its own")
  frame.loc[3:6, "loss"] = np.nan
  assert "notes" not in prepare(frame).conventions


def test_excluded_runs_do_not_make_a_mixture():
  frame = made_up(tokenizer=["bpe"] * 7 + ["byte"])
  frame.loc[7, "loss"] = np.nan
  assert prepare(frame).conventions["tokenizer"] == "bpe"


# --- Units -------------------------------------------------------------------


@pytest.mark.parametrize("column, factor", [("params", 1e-6), ("tokens", 1e-9)])
def test_a_column_of_millions_or_billions(column, factor):
  frame = made_up()
  frame[column] *= factor
  with pytest.raises(scaling.TableError, match=(
      f"{column} has a median of .*; must be the count itself, not thousands, "
      "millions or billions")):
    prepare(frame)


@pytest.mark.parametrize("column, factor", [
    ("params", 1e-3), ("tokens", 1 / 2048), ("flops", 1 / 8.64e19),
    ("flops", 1e-12)])
def test_units_that_do_not_go_together(column, factor):
  frame = made_up()
  frame["flops"] = 6 * frame["params"] * frame["tokens"]
  frame[column] *= factor
  with pytest.raises(scaling.TableError, match=(
      r"flops / \(params \* tokens\) has a median of .* about 6 FLOPs a "
      "parameter and token, so a unit is wrong")):
    prepare(frame)


@pytest.mark.parametrize("ratio", [0.3, 2, 6, 8, 200])
def test_conventions_of_flops_are_no_mistake_of_units(ratio):
  frame = made_up()
  frame["flops"] = ratio * frame["params"] * frame["tokens"]
  assert len(prepare(frame).fitted) == 8


def test_a_wrong_unit_in_one_row():
  frame = made_up()
  frame["flops"] = 6 * frame["params"] * frame["tokens"]
  frame.loc[3, "flops"] *= 1e-15
  frame.loc[4, "tokens"] = 0.4
  made = prepare(frame)
  assert list(reasons(made)) == ["row 3", "row 4"]
  assert reasons(made)["row 3"].startswith(
      "flops / (params * tokens) is 6e-15; ")
  assert reasons(made)["row 4"].startswith("tokens is 0.4; must be the count")


def test_tokens_per_parameter_of_two_units():
  frame = made_up()
  frame["flops"] = 6 * frame["params"] * frame["tokens"]
  frame["tokens"] /= 1e9
  with pytest.raises(scaling.TableError, match=(
      "tokens per parameter has a median of 2e-08; a unit is wrong")):
    prepare(frame, "overtraining")


def test_compute_may_have_a_unit_of_its_own():
  frame = made_up(flops=np.geomspace(1e-6, 1, 8))  # PFLOP-days
  assert len(prepare(frame, "compute").fitted) == 8
