# shellcheck shell=bash disable=SC2034
# Sourced by the commands beside it: their flags, printing or running what they do, and what is asked of gcloud.
#
# Exit statuses of every command: 0 done; 2 wrong flags or a refusal that the user can mend; 69 gcloud or kubectl failed or
# is absent; 130 interrupted. launch.sh has more of them, see there.
set -euo pipefail
((BASH_VERSINFO[0] >= 5)) || { echo "these commands need bash 5 or newer; this is $BASH_VERSION" >&2; exit 69; }

name='' zone='' project='' dry_run='' where=() rest=()
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT

# The comment that a command begins with.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

say() {
  echo "$(basename "$0"): $*" >&2
}

refuse() {
  say "$1"
  exit 2
}

wrong_flags() {
  say "$1"
  usage >&2
  exit 2
}

# read_flags VALUES SWITCHES "$@": sets the variable of every flag, and rest to what follows --. VALUES are names of flags
# that take a value, SWITCHES of those that do not. Every command has --dry-run and --help.
read_flags() {
  local values=" $1 " switches=" dry-run $2 " flag
  shift 2
  while [ $# -gt 0 ]; do
    flag=${1#--}
    case $1 in
      -h | --help) usage; exit 0 ;;
      --) shift; rest=("$@"); break ;;
    esac
    if [[ $1 == --* && $values == *" $flag "* ]]; then
      [[ -n ${2:-} && $2 != --* ]] || wrong_flags "--$flag needs a value"
      printf -v "${flag//-/_}" %s "$2"
      shift 2
    elif [[ $1 == --* && $switches == *" $flag "* ]]; then
      printf -v "${flag//-/_}" yes
      shift
    else
      wrong_flags "unknown flag $1; what belongs to the experiment comes after --"
    fi
  done
  where=("--zone=$zone" ${project:+"--project=$project"})
}

need() {
  local flag
  for flag; do
    [ -n "${!flag}" ] || wrong_flags "--$flag is needed"
  done
}

# need_count FLAG: the flag's value is a whole number.
need_count() {
  local variable=${1//-/_}
  [[ ${!variable} =~ ^[0-9]+$ ]] || wrong_flags "--$1 is '${!variable}'; needed is a whole number"
}

# The words as a shell takes them.
quoted() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  echo "$line"
}

# try COMMAND...: runs it and keeps what it says on stderr for explain; its status is the command's.
try() {
  command -v "$1" > /dev/null || { say "there is no $1 on PATH. Install the Google Cloud SDK (kubectl is one of its \
components): https://cloud.google.com/sdk/docs/install"; exit 69; }
  { "$@" 2>&1 >&3 3>&- < /dev/null | tee "$room/stderr" >&2; } 3>&1
}

# run COMMAND...: with --dry-run prints it; else runs it, and ends with 69 and a reason where it fails.
run() {
  local status=0
  if [ -n "$dry_run" ]; then
    quoted "$@"
    return
  fi
  try "$@" || status=$?
  [ "$status" = 0 ] || { explain "$status" "${*:1:5}"; exit 69; }
}

# explain STATUS COMMAND: one line on what failed and what to do.
explain() {
  local advice='What it said is above.'
  case $(tr '[:upper:]' '[:lower:]' < "$room/stderr") in
    *'gcloud auth login'* | *unauthenticated* | *reauthentication*)
      advice='gcloud is not logged in. Run: gcloud auth login' ;;
    *'no more capacity'* | *stockout*)
      advice='The zone has no such slice free now. Wait for one with create.sh --queued, or take another zone.' ;;
    *quota* | *resource_exhausted*)
      advice='The quota of the project does not allow it. Take another zone or type, delete what you do not need (status.sh
lists it), or ask for more.' ;;
    *permission_denied* | *'has not been used in project'*)
      advice='Your account may not do that. Enable tpu.googleapis.com, and ask for roles/tpu.admin.' ;;
    *already_exists* | *'already exists'*)
      advice='That name is taken: use what is there, delete.sh it, or choose another --name.' ;;
    *not_found* | *'was not found'*)
      advice='There is nothing of that name in this zone and project. status.sh without --name lists what there is.' ;;
    *preempted* | *terminated*)
      advice='The slice was preempted. delete.sh, create.sh and bootstrap.sh it; the same launch.sh goes on.' ;;
    *)
      [ "$1" != 255 ] || advice='ssh does not reach a worker: it may be booting, or a firewall closes port 22. Try again in a
minute; status.sh shows the state.' ;;
  esac
  say "failed with status $1: $2 ... ${advice//$'\n'/ }"
}

# worker_sh ARGUMENTS...: the command line of worker.sh on a worker.
worker_sh() {
  quoted bash rlhf_jax/tpu_setup/worker.sh "$@"
}

# on_workers VERB WORKER COMMAND: runs a command line on one worker or all; VERB is run or try.
on_workers() {
  "$1" gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$2" "--command=$3"
}

# describe VERB: state, number of workers, type, software version, spot, queued resource; one line, with commas between.
describe() {
  local fields='state,networkEndpoints.len(),acceleratorType,runtimeVersion,schedulingConfig.spot,queuedResource'
  "$1" gcloud compute tpus tpu-vm describe "$name" "${where[@]}" "--format=csv[no-heading]($fields)"
}
