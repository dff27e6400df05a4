#!/bin/bash
# Download a data set as a Slurm array, one part of its shards a job:
#
#     sbatch --array=0-7 slurm/download.sh cc12m --output s3://bucket/cc12m --fetch.contact you@example.org
#
# The words are those of data_prep/download.py. Options before the script's name override those below. The first job
# that starts prepares the list while the others wait; the one that ends last indexes and reports. The same command
# continues what failed or was cancelled. To queue the preparation as a job of its own: download.py --slurm.
#SBATCH --job-name=pacl-download
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=pacl-download-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR2@120

# Here: module load ..., source .venv/bin/activate
python=${PYTHON:-python}
export PYTHONUNBUFFERED=1
# Slurm runs a copy of this script; the checkout is where sbatch was called, or where CHECKOUT says.
checkout=${CHECKOUT:-$SLURM_SUBMIT_DIR}

if [ "$SLURM_ARRAY_TASK_MIN" != 0 ] || [ $((SLURM_ARRAY_TASK_MAX + 1)) != "$SLURM_ARRAY_TASK_COUNT" ]; then
    [ -n "$PARTS" ] || { echo "error: the array is not 0-N; say into how many parts the list is cut: PARTS=N" >&2; exit 2; }
fi
parts=${PARTS:-$SLURM_ARRAY_TASK_COUNT}

# Since Slurm 22.05 srun has to be told the cores of a task again.
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
    $python "$checkout/data_prep/download.py" "$@" part="$SLURM_ARRAY_TASK_ID" parts="$parts"
status=$?

# 75: asked to stop, ahead of the time limit or at a preemption. Finished shards stay, the rest is done by the next start.
if [ $status = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
