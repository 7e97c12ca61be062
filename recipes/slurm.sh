#!/bin/bash
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --requeue --open-mode=append --signal=TERM@630
# sbatch recipes/slurm.sh   (4 machines of 8 GPUs; docs/scale.md)
run=runs/dpo
more=""
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# at TERM torchrun gives the run ten minutes to finish its step and save; a job that starts again goes on from its newest checkpoint
[ -e "$run/config.toml" ] && more="resume=true"
# torchrun counts restarts on the machine alone where a process died
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun torchrun --shutdown-timeout=600 --nnodes="$SLURM_NNODES" --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:29500" \
  -m favor.cli train recipe.toml "run=$run" ranks.shard=hybrid $more
