#!/usr/bin/env bash
# Starts an experiment on all workers of a slice that bootstrap.sh has prepared, shows what they print, and starts it again
# where it was cut short. The same command again resumes the run, or watches it where it is still running: Ctrl-C ends only
# the watching, stop.sh ends the run. One run at a time: a TPU belongs to one process of each worker.
#
# usage: tpu_setup/launch.sh --name NAME --zone ZONE [--restarts N] [--recreate] [--pause SECONDS] [--project PROJECT]
#                            [--dry-run] -- MODULE [FLAGS OF THE EXPERIMENT]
#
#   MODULE      for example experiments.quickstart. Where the slice has several workers, --processes.coordinator auto is
#               added, and the run directory has to be shared: bootstrap.sh --bucket, or a --run-dir that all workers see.
#   --restarts  how often it is started again, and how many looks in a row may fail; 5 by default. It is started again when
#               it ends with 75 (start me again), is killed, or a worker dies; not after 1 (a bug), 2 (a wrong flag) or 130.
#   --recreate  a slice that was preempted is deleted, created and prepared again as it was. Costs money each time. Create it
#               with --queued, so that the new one waits for room instead of failing.
#   --pause     between two looks at the workers, and before a restart; 30 s by default
#   --dry-run   prints the commands and does nothing
#
# Exit statuses: that of the experiment where it ended by itself (0 finished, 1, 2, 130); 2 also wrong flags or no shared run
# directory; 69 gcloud failed or the workers do not answer; 75 cut short (preempted, stopped, no restarts left), the same
# command goes on; 130 interrupted, the run goes on.

# shellcheck source=tpu_setup/gcloud.sh
source "$(dirname "$0")/gcloud.sh"

restarts=5 recreate='' pause=30
read_flags 'name zone project restarts pause' 'recreate' "$@"
need name zone
need_count restarts
need_count pause
[ ${#rest[@]} -gt 0 ] || wrong_flags 'no module after --; for example: -- experiments.quickstart'

run_dir='' together=(--processes.coordinator auto)
for index in "${!rest[@]}"; do
  case ${rest[index]} in
    --run-dir=* | --run_dir=*) run_dir=${rest[index]#*=} ;;
    --run-dir | --run_dir) run_dir=${rest[index + 1]:-} ;;
  esac
done
log_dir=${run_dir:-runs/${rest[0]##*.}}.logs/$name

# start VERB FLAGS...: on all workers, with these flags of the experiment besides the user's.
start() {
  on_workers "$1" all "$(worker_sh start "$log_dir" "${rest[@]}" "${@:2}")"
}

if [ -n "$dry_run" ]; then
  describe run
  echo '# with several workers, or --recreate: is a bucket mounted?'
  on_workers run 0 "$(worker_sh installed)"
  echo '# with one worker'
  start run
  echo '# with several'
  start run "${together[@]}"
  echo "# every $pause s, until it ends"
  on_workers run all "$(worker_sh poll)"
  exit
fi

# Sets state to that of the slice: one of Google's, DELETED, or UNKNOWN where gcloud does not say. A preempted slice of a
# queued resource is gone, and its queued resource suspended.
look() {
  state=UNKNOWN
  if describe try > "$room/slice"; then
    IFS=, read -r state _ < "$room/slice"
  elif grep -qi 'not_found' "$room/stderr"; then
    state=DELETED
    [ -z "$queue" ] || case $(try gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      '--format=value(state.state)') in
      SUSPEND*) state=PREEMPTED ;;
    esac
  fi
}

# Shows what the workers printed, and sets states to their states, a line each; fails where one of them does not answer.
poll() {
  on_workers try all "$(worker_sh poll)" > "$room/poll" || return
  grep -v '^worker [^:]*: ' "$room/poll" || true
  states=$(sed -n 's/^worker [^:]*: //p' "$room/poll")
  [ "$(grep -c . <<< "$states")" = "$workers" ]
}

any() {
  grep -qxE "$1" <<< "$states"
}

# What the states say together: running, partly, stopped, again, or the status to end with. The others of a worker that died
# are killed by JAX, so a death outweighs their status 1.
verdict() {
  if any running; then
    if any 'lost|exited [1-9].*'; then echo partly; else echo running; fi
  elif any stopped; then
    echo stopped
  elif any 'exited 2'; then
    echo 2
  elif any 'exited 130'; then
    echo 130
  elif any 'idle|lost|exited (75|12[89]|1[3-9].|2..)'; then
    echo again
  else
    sort -n <<< "${states//exited /}" | tail -n 1
  fi
}

recreate_slice() {
  local slice=(--name "$name" --zone "$zone" ${project:+--project "$project"})
  "$here/delete.sh" "${slice[@]}" ${queue:+--queued} --yes || true
  "$here/create.sh" "${slice[@]}" --type "$type" --version "$software" ${queue:+--queued --pause "$pause"} ${spot:+--spot}
  "$here/bootstrap.sh" "${slice[@]}" --commit "$commit" ${bucket:+--bucket "$bucket"}
}

cut_short() {
  say "$1 The same command goes on from the last checkpoint."
  exit 75
}

describe run > "$room/slice"
IFS=, read -r state workers type software spot queue < "$room/slice"
[ "$state" = READY ] || cut_short "$name is $state, not READY: wait, or delete.sh, create.sh and bootstrap.sh it."
[ "$workers" -gt 1 ] || together=()
if [ "$workers" -gt 1 ] || [ -n "$recreate" ]; then
  installed=$(on_workers run 0 "$(worker_sh installed)")
  read -r commit bucket <<< "$installed"
  [ -n "$run_dir$bucket" ] || refuse "$name has $workers worker(s), whose disks are their own and go with the slice. For \
several workers, or --recreate, mount a bucket with bootstrap.sh --bucket, or pass a --run-dir that all of them see."
fi

start run "${together[@]}"
trap 'say "The run goes on. The same command watches it again; stop.sh stops it."; exit 130' INT
unanswered=0 started_again=0
while true; do
  sleep "$pause"
  answered=''
  if poll; then
    answered=yes unanswered=0
    found=$(verdict)
    case $found in
      running) continue ;;
      partly)
        say 'A worker ended before the others, which are asked to save and end.'
        on_workers try all "$(worker_sh terminate 300)" || true
        continue ;;
      stopped) cut_short 'It was stopped by stop.sh.' ;;
      again) say "Cut short, the workers are: ${states//$'\n'/, }." ;;
      0) say "Finished. The logs of the workers are in $log_dir."; exit ;;
      *) say "It ended with status $found, which another start would not mend."; exit "$found" ;;
    esac
  fi
  look
  case $state in
    READY | UNKNOWN)
      if [ -z "$answered" ]; then
        unanswered=$((unanswered + 1))
        [ "$unanswered" -le "$restarts" ] || { say "$name is $state, but its workers do not answer."; exit 69; }
        say "no answer from the workers of $name, which is $state. The next look is in $pause s."
        continue
      fi ;;
    PREEMPTED | TERMINATED)
      [ -n "$recreate" ] || cut_short "$name was preempted. delete.sh, create.sh and bootstrap.sh it, or pass --recreate." ;;
    DELETED | DELETING | STOPPED | STOPPING)
      cut_short "$name is $state, and not by preemption. create.sh and bootstrap.sh it." ;;
    *)
      say "$name is $state. The next look is in $pause s."
      continue ;;
  esac
  [ "$started_again" -lt "$restarts" ] || cut_short "It was started again $restarts times, as many as --restarts allows."
  started_again=$((started_again + 1))
  [[ $state != PREEMPTED && $state != TERMINATED ]] || recreate_slice
  say "start $started_again of at most $restarts more"
  start try "${together[@]}" || true                             # where it fails, the next look says so
done
