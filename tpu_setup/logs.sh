#!/usr/bin/env bash
# What the workers of a slice print, each line with the number of its worker in front.
#
# usage: tpu_setup/logs.sh --name NAME --zone ZONE [--worker N] [--lines N] [--follow] [--project PROJECT] [--dry-run]
#
#   --worker   one worker; by default all
#   --lines    how many of the last lines; 100 by default
#   --follow   goes on with what comes, until interrupted
#   --dry-run  prints the command and does nothing
#
# Exit statuses: 0 done; 2 wrong flags; 69 gcloud failed, or nothing was launched there.

# shellcheck source=tpu_setup/gcloud.sh
source "$(dirname "$0")/gcloud.sh"

worker=all lines=100 follow=''
read_flags 'name zone project worker lines' 'follow' "$@"
need name zone
need_count lines

on_workers run "$worker" "$(worker_sh log "$lines" ${follow:+--follow})"
