#!/bin/bash
# Evaluate a checkpoint on 1..N GPUs; the pictures of each data set are shared by all tasks:
#
#     sbatch --nodes=2 slurm/eval.sh --config configs/eval/official.yaml --checkpoint runs/paper_b16
#
# All words are those of `python -m pacl_scale.evaluate`. Options before the script's name override those below; without
# GPUs: --gpus-per-task=0 --ntasks-per-node=2. Rows go to the run's evals/ and are written by the task that ends last. Many
# checkpoints, data sets or protocols: python -m pacl_scale.sweep.
#SBATCH --job-name=pacl-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --output=pacl-eval-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue

# Here: module load ..., source .venv/bin/activate
export PYTHON=${PYTHON:-python}
export PYTHONUNBUFFERED=1

# Every task counts its own part. Pictures that were counted before a requeue are not counted again.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
    bash -c 'exec $PYTHON -m pacl_scale.evaluate "$@" part=$SLURM_PROCID parts=$SLURM_NTASKS' evaluate "$@"
