#!/bin/bash
# Wan2.1-1.3b-speedcontrol-v1: its motion controller. Further arguments win over these; ACCELERATE_ARGS has accelerate's.
set -e
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
accelerate launch ${ACCELERATE_ARGS:-} "$here/../train.py" \
  --dataset_base_path data/example_video_dataset \
  --dataset_metadata_path data/example_video_dataset/metadata_motion_bucket_id.csv \
  --height 480 \
  --width 832 \
  --num_frames 81 \
  --dataset_repeat 100 \
  --model_id_with_origin_paths "Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*.safetensors,Wan-AI/Wan2.1-T2V-1.3B:models_t5_umt5-xxl-enc-bf16.pth,Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth,DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1:model.safetensors" \
  --learning_rate 1e-5 \
  --num_epochs 2 \
  --remove_prefix_in_ckpt "pipe.motion_controller." \
  --output_path "./models/train/Wan2.1-1.3b-speedcontrol-v1_full" \
  --trainable_models "motion_controller" \
  --extra_inputs "motion_bucket_id" \
  "$@"
