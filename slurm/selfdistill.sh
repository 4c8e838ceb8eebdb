#!/bin/bash
# All three stages in one job. As it is, it adapts the shipped small model to handwritten digits:
#   sbatch slurm/selfdistill.sh
# Your own, on four nodes:
#   RECIPE=vit_base DATA=shards/cub MODEL=facebook/vit-mae-base OUTPUT=runs/cub \
#       ARGS="--precision bf16 --seed 1" sbatch --nodes=4 slurm/selfdistill.sh
# ARGS holds any options of engine/run.py.

# --- your site ----------------------------------------------------------------------------------
#SBATCH --job-name=selfdistill
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

source "${SELFDISTILL_ROOT:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
launch --stage all
