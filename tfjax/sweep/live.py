# SPDX-License-Identifier: Apache-2.0
"""The live page of a sweep, served on this machine's loopback.

A fixed set of addresses, none of which names a file: the page's own parts, the
sweep's state as JSON (`live_state`), and the static report with its figures
once there is one. Who makes the report is the caller's business.
"""

import http.server
import importlib.resources
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Sequence
import urllib.parse

from tfjax.sweep import live_state
from tfjax.sweep import watch

HOST = "127.0.0.1"
_PARTS = {"/": ("index.html", "text/html"),
          "/style.css": ("style.css", "text/css"),
          "/chart.js": ("chart.js", "text/javascript"),
          "/words.js": ("words.js", "text/javascript"),
          "/page.js": ("page.js", "text/javascript"),
          "/icon.svg": ("icon.svg", "image/svg+xml")}
# A page on the web that has its name resolve to this machine is sent away.
_NAMES = ("127.0.0.1", "localhost")
_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; "
           "img-src 'self'; connect-src 'self'; base-uri 'none'; "
           "form-action 'none'; frame-ancestors 'none'")
# The report is one file without scripts.
_REPORT_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; "
                  "img-src data:; base-uri 'none'; form-action 'none'; "
                  "frame-ancestors 'none'")
_FRESH_SECONDS = 0.5  # so old an answer may be, however many ask


class ServeError(RuntimeError):
  """The page cannot be served; the message says why."""


class Report:
  """The static report of the sweep: made when the sweep is over, and again
  when a run has ended since.

  Attributes:
    state: none, making, ready, old or failed.
    text: why it failed.
  """

  def __init__(self, workdir: pathlib.Path, command: Sequence[str]):
    self.state, self.text = "none", ""
    self._path = workdir / "report.html"
    self._workdir, self._command = workdir, list(command)
    self._tried: float | None = None  # the newest result that it was made for

  def page(self) -> bytes | None:
    """The report's HTML, if there is one."""
    return _read(self._path)

  def figures(self) -> dict[str, pathlib.Path]:
    """Figures of a report that is up to date, by name."""
    if self.state != "ready":
      return {}
    return {path.stem: path
            for path in sorted((self._workdir / "figures").glob("*.svg"))}

  def update(self, runs: Sequence[str], is_over: bool) -> None:
    """Starts to make it where it is due; returns at once."""
    if self.state == "making":
      return
    newest = max((_age(self._workdir / run / watch.RESULT)
                  for run in runs), default=0.0)
    if _age(self._path) >= newest > 0.0:
      self.state = "ready" if is_over else "old"
    elif is_over and newest > 0.0 and newest != self._tried:
      self.state, self._tried = "making", newest
      threading.Thread(target=self._make, daemon=True).start()
    elif self.state != "failed":
      self.state = "old" if self._path.exists() else "none"

  def _make(self) -> None:
    # A process of its own: a fit takes all of this one's attention.
    done = subprocess.run(
        self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    lines = done.stderr.strip().splitlines()
    self.text = "" if done.returncode == 0 else (
        lines[-1] if lines else f"exit status {done.returncode}")
    self.state = "failed" if done.returncode else "ready"


class Server(http.server.ThreadingHTTPServer):
  """Serves the page; `url` is where."""

  daemon_threads = True

  def __init__(self, workdir: str | os.PathLike[str], port: int,
               report_command: Sequence[str]):
    """Takes the port; 0: any that is free.

    Raises:
      ServeError: the port is taken, or may not be had.
    """
    try:
      super().__init__((HOST, port), _Handler)
    except OSError as error:
      raise ServeError(
          f"port {port} cannot be served on ({error.strerror}); give another "
          "one, or --port=0 for any that is free") from error
    except OverflowError:
      raise ServeError(f"port {port} must lie between 0 and 65535") from None
    self.url = f"http://{HOST}:{self.server_address[1]}/"
    self._state = live_state.State(workdir)
    self.report = Report(pathlib.Path(workdir), report_command)
    self._lock = threading.Lock()
    self._refreshed = -float("inf")

  def state(self, epoch: str, after: int) -> bytes:
    """The JSON for a page that has the curves up to version `after`."""
    with self._lock:
      if time.monotonic() - self._refreshed >= _FRESH_SECONDS:
        self._state.refresh()
        self._refreshed = time.monotonic()
        self.report.update(list(self._state.watch.runs), self._state.is_over)
      report = self.report
      return self._state.snapshot(epoch, after, report=dict(
          state=report.state, text=report.text,
          figures=list(report.figures())))

  def handle_error(self, request: Any, client_address: Any) -> None:
    """A browser that went away is nothing to speak of."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers one connection."""

  server: Server
  protocol_version = "HTTP/1.1"
  server_version, sys_version = "tfjax", ""
  timeout = 60.0

  def do_GET(self) -> None:  # pylint: disable=invalid-name
    name = self.headers.get("Host", "").rpartition(":")[0] or (
        self.headers.get("Host", ""))
    if name not in _NAMES:
      self._answer(403, "text/plain", b"ask for 127.0.0.1 or localhost\n")
      return
    address = urllib.parse.urlsplit(self.path)
    if address.path in _PARTS:
      part, kind = _PARTS[address.path]
      self._answer(200, kind, _part(part))
    elif address.path == "/state.json":
      self._answer(200, "application/json", self.server.state(
          *_place(address.query)))
    elif address.path == "/report.html":
      self._found("text/html", self.server.report.page(), _REPORT_POLICY)
    else:
      # A name that is looked up among those there are: no path is made of it.
      known = {f"/figures/{name}.svg": path
               for name, path in self.server.report.figures().items()}
      path = known.get(address.path)
      self._found("image/svg+xml", path and _read(path), _REPORT_POLICY)

  def _found(self, kind: str, body: bytes | None, policy: str) -> None:
    if body is None:
      self._answer(404, "text/plain", b"there is no such page\n")
    else:
      self._answer(200, kind, body, policy)

  def _answer(self, status: int, kind: str, body: bytes,
              policy: str = _POLICY) -> None:
    self.send_response(status)
    for name, value in {
        "Content-Type": f"{kind}; charset=utf-8",
        "Content-Length": str(len(body)), "Cache-Control": "no-store",
        "Content-Security-Policy": policy,
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff"}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)

  # pylint: disable-next=redefined-builtin
  def log_message(self, format: str, *args: Any) -> None:
    """Nothing: the terminal is for those who serve."""


def serve(workdir: str | os.PathLike[str], port: int,
          report_command: Sequence[str],
          ready: Callable[[str], None]) -> None:
  """Serves the page until Ctrl-C.

  Args:
    workdir: the sweep's directory, which need not be there yet.
    port: of 127.0.0.1; 0: any that is free.
    report_command: makes the static report, and says on its standard error
      why it cannot.
    ready: is told the address.

  Raises:
    ServeError: the port is taken.
  """
  with Server(workdir, port, report_command) as server:
    ready(server.url)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      pass


def _part(name: str) -> bytes:
  return importlib.resources.files("tfjax.sweep").joinpath(
      "page", name).read_bytes()


def _place(query: str) -> tuple[str, int]:
  """The epoch and version that a page has; of nonsense, none."""
  given = dict(urllib.parse.parse_qsl(query))
  after = given.get("after", "0")
  return given.get("epoch", ""), int(after) if after.isdecimal() else 0


def _read(path: pathlib.Path) -> bytes | None:
  try:
    return path.read_bytes()
  except OSError:
    return None


def _age(path: pathlib.Path) -> float:
  """When it was last written; 0: it is not there."""
  try:
    return path.stat().st_mtime
  except OSError:
    return 0.0
