#!/usr/bin/env bash
# What there is, and so what costs money: a slice and what each of its workers does; without --name, all slices of a zone.
#
# usage: tpu_setup/status.sh --zone ZONE [--name NAME] [--project PROJECT] [--dry-run]
#
#   --dry-run  prints the commands and does nothing
#
# Exit statuses: 0 it was told; 2 wrong flags; 69 gcloud failed, or a worker does not answer.

# shellcheck source=tpu_setup/gcloud.sh
source "$(dirname "$0")/gcloud.sh"

read_flags 'name zone project' '' "$@"
need zone

if [ -z "$name" ]; then
  run gcloud compute tpus queued-resources list "${where[@]}"
  run gcloud compute tpus tpu-vm list "${where[@]}"
else
  describe run
  on_workers run all "$(worker_sh state)"
fi
