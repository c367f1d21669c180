#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs tfjax, says what a quickstart's grid will cost, trains it, fits it,
# and writes a report.
#
#   quickstart.sh [masked|seq2seq] [arguments of scripts/sweep.py]
#
# Run again, it skips what is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment ""
name=quickstart
if [[ $# -gt 0 && "$1" != -* ]]; then
  name="quickstart_$1"
  shift
fi
workdir="runs/$name"
begin=$SECONDS
# Once: what is predicted before the sweep, the report sets beside the rest.
if [ ! -f "$workdir/cost.json" ]; then
  "$python" scripts/plan.py --config="experiments/$name.py" \
    --workdir="$workdir" "$@"
fi
"$python" scripts/sweep.py --config="experiments/$name.py" \
  --workdir="$workdir" "$@"
"$python" scripts/fit.py --workdir="$workdir"
"$python" scripts/report.py --workdir="$workdir"
echo "Quickstart took $((SECONDS - begin)) s after installation."
