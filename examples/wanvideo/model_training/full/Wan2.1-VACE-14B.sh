#!/bin/bash
# Wan2.1-VACE-14B: its side blocks. Further arguments win over these; ACCELERATE_ARGS has accelerate's.
set -e
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
accelerate launch --config_file "$here/accelerate_config_14B.yaml" ${ACCELERATE_ARGS:-} "$here/../train.py" \
  --dataset_base_path data/example_video_dataset \
  --dataset_metadata_path data/example_video_dataset/metadata_vace.csv \
  --data_file_keys "image,video,vace_video,vace_reference_image" \
  --height 480 \
  --width 832 \
  --num_frames 17 \
  --dataset_repeat 100 \
  --model_id_with_origin_paths "Wan-AI/Wan2.1-VACE-14B:diffusion_pytorch_model*.safetensors,Wan-AI/Wan2.1-VACE-14B:models_t5_umt5-xxl-enc-bf16.pth,Wan-AI/Wan2.1-VACE-14B:Wan2.1_VAE.pth" \
  --learning_rate 1e-5 \
  --num_epochs 2 \
  --remove_prefix_in_ckpt "pipe.vace." \
  --output_path "./models/train/Wan2.1-VACE-14B_full" \
  --trainable_models "vace" \
  --extra_inputs "vace_video,vace_reference_image" \
  "$@"
