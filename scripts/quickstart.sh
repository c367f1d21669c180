#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs tfjax, trains the quickstart's grid, fits it, and writes a report.
# Arguments go to scripts/sweep.py. Run again, it skips what is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment ""
workdir=runs/quickstart
begin=$SECONDS
"$python" scripts/sweep.py --config=experiments/quickstart.py \
  --workdir="$workdir" "$@"
"$python" scripts/fit.py --workdir="$workdir"
"$python" scripts/report.py --workdir="$workdir"
echo "Quickstart took $((SECONDS - begin)) s after installation."
