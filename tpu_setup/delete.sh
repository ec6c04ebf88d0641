#!/usr/bin/env bash
# Deletes a slice, and with it the disks of its workers: runs that are not in a bucket are lost. Fetch them first:
# gcloud compute tpus tpu-vm scp --recurse NAME:rlhf_jax/runs . --zone ZONE
#
# usage: tpu_setup/delete.sh --name NAME --zone ZONE [--queued] [--yes] [--project PROJECT] [--dry-run]
#
#   --queued   it was created with --queued: deletes the queued resource and its slice
#   --yes      does not ask
#   --dry-run  prints the command and does nothing
#
# Exit statuses: 0 it is gone; 2 wrong flags, or the answer was not yes; 69 gcloud failed.

# shellcheck source=tpu_setup/gcloud.sh
source "$(dirname "$0")/gcloud.sh"

queued='' yes=''
read_flags 'name zone project' 'queued yes' "$@"
need name zone

if [ -z "$dry_run$yes" ]; then
  read -r -p "Delete $name, its disks and all runs on them? Type yes: " answer || true
  [ "$answer" = yes ] || refuse 'nothing was deleted'
fi
if [ -n "$queued" ]; then
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
else
  run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
fi
