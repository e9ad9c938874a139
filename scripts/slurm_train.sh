#!/bin/bash
# Mask R-CNN on COCO on several hosts of 8 GPUs, for SLURM:  sbatch --nodes=2 scripts/slurm_train.sh /data/coco runs/coco
#
# One torchrun per host starts one process per GPU. The batch is the global one; rate and iterations follow from it.
# SLURM's SIGTERM, at the end of the time or when the job is preempted, ends the iteration, saves and leaves; the job is
# queued again and goes on. A process that dies ends the others, and torchrun starts all of them again from the last
# checkpoint, three times at most. Data and the run's folder must be the same on all hosts.
#SBATCH --job-name=mrcnn_edu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
DATA=$1
RUN=$2
GPUS=${GPUS:-8} # per host
BATCH=${BATCH:-$((2 * GPUS * SLURM_NNODES))} # 2 images per GPU, as the paper has
PRESET=${PRESET:-maskrcnn_resnet50_fpn}
BACKBONE=${BACKBONE:-resnet50.pth} # torchvision's ImageNet weights

START=("$DATA" --preset "$PRESET" --backbone "$BACKBONE" --batch "$BATCH")
if [ -f "$RUN/config.json" ]; then START=(--resume); fi

# torchrun's own store would outlive a restart with the addresses of the dead in it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HOST=${HOSTS%%$'\n'*} # not by head, whose early end is scontrol's failure

STOPPED='' STATUS=0
trap 'STOPPED=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$GPUS" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$HOST:29500" --rdzv-id="$SLURM_JOB_ID" \
    -m mrcnn_edu train "${START[@]}" --out "$RUN" &
STEP=$!
wait "$STEP" || STATUS=$?
if [ -n "$STOPPED" ]; then # the trap has interrupted the waiting
    wait "$STEP" || STATUS=$?
    if [ "$STATUS" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$STATUS"
