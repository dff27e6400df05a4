#!/bin/bash
# Train on 1..N nodes, one rank per GPU:
#
#     sbatch --nodes=8 slurm/train.sh runs/paper_b16 --config configs/train/paper_b16.yaml data.root=s3://bucket/cc
#
# The first word is the run directory, the others are the training's. Options before the script's name override those
# below; without GPUs: --gpus-per-node=0 --ntasks-per-node=2. The same command resumes a run that has ended.
#SBATCH --job-name=pacl
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --output=pacl-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR2@180

# Here: module load ..., source .venv/bin/activate, export NCCL_SOCKET_IFNAME=...
python=${PYTHON:-python}
run=${1:?the first word is the run directory}
shift

export PYTHONUNBUFFERED=1
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

# One living job per run directory.
$python -m pacl_scale.job claim "$run" || exit

# The trainers end first, then this script looks at how they ended.
trap : TERM
# When a rank is gone the others say so and end; those that do not are ended after two minutes.
# Since Slurm 22.05 srun has to be told the cores of a task again.
# pacl_scale.nodes looks at the nodes, then trains; check.enabled=false leaves the looking out.
srun --wait=120 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} $python -m pacl_scale.nodes "$@" run="$run"
status=$?

# 2 is a mistake in the settings. All else (75: saved because of a signal; a lost rank or node; a crash) is tried again,
# a few times in a row at most if no newer checkpoint comes of it.
if [ $status != 0 ] && [ $status != 2 ]; then
    $python -m pacl_scale.job requeue "$run" || status=$?
fi
exit $status
