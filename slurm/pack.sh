#!/bin/bash
# Packs a large set by many tasks at once. All words are those of data.pack:
#   sbatch --array=1-64 slurm/pack.sh images/ shards/big --size 224
# The task that ends last joins the shards. After a task was killed, one with the same words and
# --array=1 writes what is missing.

# --- your site ----------------------------------------------------------------------------------
#SBATCH --job-name=selfdistill-pack
#SBATCH --ntasks=1
##SBATCH --cpus-per-task=8
##SBATCH --time=24:00:00
##SBATCH --partition=cpu
##SBATCH --account=mine
#SBATCH --output=%x-%A_%a.log
#SBATCH --requeue
#SBATCH --open-mode=append

# --- your site: what makes Python 3.11 and the packages available (.venv is found by itself) ----
# source /path/to/venv/bin/activate

ROOT=$(cd "${SELFDISTILL_ROOT:-$SLURM_SUBMIT_DIR}" && pwd) || exit 2
[ ! -x "$ROOT/.venv/bin/python" ] || PATH=$ROOT/.venv/bin:$PATH
first=${SLURM_ARRAY_TASK_MIN:-1}
parts=$((${SLURM_ARRAY_TASK_MAX:-1} - first + 1))
if [ "${SLURM_ARRAY_TASK_COUNT:-1}" != "$parts" ]; then
    echo "error: the array has gaps: give --array=1-64, or --array=1, which writes what is missing" >&2
    exit 2
fi
PYTHONPATH=$ROOT exec python -m data.pack "$@" \
    --part "$((${SLURM_ARRAY_TASK_ID:-1} - first + 1))/$parts"
