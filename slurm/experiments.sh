#!/bin/bash
# One task of an array of experiments; `python -m experiments.run ... --slurm` submits it, once for each
# level of jobs that do not wait for one another. Options of sbatch for all: SBATCH_PARTITION and so on.

# --- your site ----------------------------------------------------------------------------------
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
##SBATCH --gpus-per-node=1
##SBATCH --cpus-per-task=8
##SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=mine
# One task a GPU: gpus-per-node and ntasks-per-node are the same number.
# --- what lets it survive: a warning 180 s before the time limit, and the way back to the queue -
#SBATCH --signal=USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append

# --- your site: what makes Python 3.11 and the packages available (.venv is found by itself) ----
# module load cuda
# source /path/to/venv/bin/activate

source "${SELFDISTILL_ROOT:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
export PYTHONPATH=$ROOT
task=("$SWEEP" "$LEVELS" "$LEVEL" "$SLURM_ARRAY_TASK_ID")
told=$(python -m experiments.task start "${task[@]}") || exit
eval "$told"
[ -z "${COMPLETE:-}" ] || exit 0
LOG=$SWEEP/logs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.log
# Unless it comes back.
trap 'code=$?; [ -n "${COMES_BACK:-}" ] || python -m experiments.task end "${task[@]}" --code $code --log "$LOG"' EXIT
launch "${WORDS[@]}"
