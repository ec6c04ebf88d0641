#!/usr/bin/env bash
# Creates one single-host TPU VM. Run it where `gcloud` is logged in.
set -euo pipefail

usage() {
  cat <<'END'
usage: tpu_setup/create.sh --name NAME --zone ZONE --type TYPE [--version RUNTIME] [--project PROJECT] [--spot] [--dry-run]

  --type     v4-8, v5litepod-1, v5litepod-4, v5litepod-8, v5p-8, v6e-1 or v6e-4: slices of one host
  --version  software of the VM; by default the one that belongs to the type
  --spot     cheaper; may be taken away at any time, and its disk with it
  --dry-run  print the command and do nothing
END
}

fail() {
  echo "create.sh: $1" >&2
  usage >&2
  exit 2
}

name='' zone='' type='' version='' dry_run=''
more=()
while [ $# -gt 0 ]; do
  case $1 in
    --name | --zone | --type | --version | --project) [ -n "${2:-}" ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --name) name=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --type) type=$2; shift 2 ;;
    --version) version=$2; shift 2 ;;
    --project) more+=("--project=$2"); shift 2 ;;
    --spot) more+=(--spot); shift ;;
    --dry-run) dry_run=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown flag $1" ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] && [ -n "$type" ] || fail 'needed are --name, --zone and --type'

case $type in
  v4-8) default=tpu-ubuntu2204-base ;;
  v5litepod-[148]) default=v2-alpha-tpuv5-lite ;;
  v5p-8) default=v2-alpha-tpuv5 ;;
  v6e-[14]) default=v2-alpha-tpuv6e ;;
  *) fail "type $type is not one of the single-host slices below; rlhf_jax does not start up on several hosts yet" ;;
esac

command=(gcloud compute tpus tpu-vm create "$name" "--zone=$zone" "--accelerator-type=$type"
         "--version=${version:-$default}" ${more[@]+"${more[@]}"})
if [ -n "$dry_run" ]; then
  printf '%q ' "${command[@]}"
  echo
else
  "${command[@]}"
fi
