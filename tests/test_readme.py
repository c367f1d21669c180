# SPDX-License-Identifier: Apache-2.0
"""The README's commands run: all of them, shrunk by flags, in a copy."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# What makes each command small enough. A command of the README that is neither
# here nor below fails the test.
SHRINK = {
    "scripts/quickstart.sh": [
        "--sweep_arg=most_tokens=16384", "--sweep_arg=budgets=4",
        "--sweep_arg=sizes=('3k', '6k', '14k')",
        "--config.evaluation.tokens=4096"],
    **dict.fromkeys(
        ("scripts/quickstart.sh masked", "scripts/quickstart.sh seq2seq"), [
            "--sweep_arg=most_tokens=16384", "--sweep_arg=budgets=4",
            "--sweep_arg=sizes=('3k', '6k')",
            "--config.evaluation.tokens=4096"]),
    "scripts/test.sh": ["tests/test_layers_of_the_house.py", "-n", "0"],
    "scripts/sweep.py": [
        "--sweep_arg=most_tokens=16384", "--sweep_arg=budgets=4",
        "--sweep_arg=sizes=('3k', '6k', '14k')",
        "--config.evaluation.tokens=4096"],
    **dict.fromkeys((
        "scripts/sweep.py status", "scripts/sweep.py retry",
        "scripts/sweep.py collect", "scripts/sweep.py clean",
        "scripts/report.py --serve", "scripts/track.py sync",
        "scripts/track.py dashboard"), []),
    "scripts/train.py": [
        "--config.duration.tokens=8192", "--config.evaluation.tokens=4096"],
    "scripts/plan.py --devices": ["--noadvice"],
    "scripts/plan.py --hardware": [],
    "scripts/plan.py": [
        "--sweep_arg=most_tokens=16384", "--sweep_arg=budgets=4",
        "--sweep_arg=sizes=('3k', '6k', '14k')",
        "--config.evaluation.tokens=4096"],
    "scripts/fit.py": ["--bootstrap=100"],
    "scripts/report.py": [],
    "scripts/convert.py": [],
    "scripts/generate.py": ["--max_new_tokens=4"],
    "scripts/parity.py": ["--families=gpt2"],
    "scripts/bench.py": [
        "--shapes=i", "--contenders=tfjax", "--rounds=1", "--steps=1"],
}
NOT_RUN = ("pip",)  # installs packages


def _commands() -> list[list[str]]:
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
  return [shlex.split(line) for block in blocks for line in block.splitlines()]


def _script(command: list[str]) -> str:
  """scripts/x.py of `.venv/bin/python scripts/x.py`, or pip."""
  first = command[0].removeprefix("./").removeprefix(".venv/bin/")
  return command[1] if first == "python" else first


def _key(command: list[str]) -> str:
  """What SHRINK has it under: the script, and what else tells its uses apart:
  the argument of a shell's, a flag or a command of its own that SHRINK names.
  """
  script = _script(command)
  if script.endswith(".sh"):
    return " ".join([script, *command[1:2]])
  flags = [f"{script} {one.split('=')[0]}" for one in command]
  return next((one for one in flags if one in SHRINK), script)


def test_every_command_is_known():
  commands = [c for c in _commands() if _script(c) not in NOT_RUN]
  assert len(commands) >= 10
  for command in commands:
    assert _key(command) in SHRINK, shlex.join(command)


def _copy(target: pathlib.Path) -> None:
  """The checkout's files, without its runs, beside this environment."""
  for name in ("tfjax", "scripts", "experiments", "tests"):
    shutil.copytree(ROOT / name, target / name,
                    ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("README.md", "setup.py", "pyproject.toml"):
    shutil.copy(ROOT / name, target / name)
  (target / ".venv").symlink_to(sys.prefix)


def test_an_experiment_computes_its_sweep_before_jax_begins():
  """get_sweep of the README, as scripts/sweep.py --dry_run needs it."""
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  blocks = [block for block in re.findall(
      r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            if "def get_sweep" in block]
  assert len(blocks) == 2
  program = "\n".join([
      "from tfjax import config as config_lib, sweep", blocks[0],
      "first = get_sweep(get_config())", blocks[1],
      "second = get_sweep(get_config())",
      "for cell in [*first, *second['isoflop'], *second['rates']]:",
      "  config_lib.override(get_config(), cell)",
      "print(len(first), {name: len(one) for name, one in second.items()})",
      "from jax._src import xla_bridge",
      "print(xla_bridge.backends_are_initialized())"])
  result = subprocess.run([sys.executable, "-c", program], cwd=ROOT,
                          capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  assert result.stdout == "9 {'isoflop': 6, 'rates': 16}\nFalse\n"


def _look_at(command: list[str], directory: pathlib.Path,
             environment: dict[str, str]) -> None:
  """Looks at the page that a command serves, and ends it by Ctrl-C."""
  with subprocess.Popen(command, cwd=directory, env=environment, text=True,
                        stdout=subprocess.PIPE) as server:
    # No line that it says, and it is ended all the same.
    watchdog = threading.Timer(120, server.kill)
    watchdog.start()
    try:
      line = server.stdout.readline()
      found = re.search(r"http://127\.0\.0\.1:[0-9]+/", line)
      assert found, f"{shlex.join(command)}\n{line}"
      with urllib.request.urlopen(found[0], timeout=60) as page:
        assert b"<title>" in page.read()
      with urllib.request.urlopen(f"{found[0]}state.json",
                                  timeout=60) as answer:
        assert json.load(answer)["counts"] == {"complete": 12}
      server.send_signal(signal.SIGINT)
      assert server.wait(60) == 0
    finally:
      watchdog.cancel()
      server.kill()


@pytest.mark.slow
def test_commands_run(tmp_path: pathlib.Path):
  installed = pathlib.Path(sys.prefix) / "tfjax-installed"
  if not installed.exists() or "[test]" not in installed.read_text():
    pytest.skip("needs the environment that scripts/test.sh makes")
  _copy(tmp_path)
  environment = dict(os.environ, HOME=str(tmp_path))
  environment.pop("JAX_NUM_CPU_DEVICES")
  environment.pop("PYTEST_XDIST_WORKER", None)
  cache = ("--config.runtime.compilation_cache_dir=" +
           environment["JAX_COMPILATION_CACHE_DIR"])
  for command in _commands():
    script = _script(command)
    if script in NOT_RUN:
      continue
    if "--serve" in command:
      _look_at(command, tmp_path, environment)
      continue
    # A command of scripts/sweep.py's own takes a directory of runs alone.
    takes_config = script in (
        "scripts/quickstart.sh", "scripts/train.py", "scripts/plan.py") or (
            _key(command) == "scripts/sweep.py")
    result = subprocess.run(
        [*command, *SHRINK[_key(command)],
         *([cache] if takes_config else [])],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=300, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"{shlex.join(command)}\n{output}"
    assert "Traceback" not in output, f"{shlex.join(command)}\n{output}"
  for workdir in ("quickstart", "mine"):
    page = (tmp_path / "runs" / workdir / "report.html").read_text("utf-8")
    assert "12 complete runs of 12" in page
