#!/usr/bin/env bash
# Copies this package at a commit to all workers of a slice and installs it there, in ~/rlhf_jax/.venv. Run it again for
# another commit: the files are replaced; the environment, the runs and the bucket stay.
#
# usage: tpu_setup/bootstrap.sh --name NAME --zone ZONE [--commit COMMIT] [--bucket BUCKET] [--project PROJECT] [--dry-run]
#
#   --commit   what to install; by default HEAD of this checkout. Changes that are not committed are not copied.
#   --bucket   mounts this Cloud Storage bucket at ~/rlhf_jax/runs of all workers, so that they share the runs, and the runs
#              outlive the slice. Needs gcsfuse on the workers; says how to install it where it is missing.
#   --dry-run  prints the commands and does nothing
#
# Exit statuses: 0 installed; 2 wrong flags; 69 gcloud or the installation failed.

# shellcheck source=tpu_setup/gcloud.sh
source "$(dirname "$0")/gcloud.sh"

commit=HEAD bucket=''
read_flags 'name zone project commit bucket' '' "$@"
need name zone

hash=$(git -C "$here/.." rev-parse --verify --quiet "$commit^{commit}") || refuse "$commit is no commit of $here/.."
[ -z "$(git -C "$here/.." status --porcelain)" ] || say 'changes that are not committed are not copied'

archive=$room/rlhf_jax.tar.gz
run git -C "$here/.." archive --format=tar.gz "--output=$archive" "$hash"
run gcloud compute tpus tpu-vm scp "$archive" "$name:rlhf_jax.tar.gz" "${where[@]}" --worker=all
on_workers run all "mkdir -p rlhf_jax && tar -xzf rlhf_jax.tar.gz -C rlhf_jax tpu_setup/worker.sh && \
$(worker_sh install "$hash" ${bucket:+"$bucket"})"
