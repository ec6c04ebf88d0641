#!/usr/bin/env bash
# Copies the committed state of this checkout to a TPU VM and installs it there, in ~/rlhf_jax/.venv. Run it again after
# a commit: files are replaced, the environment and the runs stay.
set -euo pipefail

usage() {
  cat <<'END'
usage: tpu_setup/bootstrap.sh --name NAME --zone ZONE [--project PROJECT] [--dry-run]

  --dry-run  print the commands and do nothing
END
}

fail() {
  echo "bootstrap.sh: $1" >&2
  usage >&2
  exit 2
}

name='' zone='' dry_run=''
where=()
while [ $# -gt 0 ]; do
  case $1 in
    --name | --zone | --project) [ -n "${2:-}" ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --name) name=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --project) where+=("--project=$2"); shift 2 ;;
    --dry-run) dry_run=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown flag $1" ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] || fail 'needed are --name and --zone'
where+=("--zone=$zone" --worker=all)

run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# The VM's own Python may be older than 3.11, so uv fetches one. The last line shows the devices that JAX sees.
read -r -d '' install <<'END' || true
set -eu
mkdir -p rlhf_jax
cd rlhf_jax
tar -xzf ../rlhf_jax.tar.gz
[ -d .venv ] || { python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --seed --python 3.12 .venv; }
.venv/bin/python -m pip install --quiet -e '.[tpu]'
.venv/bin/python -c 'import jax; print(jax.__version__, jax.devices())'
END

cd "$(dirname "$0")/.."
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
if [ -n "$(git status --porcelain)" ]; then
  echo 'bootstrap.sh: uncommitted changes are not copied' >&2
fi
run git archive --format=tar.gz --output="$room/rlhf_jax.tar.gz" HEAD
run gcloud compute tpus tpu-vm scp "$room/rlhf_jax.tar.gz" "$name:rlhf_jax.tar.gz" "${where[@]}"
run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--command=$install"
