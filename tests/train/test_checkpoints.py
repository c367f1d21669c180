# SPDX-License-Identifier: Apache-2.0
"""Nothing saved is lost, and nothing damaged is trusted."""

import contextlib
import json
import logging
import os
import pathlib
import re
import resource
import shutil
import subprocess
import threading
from typing import Any, Callable, Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.train import checkpoints as checkpoints_lib

# What Orbax writes after the manifest, and nothing reads.
UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")


def mesh(*shape: int) -> Mesh:
  count = int(np.prod(shape))
  return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("x", "y"))


def make_state(where: Mesh, seed: int = 0, width: int = 64) -> dict[str, Any]:
  """Arrays cut both ways, one way and not at all, a scalar, and no array."""
  shapes = {"matrix": ((16, width), P("x", "y")), "rows": ((8, 3), P("x")),
            "whole": ((32, 32), P()), "scalar": ((), P())}
  key = jax.random.key(seed)
  return {"params": {
      name: jax.device_put(jax.random.normal(jax.random.fold_in(key, i), shape),
                           NamedSharding(where, spec))
      for i, (name, (shape, spec)) in enumerate(shapes.items())},
          "step": jax.device_put(jnp.int32(seed), NamedSharding(where, P())),
          "absent": None}


def abstract(state: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding), state)


def copied(state: Any) -> Any:
  return jax.tree.map(lambda x: np.array(x, copy=True), state)


def assert_equal(found: Any, expected: Any) -> None:
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for path, leaf in jax.tree_util.tree_leaves_with_path(found):
    np.testing.assert_array_equal(
        np.asarray(leaf), dict(jax.tree_util.tree_leaves_with_path(
            expected))[path], err_msg=str(path))


@contextlib.contextmanager
def opened(directory: pathlib.Path, **options: Any
           ) -> Iterator[checkpoints_lib.Checkpoints]:
  with contextlib.closing(checkpoints_lib.Checkpoints(
      directory, config_lib.CheckpointConfig(**options))) as checkpoints:
    yield checkpoints


def save_steps(directory: pathlib.Path, *steps: int,
               **options: Any) -> dict[str, Any]:
  """Saves at each step the state of that seed; returns the last's form."""
  for step in steps:
    with opened(directory, **options) as checkpoints:
      state = make_state(mesh(2, 2), step)
      checkpoints.save(step, state, {"tokens": 100 * step})
  return abstract(state)


def files(checkpoint: pathlib.Path) -> list[str]:
  return sorted(path.relative_to(checkpoint).as_posix()
                for path in checkpoint.rglob("*") if path.is_file())


def flip(path: pathlib.Path, at: float = 0.5) -> None:
  content = bytearray(path.read_bytes())
  content[int(at * (len(content) - 1))] ^= 0x10
  path.write_bytes(content)


def test_what_was_saved_comes_back_and_nothing_from_nowhere(
    tmp_path: pathlib.Path) -> None:
  state = make_state(mesh(2, 2), 5)
  with opened(tmp_path / "new") as checkpoints:
    assert checkpoints.latest_step() is None
    assert checkpoints.restore(abstract(state)) is None
    checkpoints.save(5, state, {"seconds": 0.1, "store": "abc"})
    assert checkpoints.latest_step() == 5
  with opened(tmp_path / "new") as checkpoints:
    found, counters = checkpoints.restore(abstract(state))
    assert checkpoints.failed_saves == 0
  assert counters == {"seconds": 0.1, "store": "abc"}
  assert_equal(found, copied(state))
  assert (found["params"]["matrix"].sharding ==
          state["params"]["matrix"].sharding)


@pytest.mark.parametrize("devices", [(1, 1), (4, 2)])
def test_a_save_sees_the_state_of_its_own_step(
    devices: tuple[int, int], tmp_path: pathlib.Path) -> None:
  # Large, so that it is still being written while the next steps run; these
  # give their states away and would write over them.
  state = make_state(mesh(*devices), width=1 << 18)
  step = jax.jit(lambda state: jax.tree.map(lambda x: 3 * x + 1, state),
                 donate_argnums=0)
  with opened(tmp_path) as checkpoints:
    for number in range(1, 4):
      state = step(state)
      expected = copied(step(jax.tree.map(jnp.copy, state)))
      state = step(state)  # not looked at from the host before it is saved
      checkpoints.save(number, state, {})
      for _ in range(3):
        state = step(state)
      jax.block_until_ready(state)
      assert_equal(checkpoints.restore(abstract(state))[0], expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (8, 1), (2, 4)])
def test_a_checkpoint_is_restored_onto_any_mesh(
    shape: tuple[int, int], tmp_path: pathlib.Path) -> None:
  save_steps(tmp_path, 3)
  wanted = abstract(make_state(mesh(*shape)))
  with opened(tmp_path) as checkpoints:
    found, _ = checkpoints.restore(wanted)
  assert_equal(found, copied(make_state(mesh(2, 2), 3)))
  assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
      lambda x: x.sharding, wanted)


def test_the_newest_are_kept_and_for_good_those_of_every_so_many_steps(
    tmp_path: pathlib.Path) -> None:
  state = make_state(mesh(1, 1))
  with opened(tmp_path, keep=2, keep_every_steps=10) as checkpoints:
    for step in range(5, 50, 5):
      checkpoints.save(step, state, {})
  assert sorted(int(p.name) for p in tmp_path.iterdir()) == [10, 20, 30, 40, 45]
  # Counted over restarts too.
  with opened(tmp_path, keep=1, keep_every_steps=20) as checkpoints:
    checkpoints.save(50, state, {})
  assert sorted(int(p.name) for p in tmp_path.iterdir()) == [20, 40, 50]


def test_the_manifest_is_there_before_the_checkpoint_is(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  seen = []
  write = checkpoints_lib.Checkpoints._write_manifest

  def spy(self: checkpoints_lib.Checkpoints) -> None:
    seen.append((threading.current_thread() is threading.main_thread(),
                 (tmp_path / "1").exists()))
    write(self)

  monkeypatch.setattr(checkpoints_lib.Checkpoints, "_write_manifest", spy)
  save_steps(tmp_path, 1)
  assert seen == [(False, False)]
  manifest = json.loads((tmp_path / "1/manifest.json").read_bytes())
  assert sorted([*manifest, *UNREAD, "manifest.json"]) == files(tmp_path / "1")


Damage = Callable[[pathlib.Path], None]


def largest(checkpoint: pathlib.Path) -> pathlib.Path:
  """The file that holds most of the arrays."""
  return max((checkpoint / "state").rglob("*"),
             key=lambda path: path.is_file() and path.stat().st_size)


def truncate(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "arrays truncated": (lambda c: truncate(largest(c)), r"ocdbt\S+ has \d+"),
    "arrays flipped": (lambda c: flip(largest(c)),
                       r"ocdbt\S+ does not have its checksum"),
    "arrays gone": (lambda c: largest(c).unlink(), r"ocdbt\S+ is missing"),
    "metadata flipped": (lambda c: flip(c / "state/_METADATA"),
                         "state/_METADATA does not have its checksum"),
    "metadata empty": (lambda c: os.truncate(c / "state/_METADATA", 0),
                       r"state/_METADATA has 0 bytes, not \d+"),
    "counters flipped": (lambda c: flip(c / "counters/metadata"),
                         "counters/metadata does not have its checksum"),
    "counters truncated": (lambda c: truncate(c / "counters/metadata"),
                           r"counters/metadata has \d+ bytes, not \d+"),
    "half of it gone": (lambda c: shutil.rmtree(c / "state"),
                        "state/_METADATA is missing"),
    "manifest gone": (lambda c: (c / "manifest.json").unlink(),
                      "manifest.json is missing"),
    "manifest truncated": (lambda c: truncate(c / "manifest.json"),
                           "manifest.json cannot be read"),
    "nothing in it": (lambda c: (shutil.rmtree(c), c.mkdir()),
                      "manifest.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    name: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  damage, message = DAMAGES[name]
  wanted = save_steps(tmp_path, 2, 4)
  damage(tmp_path / "4")
  with opened(tmp_path) as checkpoints:
    with caplog.at_level(logging.WARNING, "tfjax"):
      found, counters = checkpoints.restore(wanted)
    assert counters == {"tokens": 200}
    assert_equal(found, copied(make_state(mesh(2, 2), 2)))
    assert len(caplog.messages) == 1
    assert f"{tmp_path / '4'} is damaged" in caplog.text
    assert str(tmp_path / "damaged" / "4") in caplog.text
    assert re.search(message, caplog.text), caplog.text
    # Its step can be saved again, and is then the newest.
    assert checkpoints.latest_step() == 2
    checkpoints.save(4, make_state(mesh(2, 2), 4), {"tokens": 400})
    assert checkpoints.restore(wanted)[1] == {"tokens": 400}
    assert checkpoints.failed_saves == 0


def test_one_bit_of_any_file_is_detected_or_does_not_matter(
    tmp_path: pathlib.Path) -> None:
  wanted = save_steps(tmp_path / "sound", 3)
  expected = copied(make_state(mesh(2, 2), 3))
  names = files(tmp_path / "sound" / "3")
  assert len(names) > 8
  for number, name in enumerate(names):
    directory = tmp_path / str(number)
    shutil.copytree(tmp_path / "sound", directory)
    flip(directory / "3" / name, at=number % 5 / 4)
    with opened(directory) as checkpoints:
      found = checkpoints.restore(wanted)
    if name in UNREAD:
      assert_equal(found[0], expected)
    else:
      assert found is None, name


def test_when_all_are_damaged_there_is_none_and_all_are_set_aside(
    tmp_path: pathlib.Path) -> None:
  wanted = save_steps(tmp_path, 2, 4)
  for round_ in ("", ".2"):
    for step in (2, 4):
      flip(largest(tmp_path / str(step)))
    with opened(tmp_path) as checkpoints:
      assert checkpoints.restore(wanted) is None
      assert checkpoints.latest_step() is None
    assert (tmp_path / f"damaged/2{round_}").is_dir()
    assert (tmp_path / f"damaged/4{round_}").is_dir()
    save_steps(tmp_path, 2, 4)


def test_what_a_kill_left_unfinished_is_removed(
    tmp_path: pathlib.Path) -> None:
  wanted = save_steps(tmp_path, 2, 4)
  left = tmp_path / "6.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "4", left)
  with opened(tmp_path) as checkpoints:
    assert not left.exists()
    assert checkpoints.restore(wanted)[1] == {"tokens": 400}


@contextlib.contextmanager
def small_files() -> Iterator[None]:
  """In this process no file grows beyond 200 kB."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["tmpfs", "limit"])
def full_disk(request: pytest.FixtureRequest, tmp_path: pathlib.Path
              ) -> Iterator[tuple[pathlib.Path, Any]]:
  """A directory, and a context in which a state of 2 MB does not fit there."""
  directory = tmp_path / "disk"
  directory.mkdir()
  if request.param == "limit":
    yield directory, small_files
    return
  # 4 MB: one state fits, a second one no more.
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3500k", "tmpfs",
                     directory], capture_output=True, check=False).returncode:
    pytest.skip("may not mount a tmpfs here")
  try:
    yield directory, contextlib.nullcontext
  finally:
    subprocess.run(["umount", "--lazy", directory], check=True)


# A write of Orbax that ends after the failed save finds no event loop.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_told_once_and_the_last_good_one_kept(
    full_disk: tuple[pathlib.Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
  disk, full = full_disk
  directory = disk / "checkpoints"
  large, small = (make_state(mesh(2, 2), 1, width) for width in (1 << 15, 64))
  with opened(directory) as checkpoints:
    checkpoints.save(1, large, {"tokens": 1})
    assert checkpoints.latest_step() == 1
    caplog.clear()
    with full(), caplog.at_level(logging.WARNING):
      checkpoints.save(2, large, {"tokens": 2})
      assert checkpoints.latest_step() == 1
    assert checkpoints.failed_saves == 1
    [message] = caplog.messages
    assert str(directory) in message and "step 2 could not be" in message
    assert "the newest is of step 1" in message
    assert "No space left on device" in message or "File too large" in message
    assert [path.name for path in directory.iterdir()] == ["1"]
    # The next ones are tried afresh: fit, fit, fail at the end.
    checkpoints.save(3, small, {"tokens": 3})
    assert checkpoints.latest_step() == 3
    with full():
      checkpoints.save(4, large, {"tokens": 4})
      checkpoints.close()
  assert checkpoints.failed_saves == 2
  assert sorted(path.name for path in directory.iterdir()) == ["1", "3"]
  with opened(directory) as checkpoints:
    found, counters = checkpoints.restore(abstract(small))
  assert counters == {"tokens": 3}
  assert_equal(found, copied(small))


def test_a_save_that_cannot_even_begin_does_not_raise(
    tmp_path: pathlib.Path) -> None:
  with opened(tmp_path / "run") as checkpoints:
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("not a directory")
    checkpoints.save(1, make_state(mesh(1, 1)), {})
    assert checkpoints.latest_step() is None
    assert checkpoints.failed_saves == 1
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    given_away = make_state(mesh(1, 1))
    given_away["params"]["matrix"].delete()
    checkpoints.save(2, given_away, {})
    assert checkpoints.latest_step() is None
    assert checkpoints.failed_saves == 2
    checkpoints.save(3, make_state(mesh(1, 1)), {})
    assert checkpoints.latest_step() == 3


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_weights_are_the_newest_parameters_alone(
    below: str, tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture) -> None:
  directory = tmp_path / "checkpoints"
  save_steps(directory, 2, 4)
  wanted = abstract(make_state(mesh(4, 1))["params"])
  found = checkpoints_lib.weights(tmp_path / below, wanted)
  assert_equal(found, copied(make_state(mesh(2, 2), 4)["params"]))
  assert found["matrix"].sharding == wanted["matrix"].sharding
  # A damaged one is passed over, and left where it is: the run is not ours.
  flip(largest(directory / "4"))
  with caplog.at_level(logging.WARNING, "tfjax"):
    found = checkpoints_lib.weights(tmp_path / below, wanted)
  assert_equal(found, copied(make_state(mesh(2, 2), 2)["params"]))
  assert f"{directory / '4'} is damaged" in caplog.text
  assert sorted(path.name for path in directory.iterdir()) == ["2", "4"]


def test_weights_of_another_model_are_refused_by_name(
    tmp_path: pathlib.Path) -> None:
  save_steps(tmp_path, 2)
  wanted = abstract(make_state(mesh(1, 1), width=32)["params"])
  wanted["new"] = {"bias": wanted.pop("rows")}
  with pytest.raises(config_lib.ConfigError) as caught:
    checkpoints_lib.weights(tmp_path, wanted)
  assert caught.value.key == "init_from"
  lines = str(caught.value).splitlines()[1:]
  assert [line.strip() for line in lines] == [
      "matrix: (16, 64) there, (16, 32) here",
      "new/bias: missing there, (8, 3) here",
      "rows: (8, 3) there, none here"]
  assert str(tmp_path / "2") in str(caught.value)


def test_weights_from_nowhere_are_refused(tmp_path: pathlib.Path) -> None:
  wanted = abstract(make_state(mesh(1, 1))["params"])
  for directory in (tmp_path, tmp_path / "none"):
    with pytest.raises(config_lib.ConfigError, match="has no checkpoint that"):
      checkpoints_lib.weights(directory, wanted)
  save_steps(tmp_path, 2)
  flip(largest(tmp_path / "2"))
  with pytest.raises(config_lib.ConfigError, match="has no checkpoint that"):
    checkpoints_lib.weights(tmp_path, wanted)
