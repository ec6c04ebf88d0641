#!/usr/bin/env bash
# Starts an experiment module on a TPU VM that bootstrap.sh has prepared. It goes on when the connection ends. The same
# command again resumes the run.
set -euo pipefail

usage() {
  cat <<'END'
usage: tpu_setup/launch.sh --name NAME --zone ZONE [--project PROJECT] [--dry-run] -- MODULE [FLAGS OF THE EXPERIMENT]

  MODULE     for example experiments.quickstart
  --dry-run  print the command and do nothing
END
}

fail() {
  echo "launch.sh: $1" >&2
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
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown flag $1; flags of the experiment come after --" ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] || fail 'needed are --name and --zone'
[ $# -gt 0 ] || fail 'no module after --'
where+=("--zone=$zone")

experiment=$(printf '%q ' "$@")
remote="cd rlhf_jax && mkdir -p runs && (nohup .venv/bin/python -m ${experiment}>> runs/launch.log 2>&1 < /dev/null &)"
command=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--command=$remote")
if [ -n "$dry_run" ]; then
  printf '%q ' "${command[@]}"
  echo
else
  "${command[@]}"
  echo "Started. To watch it: gcloud compute tpus tpu-vm ssh $name ${where[*]} --command='tail -f rlhf_jax/runs/launch.log'"
fi
