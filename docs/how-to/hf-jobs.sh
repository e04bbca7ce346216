#!/bin/bash
# Convert in parts with Hugging Face Jobs: one job a part; a bucket of yours is the shared folder.
#
#   IMAGE=... BUCKET=me/work SRC=hf://deepseek-ai/DeepSeek-V4-Pro NAME=pro-q2 OPTIONS="--recipe q2" PARTS=8 ./hf-jobs.sh
#
# IMAGE is one that has ds4convert. Jobs need a paid plan; `hf jobs ps` lists them, and DRY=--dry-run only shows them.
# When all have ended, run it once more with END=1: that run makes what is missing and writes the manifest.
set -euo pipefail
: "${IMAGE:?an image that has ds4convert}" "${BUCKET:?owner/name of a bucket}" "${SRC:?}" "${NAME:?}"
: "${OPTIONS:=}" "${PARTS:=8}" "${FLAVOR:=cpu-upgrade}" "${TIMEOUT:=12h}" "${DRY:=}" "${END:=}"

job() { # name of the job, then the words behind OUT
    # shellcheck disable=SC2086 # OPTIONS and DRY are words of their own
    hf jobs run --detach $DRY --name "$1" --flavor "$FLAVOR" --timeout "$TIMEOUT" --attempts 3 --secrets HF_TOKEN \
        -v "hf://buckets/$BUCKET:/shared" "$IMAGE" ds4convert quantize "$SRC" "/shared/$NAME" $OPTIONS "${@:2}"
}

if [ -n "$END" ]; then
    job "$NAME-end"
else
    for n in $(seq "$PARTS"); do job "$NAME-$n" --part "$n/$PARTS"; done
fi
