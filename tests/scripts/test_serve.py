# SPDX-License-Identifier: Apache-2.0
"""scripts/report.py --serve: what a browser shows while a sweep runs."""

import base64
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from typing import Any, Callable, Iterator, Mapping

import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import ledger
from tfjax.train import lease
from tfjax.train import records

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")
_PATIENCE = 90.0  # seconds
_AS_3_AND_4 = (
    "import fcntl, os, sys; "
    "pipes = [fcntl.fcntl(int(one), fcntl.F_DUPFD_CLOEXEC, 10) "
    "for one in sys.argv[1:3]]; os.dup2(pipes[0], 3); os.dup2(pipes[1], 4); "
    "os.execv(sys.argv[3], sys.argv[3:])")


class Browser:
  """A headless Chromium with one page, steered through a pipe.

  What it is told is of the Chrome DevTools Protocol, with a NUL after each
  message.
  """

  def __init__(self, profile: pathlib.Path):
    to_browser, self._out = os.pipe()
    self._in, from_browser = os.pipe()
    # It reads from 3 and writes to 4.
    self._process = subprocess.Popen(
        [sys.executable, "-c", _AS_3_AND_4, str(to_browser),
         str(from_browser), CHROMIUM,
         "--headless", "--no-sandbox", "--disable-gpu",
         "--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe",
         f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=(to_browser, from_browser))
    os.close(to_browser)
    os.close(from_browser)
    self._number, self._rest, self._session = 0, b"", None
    self.errors: list[str] = []
    target = self.tell("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.tell("Target.attachToTarget", targetId=target,
                              flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
      self.tell(f"{domain}.enable")

  def tell(self, method: str, **params: Any) -> dict[str, Any]:
    self._number += 1
    message = dict(id=self._number, method=method, params=params)
    if self._session:
      message["sessionId"] = self._session
    os.write(self._out, json.dumps(message).encode() + b"\0")
    while True:
      while b"\0" not in self._rest:
        data = os.read(self._in, 1 << 16)
        assert data, "the browser has ended"
        self._rest += data
      text, _, self._rest = self._rest.partition(b"\0")
      answer = json.loads(text)
      if answer.get("method") in ("Runtime.exceptionThrown",
                                  "Log.entryAdded"):
        self.errors.append(json.dumps(answer["params"]))
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return answer["result"]

  def see(self, url: str, width: int = 1280, height: int = 1600,
          theme: str = "light") -> None:
    self.tell("Emulation.setDeviceMetricsOverride", width=width,
              height=height, deviceScaleFactor=1, mobile=False)
    self.tell("Emulation.setEmulatedMedia", features=[
        dict(name="prefers-color-scheme", value=theme)])
    self.tell("Page.navigate", url=url)

  def ask(self, script: str) -> Any:
    """The value of an expression in the page."""
    found = self.tell("Runtime.evaluate", expression=script,
                      returnByValue=True)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  def text(self, selector: str) -> str | None:
    return self.ask(
        f"document.querySelector({json.dumps(selector)})?.textContent")

  def wait(self, is_so: Callable[[], Any]) -> Any:
    end = time.monotonic() + _PATIENCE
    while not (found := is_so()):
      assert time.monotonic() < end, self.text("body")
      time.sleep(0.1)
    return found

  def shot(self) -> bytes:
    return base64.b64decode(self.tell(
        "Page.captureScreenshot", captureBeyondViewport=True)["data"])

  def close(self) -> None:
    self._process.terminate()
    self._process.wait(20)
    os.close(self._out)
    os.close(self._in)


@pytest.fixture(name="browser")
def browser_fixture(tmp_path: pathlib.Path) -> Iterator[Browser]:
  with contextlib.closing(Browser(tmp_path / "profile")) as browser:
    yield browser


@pytest.fixture(name="serve")
def serve_fixture() -> Iterator[Callable[..., tuple[str, subprocess.Popen]]]:
  """Starts the script for a workdir; its address and its process."""
  with contextlib.ExitStack() as stack:
    def serve(workdir: pathlib.Path) -> tuple[str, subprocess.Popen]:
      process = stack.enter_context(subprocess.Popen(
          [sys.executable, str(REPOSITORY / "scripts" / "report.py"),
           f"--workdir={workdir}", "--serve"], stdout=subprocess.PIPE,
          stderr=subprocess.PIPE, text=True))
      stack.callback(process.terminate)
      line = process.stdout.readline()
      return re.search(r"http://127\.0\.0\.1:\d+/", line)[0], process
    yield serve


def _config(cache_dir: pathlib.Path) -> config_lib.ExperimentConfig:
  config = config_lib.default()
  config_lib.override(config, {
      "data.corpus": "synthetic", "data.synthetic.num_bytes": 20_000,
      "data.synthetic.document_bytes": 1_000, "data.tokenizer.kind": "byte",
      "data.cache_dir": str(cache_dir), "data.max_epochs": 99.0,
      "model.size": "3k", "model.context_length": 32, "train.batch_size": 4,
      "train.log_every_steps": 10, "evaluation.tokens": 256,
      "tracking.wandb": "disabled", "duration.steps": 100,
      "runtime.compilation_cache_dir": os.environ[
          "JAX_COMPILATION_CACHE_DIR"]})
  return config


def _counts(browser: Browser) -> dict[str, int]:
  """What the page says: runs by status."""
  texts = browser.ask("Object.fromEntries([...document.querySelectorAll("
                      "'#counts button')].map(b => [b.dataset.status, "
                      "b.textContent]))")
  return {status: int(text.split()[0]) for status, text in texts.items()}


def _ledger_counts(workdir: pathlib.Path) -> dict[str, int]:
  statuses = [state.status for state in ledger.sweep_state(workdir)]
  return {status: statuses.count(status) for status in set(statuses)}


SWEEP = textwrap.dedent("""
    import pathlib, sys
    from tfjax import sweep
    from tfjax.sweep import ledger
    workdir = pathlib.Path(sys.argv[1])
    specs = ledger.read_specs(workdir)
    sweep.launch(specs, workdir, workers=1, sweep="tiny")
    """)


@pytest.mark.slow
@needs_browser
def test_a_real_sweep_from_its_begin_to_its_report(
    browser: Browser, serve: Callable, tmp_path: pathlib.Path,
    cache_dir: pathlib.Path) -> None:
  workdir = tmp_path / "runs"
  url, process = serve(workdir)  # before there is anything
  browser.see(url)
  browser.wait(lambda: "no sweep was launched" in (
      browser.text("#problems") or ""))
  browser.ask("window.kept = 'not reloaded'")

  specs = sweep.plan(_config(cache_dir), [
      {"duration.steps": steps} for steps in (300, 200, 100)])
  workdir.mkdir()
  ledger.write_plan(workdir, "tiny", specs)
  browser.wait(lambda: _counts(browser) == dict(pending=3))
  obstacle = workdir / specs[1].run_id / "checkpoints"
  obstacle.parent.mkdir()
  obstacle.write_text("not a directory")
  environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
  with open(tmp_path / "log", "wb") as log, subprocess.Popen(
      [sys.executable, "-c", SWEEP, str(workdir)], env=environment, stdout=log,
      stderr=log) as launch:
    browser.wait(lambda: "running" in _counts(browser))
    assert launch.wait(_PATIENCE) == 0, (tmp_path / "log").read_text()
  browser.wait(lambda: _counts(browser) == dict(complete=2, failed=1))
  assert _ledger_counts(workdir) == dict(complete=2, failed=1)
  for state in ledger.sweep_state(workdir):
    loss = f"{state.loss:.4f}" if state.status == "complete" else "–"
    assert browser.text(f"tr[data-run='{state.run_id}'] .loss") == loss
  reason = ledger.run_state(workdir, specs[1].run_id).reason
  assert browser.text(".failure p") == reason
  assert browser.text("#retry-command").endswith(
      f"sweep.py retry --workdir={workdir}")
  # The bar: what failed counts as not done.
  flops = [spec.budget.flops_total for spec in specs]
  share = int(100 * (flops[0] + flops[2]) / sum(flops))
  assert browser.text("#share") == f"{share}%"
  assert browser.text("#eta") == "done"
  # The report comes by itself, and its figures are there.
  browser.wait(lambda: browser.ask(
      "[...document.querySelectorAll('#figures img')].some("
      "i => i.complete && i.naturalWidth > 0)"))
  assert (workdir / "report.html").is_file()
  assert browser.ask("window.kept") == "not reloaded"
  assert not browser.errors

  process.send_signal(signal.SIGINT)
  output, complaint = process.communicate(timeout=20)
  assert process.returncode == 0 and output == ""
  assert "Traceback" not in complaint and "Error" not in complaint
  browser.wait(lambda: "does not answer" in browser.text("#pulse"))


@needs_browser
def test_a_page_of_every_state(
    browser: Browser, serve: Callable, tmp_path: pathlib.Path,
    cache_dir: pathlib.Path) -> None:
  """A scripted writer in place of workers, so that each state can be held."""
  specs = sweep.plan(_config(cache_dir), sweep.product(
      sweep.axis("model.size", ["3k", "6k"]),
      sweep.axis("duration.steps", [100, 200, 300])))
  workdir = tmp_path / "runs"
  workdir.mkdir()
  ledger.write_plan(workdir, "<b>states</b>", specs)
  time.sleep(0.01)
  evil = "<img src=x onerror='window.hit=1'>"
  _write(workdir, specs[0], 100, status="complete")
  _write(workdir, specs[1], 50, status="failed", status_reason=evil,
         log_tail=f"</pre>{evil}")
  _write(workdir, specs[2], 50, status="stopped")
  _write(workdir, specs[3], 20)
  _write(workdir, specs[4], 10, status="diverged", status_reason="nan")
  url, _ = serve(workdir)
  with lease.hold(workdir / specs[3].run_id):
    browser.see(url)
    expected = dict(complete=1, failed=1, stopped=1, running=1, diverged=1,
                    pending=1)
    browser.wait(lambda: _counts(browser) == expected)
    assert browser.text("h1") == "<b>states</b>"
    assert browser.text(".failure p") == evil
    assert evil in browser.text(".failure pre")
    assert browser.ask("window.hit") is None
    # Five curves of two sizes, each in its size's colour.
    colours = browser.ask("[...document.querySelectorAll('#chart path')].map("
                          "p => p.getAttribute('stroke'))")
    assert len(colours) == 5 and len(set(colours)) == 2
    row = f"tr[data-run='{specs[3].run_id}']"
    assert browser.text(f"{row} .loss") == "4.0000"
    _write(workdir, specs[3], 30)
    browser.wait(lambda: browser.text(f"{row} .loss") == "3.0000")
    assert browser.text(f"{row} .number") == "30 / 100"

    browser.ask("document.querySelector('#counts [data-status=failed]')"
                ".click()")
    assert browser.ask("document.querySelectorAll('#runs tbody tr').length"
                       ) == 1
    assert browser.ask("document.querySelectorAll('#chart path').length") == 1
    browser.ask("document.querySelector('#counts [data-status=failed]')"
                ".click()")
    browser.ask("document.querySelector('#sizes button').click()")
    assert browser.ask("document.querySelectorAll('#chart path').length") == 2
    browser.ask("document.querySelector('#sizes button').click()")
    browser.ask("[...document.querySelectorAll('#axis-choice button')].find("
                "b => b.textContent === 'FLOPs').click()")
    assert "training FLOPs" in browser.text("#chart svg")
    # The pointer on a curve's end names the run and its loss.
    browser.ask("{ const box = document.querySelector('#chart svg')"
                ".getBoundingClientRect(); const last = document.querySelector("
                "'#chart circle'); window.at = [box.left + "
                "+last.getAttribute('cx'), box.top + "
                "+last.getAttribute('cy')]; }")
    left, top = browser.ask("window.at")
    browser.tell("Input.dispatchMouseEvent", type="mouseMoved", x=left, y=top)
    assert browser.text("#tip span").startswith("loss 3.0000 at ")

    # A loss that went off has its number beside the axis, and no wider.
    _write(workdir, specs[4], 20, row=dict(loss=3e12))
    browser.wait(lambda: "10¹²" in browser.text("#chart svg"))
    assert browser.ask(
        "Math.min(...[...document.querySelectorAll('#chart svg text')].map("
        "t => t.getBoundingClientRect().left)) - document.querySelector("
        "'#chart svg').getBoundingClientRect().left") >= 0

    for theme in ("light", "dark"):
      for width in (1280, 420):
        browser.see(url, width, 900, theme)
        browser.wait(lambda: _counts(browser) == expected)
        assert browser.ask("document.documentElement.scrollWidth") <= width
        shot = browser.shot()
        assert shot.startswith(b"\x89PNG") and len(shot) > 20_000
        (tmp_path / f"{theme}-{width}.png").write_bytes(shot)
  assert not browser.errors


def _write(workdir: pathlib.Path, spec: sweep.RunSpec, steps: int,
           row: Mapping[str, Any] = types.MappingProxyType({}),
           **record: Any) -> None:
  """Adds rows every ten steps, up to `steps`; the loss is 6 - step / 10, if
  `row` does not say otherwise."""
  run_dir = workdir / spec.run_id
  run_dir.mkdir(exist_ok=True)
  (run_dir / "config.json").write_text("{}")
  metrics = run_dir / "metrics.jsonl"
  begun = len(metrics.read_text().splitlines()) if metrics.exists() else 0
  with open(metrics, "a", encoding="utf-8") as file:
    for step in range(10 * (begun + 1), steps + 1, 10):
      share = step / spec.budget.steps
      file.write(json.dumps(dict(
          kind="train", step=step, tokens=share * spec.budget.tokens,
          flops=share * spec.budget.flops_total, loss=6 - step / 10,
          device_seconds=step / 10, tokens_per_second=1.0) | row) + "\n")
  if record:
    records.write_result(run_dir, dict(
        run_id=spec.run_id, steps=steps, loss=6 - steps / 10,
        config_hash=config_lib.config_hash(spec.config), **record))


def test_the_script_says_what_it_cannot_do(tmp_path: pathlib.Path) -> None:
  script = [sys.executable, str(REPOSITORY / "scripts" / "report.py"),
            f"--workdir={tmp_path}"]
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    second = subprocess.run([*script, "--serve", f"--port={port}"],
                            capture_output=True, text=True, check=False)
  assert second.returncode == 2 and f"port {port}" in second.stderr
  assert "Traceback" not in second.stderr
  without = subprocess.run([*script, "--port=8000"], capture_output=True,
                           text=True, check=False)
  assert without.returncode == 2 and "--serve" in without.stderr
