#!/usr/bin/env bash
# Creates a TPU slice, of one host or of many, and waits until it is there. It costs money from then until delete.sh.
#
# usage: tpu_setup/create.sh --name NAME --zone ZONE --type TYPE [--version RUNTIME] [--queued [--pause SECONDS]]
#                            [--spot] [--project PROJECT] [--dry-run]
#
#   --type     v4-N, v5litepod-N, v5p-N or v6e-N. N counts cores of v4 and v5p (two per device), devices of the others.
#   --version  software of the VMs; by default the one that belongs to the type
#   --queued   as a queued resource: waits in Google's queue until there is room; delete it with --queued too
#   --pause    between two looks at the queue; 30 s by default
#   --spot     cheaper; may be taken away at any time, and its disk with it
#   --dry-run  prints the command and does nothing
#
# Exit statuses: 0 it is ready; 2 wrong flags; 69 gcloud failed (quota, no room, not logged in, ...).

# shellcheck source=tpu_setup/gcloud.sh
source "$(dirname "$0")/gcloud.sh"

type='' version='' queued='' spot='' pause=30
read_flags 'name zone project type version pause' 'queued spot' "$@"
need name zone type
need_count pause

case $type in
  v4-[1-9]*) default=tpu-ubuntu2204-base ;;
  v5litepod-[1-9]*) default=v2-alpha-tpuv5-lite ;;
  v5p-[1-9]*) default=v2-alpha-tpuv5 ;;
  v6e-[1-9]*) default=v2-alpha-tpuv6e ;;
  *) wrong_flags "type $type is none of v4-N, v5litepod-N, v5p-N, v6e-N" ;;
esac
software=${version:-$default}

if [ -z "$queued" ]; then
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$software" \
    ${spot:+--spot}
  exit
fi

run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" "--accelerator-type=$type" \
  "--runtime-version=$software" ${spot:+--spot}
trap 'say "It stays in the queue, and costs money once it is granted. delete.sh --queued takes it back."; exit 130' INT
while true; do
  state=$(run gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
  if [ -n "$dry_run" ]; then
    echo "$state"
    exit
  fi
  case $state in
    ACTIVE) exit ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      say "The request for $name is $state. See why: gcloud compute tpus queued-resources describe $name ${where[*]}; then \
delete.sh --queued, and create it again."
      exit 69 ;;
  esac
  say "$name: $state"
  sleep "$pause"
done
