#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One run in several processes on this machine, each with its share of cores:
#
#   scripts/launch/local.sh 2 --config=experiments/quickstart.py \
#     --workdir=runs/two
#
# Everything after the number goes to scripts/train.py. Lines of process I
# begin with [I]. SIGTERM, SIGUSR1 and Ctrl-C reach all processes; exits as the
# first of them that did not end with 0. Run by the tests, on CPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
count="$1"
shift

JAX_COORDINATOR_ADDRESS="127.0.0.1:$("$python" -c '
import socket
with socket.socket() as probe:
  probe.bind(("127.0.0.1", 0))
  print(probe.getsockname()[1])')"
export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES="$count"

read -ra cores < <("$python" -c '
import os
print(*sorted(os.sched_getaffinity(0)))')
share=$((${#cores[@]} > count ? ${#cores[@]} / count : 1))
pids=()
for ((i = 0; i < count; i++)); do
  own="${cores[*]:i * share % ${#cores[@]}:share}"
  JAX_PROCESS_ID="$i" taskset -c "${own// /,}" \
    "$python" scripts/train.py "$@" \
    > >(trap '' TERM INT USR1; exec sed -u "s/^/[$i] /") 2>&1 &
  pids+=("$!")
done

# Ctrl-C does not reach background processes; they get SIGTERM for it.
signalled=""
trap 'signalled=TERM; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
trap 'signalled=USR1; kill -USR1 "${pids[@]}" 2>/dev/null || true' USR1

result=0
for pid in "${pids[@]}"; do
  while true; do
    signalled=""
    code=0
    wait "$pid" || code=$?
    # A signal ends `wait`, not the process.
    [[ -n "$signalled" ]] || break
  done
  if ((result == 0)); then
    result="$code"
  fi
done
exit "$result"
