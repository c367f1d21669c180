#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# This host's part of a run on several GPU hosts without a scheduler:
#
#   scripts/launch/host.sh HOST:PORT HOSTS INDEX [arguments of scripts/train.py]
#
# HOST:PORT is of host 0 and can be reached from all; HOSTS is their number,
# INDEX this one's, from 0. Every host has this checkout and sees one --workdir.
# From one machine, with ssh and four hosts:
#
#   hosts=(gpu1 gpu2 gpu3 gpu4)
#   for i in "${!hosts[@]}"; do
#     ssh "${hosts[$i]}" "cd $PWD && scripts/launch/host.sh gpu1:12355 4 $i \
#       --config=experiments/NAME.py --workdir=/shared/runs" &
#   done
#   wait
#
# Each host's process takes all GPUs of it. Stop with SIGTERM to any one; the
# same commands go on from the checkpoint. Run on loopback by the tests, with
# CPUs; not run on several hosts, nor with GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export JAX_COORDINATOR_ADDRESS="$1" JAX_NUM_PROCESSES="$2" JAX_PROCESS_ID="$3"
shift 3
exec "${PYTHON:-.venv/bin/python}" scripts/train.py "$@"
