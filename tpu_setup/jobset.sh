#!/usr/bin/env bash
# Runs an experiment on a TPU slice of a GKE cluster: fills in jobset.yaml and applies it with kubectl, in its current
# context and namespace. The same experiment again, after `kubectl delete jobset NAME`, resumes the run.
#
# usage: tpu_setup/jobset.sh --name NAME --image IMAGE --accelerator ACCELERATOR --topology TOPOLOGY --bucket BUCKET
#                            [--chips N] [--restarts N] [--service-account ACCOUNT] [--dry-run] -- MODULE [FLAGS]
#
#   --image        has this package and its environment, see README.md
#   --accelerator  label of the node pool: tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
#   --topology     of the node pool, such as 4x4 or 2x2x2
#   --bucket       Cloud Storage bucket, mounted at runs/ of every host
#   --chips        of one host; 4 by default. The number of hosts is that of the topology's chips by this.
#   --restarts     how often all hosts are started again; 5 by default
#   --service-account  of Kubernetes, which may write to the bucket; default by default
#   --dry-run      prints the manifest and the command, and does nothing
#
# Exit statuses: 0 applied; 2 wrong flags; 69 kubectl failed or is absent.

# shellcheck source=tpu_setup/gcloud.sh
source "$(dirname "$0")/gcloud.sh"

image='' accelerator='' topology='' bucket='' chips=4 restarts=5 service_account=default
read_flags 'name image accelerator topology bucket chips restarts service-account' '' "$@"
need name image accelerator topology bucket
need_count chips
need_count restarts
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || wrong_flags "--topology $topology is not like 4x4 or 2x2x2"
[ ${#rest[@]} -gt 0 ] || wrong_flags 'no module after --; for example: -- experiments.quickstart'
all=$((${topology//x/ * }))
((chips > 0 && all % chips == 0)) || wrong_flags "--topology $topology has $all chips, which hosts of $chips do not divide"
hosts=$((all / chips))
((hosts == 1)) || rest+=(--processes.coordinator auto)

# A JSON list is YAML too.
command=''
for word in python -m "${rest[@]}"; do
  word=${word//\\/\\\\}
  command+="${command:+, }\"${word//\"/\\\"}\""
done

manifest=$(< "$here/jobset.yaml")
fill() {
  manifest=${manifest//__"$1"__/"$2"}
}
fill NAME "$name"
fill RESTARTS "$restarts"
fill HOSTS "$hosts"
fill SERVICE_ACCOUNT "$service_account"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill IMAGE "$image"
fill CHIPS "$chips"
fill BUCKET "$bucket"
fill COMMAND "[$command]"

echo "$manifest" > "$room/jobset.yaml"
if [ -n "$dry_run" ]; then
  cat "$room/jobset.yaml"
  echo '# kubectl apply -f the above'
else
  run kubectl apply -f "$room/jobset.yaml"
fi
