#!/bin/bash
# A job array: all three stages for each seed and data set, each in a run folder of its own.
#   sbatch --array=0-4 slurm/sweep.sh                                    five seeds of the digits
#   DATASETS="shards/cub shards/dtd" RECIPE=vit_base MODEL=facebook/vit-mae-base OUTPUT=runs/sweep \
#       sbatch --array=0-9%4 slurm/sweep.sh                            five of each, four at a time

# --- your site ----------------------------------------------------------------------------------
#SBATCH --job-name=selfdistill-sweep
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
##SBATCH --gpus-per-node=2
##SBATCH --cpus-per-task=8
##SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=mine
# One task a GPU: gpus-per-node and ntasks-per-node are the same number.
#SBATCH --output=%x-%A_%a.log
# --- what lets it survive: a warning 180 s before the time limit, and the way back to the queue -
#SBATCH --signal=USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append

# --- your site: what makes Python 3.11 and the packages available (.venv is found by itself) ----
# module load cuda
# source /path/to/venv/bin/activate

source "${SELFDISTILL_ROOT:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
# Index i is data set i mod N with seed i div N.
if [ -n "${DATASETS:-}" ]; then read -ra sets <<<"$DATASETS"; else sets=(${DATA:+"$DATA"}); fi
if [ ${#sets[@]} = 0 ]; then
    echo "error: DATASETS is not set: name packed data sets, or take RECIPE=quickstart" >&2
    exit 2
fi
same=$(for one in "${sets[@]}"; do basename "$one"; done | sort | uniq -d | head -1)
if [ -n "$same" ]; then
    echo "error: two of DATASETS end in $same, which names their run folders: rename one, or link to it" >&2
    exit 2
fi
SEED=$((SLURM_ARRAY_TASK_ID / ${#sets[@]}))
DATA=${sets[SLURM_ARRAY_TASK_ID % ${#sets[@]}]}
OUTPUT=$OUTPUT/$(basename "$DATA")-seed-$SEED
launch --stage all --seed "$SEED"
