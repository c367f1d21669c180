# SPDX-License-Identifier: Apache-2.0
"""Signals as launchers see them; those of a run are in test_loop.py."""

import signal
import threading

import pytest

from tfjax.train import interrupts


def test_an_echo_of_sigterm_is_none_of_its_own(
    monkeypatch: pytest.MonkeyPatch) -> None:
  now = 100.0
  monkeypatch.setattr(interrupts.time, "monotonic", lambda: now)
  seen = []
  before = signal.getsignal(signal.SIGTERM)
  with interrupts.handled_by(seen.append):
    signal.raise_signal(signal.SIGTERM)
    now += 0.5
    signal.raise_signal(signal.SIGTERM)  # its launcher passes it on
    assert seen == [signal.SIGTERM]
    now += 1.5
    signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGTERM] * 2
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # a person means it
  assert seen == [signal.SIGTERM] * 2 + [signal.SIGINT] * 2
  assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_changes_no_handler() -> None:
  found = []

  def enter() -> None:
    with interrupts.handled_by(found.append):
      found.append(signal.getsignal(signal.SIGINT))
  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert found == [signal.getsignal(signal.SIGINT)]
