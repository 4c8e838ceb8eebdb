#!/bin/bash
# One stage: decoder, pretrain, distill or finetune.
#   STAGE=distill RECIPE=vit_base DATA=shards/cub MODEL=facebook/vit-mae-base OUTPUT=runs/cub \
#       sbatch --nodes=4 slurm/stage.sh
# As a job array it fine-tunes once for each index, with that seed, in OUTPUT/seeds/INDEX:
#   STAGE=finetune ... sbatch --array=0-4 slurm/stage.sh
# `python -m launcher.slurm submit` makes a chain of these.

# --- your site ----------------------------------------------------------------------------------
#SBATCH --job-name=selfdistill-stage
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
##SBATCH --gpus-per-node=2
##SBATCH --cpus-per-task=8
##SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=mine
##SBATCH --no-kill   # with spare nodes: USED_NODES=4 sbatch --nodes=5 ...
# One task a GPU: gpus-per-node and ntasks-per-node are the same number.
#SBATCH --output=%x-%j.log
# --- what lets it survive: a warning 180 s before the time limit, and the way back to the queue -
#SBATCH --signal=USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append

# --- your site: what makes Python 3.11 and the packages available (.venv is found by itself) ----
# module load cuda
# source /path/to/venv/bin/activate

if [ -z "${STAGE:-}" ]; then
    echo "error: STAGE is not set: decoder, pretrain, distill or finetune" >&2
    exit 2
fi
source "${SELFDISTILL_ROOT:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
if [ "$STAGE" = finetune ] && [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    one_seed
    launch --stage finetune --seed "$SEED"
fi
launch --stage "$STAGE"
