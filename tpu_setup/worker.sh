#!/usr/bin/env bash
# The part of bootstrap.sh, launch.sh, logs.sh, status.sh and stop.sh that runs on each worker; they call it over ssh.
#
#   worker.sh install COMMIT [BUCKET]        from ~/rlhf_jax.tar.gz
#   worker.sh installed                      prints that commit and bucket
#   worker.sh start LOG_DIR MODULE [FLAGS]   in the background, once: while it runs, the same again leaves it alone
#   worker.sh poll                           what was printed since the last poll, and the state
#   worker.sh state                          idle, running, stopped, lost (died without a status) or exited STATUS
#   worker.sh log LINES [--follow]
#   worker.sh terminate SECONDS              SIGTERM, and SIGKILL where it is still there after so many seconds
#   worker.sh stop SECONDS                   the same, and the state is stopped: a launch.sh that watches does not restart it
#
# In ~/rlhf_jax/launch: commit, bucket, command, pid, status, worker.log, how much of it was shown, and a lock that is held
# while the experiment runs. They are on the worker's own disk; the log is copied to LOG_DIR when the experiment ends.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p launch

# As jax.distributed asks for it; the host's name where there is no metadata server.
number=$(curl -sf -m 5 -H 'Metadata-Flavor: Google' \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || hostname)

fail() {
  echo "worker $number: $1" >&2
  exit 1
}

# Shared, so that two who ask at a time do not take each other for the experiment.
running() {
  ! flock --shared --nonblock launch/lock true
}

state() {
  local state=idle
  if running; then
    state=running
  elif [ -e launch/stopped ]; then
    state=stopped
  elif [ -e launch/status ]; then
    state="exited $(cat launch/status)"
  elif [ -e launch/command ]; then
    state=lost
  fi
  echo "worker $number: $state"
}

# What an earlier commit left goes; what belongs to this machine stays.
install() {
  ! running || fail 'an experiment runs here. stop.sh it first.'
  find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs ! -name launch -exec rm -rf {} +
  tar -xzf ../rlhf_jax.tar.gz
  [ -d .venv ] || { python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --seed --python 3.12 .venv; }
  .venv/bin/python -m pip install --quiet -e '.[tpu]'
  [ $# = 1 ] || echo "$2" > launch/bucket
  [ ! -e launch/bucket ] || mount_bucket
  echo "$1" > launch/commit
  .venv/bin/python -c 'import jax; print(jax.__version__, jax.local_device_count(), "of", jax.device_count(), "devices")'
}

installed() {
  [ -e launch/commit ] || fail 'nothing is installed here. Run bootstrap.sh first.'
  echo "$(cat launch/commit) $(cat launch/bucket 2> /dev/null || true)"
}

# The caches of gcsfuse are off, so that every host sees at once what another wrote.
mount_bucket() {
  local bucket
  bucket=$(cat launch/bucket)
  command -v gcsfuse > /dev/null || fail "gcsfuse is missing, which mounts gs://$bucket. On all workers, run:
    echo 'deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-jammy main' |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list
    curl https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc
    sudo apt-get update && sudo apt-get install -y gcsfuse"
  mkdir -p runs
  if mountpoint -q runs; then
    [ "$(findmnt -n -o SOURCE runs)" = "$bucket" ] || fail "something else than gs://$bucket is mounted at $PWD/runs. \
Unmount it: fusermount -u $PWD/runs"
    return
  fi
  [ -z "$(ls -A runs)" ] || fail "$PWD/runs holds files, which the bucket would hide. Move them away first."
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$bucket" runs 9>&-                                          # it stays, and must not hold the lock of start
}

start() {
  installed > /dev/null
  exec 9> launch/lock
  if ! flock --timeout 0.3 9; then                               # not at once: someone may just be asking
    [ "$*" = "$(cat launch/command)" ] || fail "another experiment runs here: $(cat launch/command). stop.sh it first."
    echo "worker $number: it runs already"
    return
  fi
  [ ! -e launch/bucket ] || mount_bucket
  rm -f launch/status launch/stopped launch/pid
  echo "$*" > launch/command
  setsid --fork bash tpu_setup/worker.sh supervise "$@" < /dev/null >> launch/worker.log 2>&1
  echo "worker $number: started"
}

# Runs in the background. Lock 9 is held by this process, not by the experiment, and is released after the status is written.
supervise() {
  local log_dir=$1 status=0
  shift
  trap : TERM                                                    # of a shutdown: the experiment gets its own, and we wait
  .venv/bin/python -m "$@" 9>&- &
  echo $! > launch/pid
  wait $! || status=$?
  while kill -0 $! 2> /dev/null; do
    status=0
    wait $! || status=$?
  done
  { mkdir -p "$log_dir" && cp launch/worker.log "$log_dir/worker-$number.log"; } || true
  echo "$status" > launch/status
}

poll() {
  local shown=0
  [ ! -e launch/shown ] || shown=$(cat launch/shown)
  if [ -e launch/worker.log ]; then
    tail -c "+$((shown + 1))" launch/worker.log > launch/new
    echo $((shown + $(stat -c %s launch/new))) > launch/shown
    prefixed < launch/new
  fi
  state
}

log() {
  [ -e launch/worker.log ] || fail 'nothing was launched here yet.'
  tail -n "$1" ${2:+--follow} launch/worker.log | prefixed
}

prefixed() {
  sed -u "s/^/[worker $number] /"
}

terminate() {
  local waited
  running || return 0
  kill -TERM "$(cat launch/pid)" 2> /dev/null || true
  for ((waited = 0; waited < 10 * $1; waited++)); do
    running || return 0
    sleep 0.1
  done
  echo "worker $number: still there after $1 s, so it is killed; it goes on from its last checkpoint" >&2
  kill -KILL "$(cat launch/pid)" || true
  while running; do
    sleep 0.1
  done
}

stop() {
  touch launch/stopped                                           # also between two starts of a launch.sh that watches
  terminate "$1"
  state
}

"$@"
