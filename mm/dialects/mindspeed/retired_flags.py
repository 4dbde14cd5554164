"""Flags of Megatron and MindSpeed-MM that training does not have, with what to do instead."""

from __future__ import annotations

_FROM_MODEL_JSON = "Remove it; the model's shape comes from pretrain_model.json."
_OVERRIDE = "Remove it and give --resume-changed schedule, which goes on with the schedule of the flags."
_USE_CHECKPOINT = (
    "Remove it and give the checkpoint's schedule; where the flags differ from it, a resume says its values."
)
RETIRED_TRAIN_FLAGS = {
    "--override-opt_param-scheduler": _OVERRIDE,
    "--override-opt-param-scheduler": _OVERRIDE,
    "--use-checkpoint-opt_param-scheduler": _USE_CHECKPOINT,
    "--use-checkpoint-opt-param-scheduler": _USE_CHECKPOINT,
    "--num-layers": _FROM_MODEL_JSON,
    "--hidden-size": _FROM_MODEL_JSON,
    "--num-attention-heads": _FROM_MODEL_JSON,
    "--seq-length": "Remove it; token counts come from the features.",
    "--max-position-embeddings": "Remove it; token counts come from the features.",
    "--tokenizer-type": "Remove it; captions are embedded during feature extraction.",
    "--vocab-size": "Remove it; captions are embedded during feature extraction.",
    "--position-embedding-type": _FROM_MODEL_JSON,
    "--rotary-base": _FROM_MODEL_JSON,
    "--normalization": _FROM_MODEL_JSON,
    "--attention-mask-type": "Remove it; attention in Wan is never causal.",
    "--distributed-backend": "Remove it; the device chooses its backend (gloo, nccl, hccl).",
    "--mm-tool": "Remove it; tools.json belongs to feature extraction.",
    "--eval-iters": "Remove it; --eval-interval uses all samples of --eval-data.",
    "--num-layers-per-virtual-pipeline-stage": "Remove it; give --virtual-pipeline-model-parallel-size, and "
    "predictor.pipeline_num_layers in pretrain_model.json for stages of different sizes.",
    "--context-parallel-kv-cache-policy": "Remove it; what a ring keeps for its backward pass is no choice here.",
    "--lora-register-forward-hook": "Remove it; gradients reach every adapter without a hook.",
    "--optimizer-selection": "Remove it; --optimizer names the algorithm, which runs by the device's fastest kernel. "
    "What fused_ema_adamw adds is --ema-decay alone.",
    "--use-torch-fsdp2": "Remove it; give --layerzero and --layerzero-config, which shard through FSDP2.",
    "--use-data-balance": "Remove it; the order of samples is drawn from --seed alone.",
    "--fsdp2-config-path": "Remove it; give --layerzero and --layerzero-config, which shard through FSDP2.",
}
