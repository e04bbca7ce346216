#!/bin/bash
# Convert in parts with SLURM: an array of parts, then the run that ends the conversion.
#
#   SRC=/data/DeepSeek-V4-Pro OUT=/data/pro-q2 OPTIONS="--recipe q2" PARTS=8 ./slurm.sh
#
# Submits itself; SRC and OUT have to be seen by every node under these names.
#SBATCH --job-name=ds4convert
#SBATCH --cpus-per-task=8
#SBATCH --mem=4G
#SBATCH --requeue
set -euo pipefail
: "${SRC:?the checkpoint}" "${OUT:?the folder to write}" "${OPTIONS:=}" "${PARTS:=8}"
export SRC OUT OPTIONS PARTS

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # a part
    # shellcheck disable=SC2086 # OPTIONS are several words
    exec ds4convert quantize "$SRC" "$OUT" $OPTIONS --part "$SLURM_ARRAY_TASK_ID/$PARTS"
elif [ -n "${SLURM_JOB_ID:-}" ]; then # the end
    # shellcheck disable=SC2086
    exec ds4convert quantize "$SRC" "$OUT" $OPTIONS
fi
array=$(sbatch --parsable --array="1-$PARTS" "$0")
sbatch --dependency="afterany:$array" "$0" # afterany: a part that failed is made by the ending run
