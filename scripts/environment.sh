# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: makes or reuses .venv and installs tfjax there.
#
#   environment EXTRAS      e.g. environment "test,bench"; sets $python
#
# PYTHON chooses the interpreter (3.11 or newer) of a new .venv. What is
# installed is remembered by a checksum, so a second call takes no time.

environment() {
  local extras="$1" candidate found="" stamp checksum
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  if [ ! -x .venv/bin/python ]; then
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
          2>/dev/null; then
        found="$candidate"
        break
      fi
    done
    if [ -z "$found" ]; then
      echo "tfjax needs Python 3.11 or newer; set PYTHON to one" >&2
      return 1
    fi
    echo "Making .venv with $("$found" --version)"
    rm -rf .venv
    # Some distributions ship Python without ensurepip, which venv needs.
    if ! "$found" -m venv .venv 2>/dev/null; then
      rm -rf .venv
      "$found" -m pip install --quiet --target .venv-tool virtualenv
      PYTHONPATH=.venv-tool "$found" -m virtualenv --quiet .venv
      rm -rf .venv-tool
    fi
  fi
  python="$PWD/.venv/bin/python"
  checksum="$(cksum < setup.py)"
  stamp=.venv/tfjax-installed
  # Without extras any line of this setup.py will do: the core came with it.
  if ! grep -qsF "$checksum ${extras:+[$extras]}" "$stamp"; then
    echo "Installing tfjax and what it needs (once, some minutes)"
    "$python" -m pip install --quiet --disable-pip-version-check \
      --editable ".${extras:+[$extras]}"
    # Only now: an installation that was cut short is made again.
    echo "$checksum [$extras]" >> "$stamp"
  fi
}
