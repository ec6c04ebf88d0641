#!/usr/bin/env bash
# Runs a sweep on as many slices as it has runs: run I of experiments.sweep on slice NAME-I, each watched by launch.sh.
# Create and bootstrap the slices before, with the same bucket, so that --table finds all runs.
#
# usage: tpu_setup/sweep.sh --name NAME --zone ZONE --slices N [--restarts N] [--recreate] [--pause SECONDS]
#                           [--project PROJECT] [--dry-run] -- EXPERIMENT [FLAGS OF experiments.sweep]
#
#   --slices   NAME-0 to NAME-(N-1); as many as `python -m experiments.sweep EXPERIMENT ... --count` prints
#   --restarts, --recreate, --pause  as launch.sh has them
#   --dry-run  prints the commands and does nothing
#
# Exit statuses: 0 all runs finished; 2 wrong flags; else that of the first slice whose run did not; 130 interrupted, the
# runs go on.

# shellcheck source=tpu_setup/gcloud.sh
source "$(dirname "$0")/gcloud.sh"

slices='' restarts=5 recreate='' pause=30
read_flags 'name zone project slices restarts pause' 'recreate' "$@"
need name zone slices
need_count slices
[ ${#rest[@]} -gt 0 ] || wrong_flags 'no experiment after --; for example: -- quickstart --grid ppo.kl_weight=0.01,0.03'

# launch INDEX
launch() {
  "$here/launch.sh" --name "$name-$1" --zone "$zone" --restarts "$restarts" --pause "$pause" ${recreate:+--recreate} \
    ${project:+--project "$project"} ${dry_run:+--dry-run} -- experiments.sweep "${rest[@]}" --index "$1"
}

pids=()
trap 'kill "${pids[@]}"; say "The runs go on. The same command watches them again."; exit 130' INT
for ((index = 0; index < slices; index++)); do
  if [ -n "$dry_run" ]; then
    launch "$index"
  else
    launch "$index" > >(sed -u "s/^/[$name-$index] /") 2>&1 &
    pids+=($!)
  fi
done

worst=0
for index in "${!pids[@]}"; do
  status=0
  wait "${pids[index]}" || status=$?
  say "$name-$index: $status"
  [ "$worst" != 0 ] || worst=$status
done
exit "$worst"
