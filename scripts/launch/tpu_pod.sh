#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One run on all hosts of a Cloud TPU slice, from a machine with gcloud:
#
#   scripts/launch/tpu_pod.sh NAME ZONE [arguments of scripts/train.py]
#   scripts/launch/tpu_pod.sh my-v5e-16 us-west4-a \
#     --config=experiments/NAME.py --workdir=/mnt/shared/runs
#
# Before that, once, on all hosts: the checkout in ~/tfjax with the extra [tpu],
# and one directory for --workdir that they share (Filestore, or a bucket
# mounted by gcsfuse):
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='
#     cd tfjax && python3 -m venv .venv && .venv/bin/pip install -e ".[tpu]"'
#
# Not run: no TPU was at hand.
set -euo pipefail
name="$1" zone="$2"
shift 2
printf -v arguments '%q ' "$@"
# The hosts' environment does not tell of each other; JAX asks the machine.
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd tfjax && .venv/bin/python scripts/train.py \
--config.runtime.distributed=on $arguments"
