#!/usr/bin/env bash
# Stops the experiment on all workers of a slice: it saves at its next step and ends. The slice stays, and costs money. The
# same launch.sh goes on from there; one that is watching the run ends too.
#
# usage: tpu_setup/stop.sh --name NAME --zone ZONE [--wait SECONDS] [--project PROJECT] [--dry-run]
#
#   --wait     for so long it may save, then it is killed; 300 by default
#   --dry-run  prints the command and does nothing
#
# Exit statuses: 0 nothing runs there any more; 2 wrong flags; 69 gcloud failed, or a worker does not answer.

# shellcheck source=tpu_setup/gcloud.sh
source "$(dirname "$0")/gcloud.sh"

wait=300
read_flags 'name zone project wait' '' "$@"
need name zone
need_count wait

on_workers run all "$(worker_sh stop "$wait")"
