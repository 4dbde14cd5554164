"""Names here of flags of Megatron, MindSpeed and trainers with `accelerate`.

A word of another system is looked up before any guess by its letters, which would name a flag that merely looks alike.
"""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = {
    "--tensor-model-parallel-size": "--tp --tp-size --tensor-parallel-size",
    "--pipeline-model-parallel-size": "--pp --pp-size --pipeline-parallel-size",
    "--virtual-pipeline-model-parallel-size": "--vp --vpp-size",
    "--context-parallel-size": "--cp --cp-size --sp-size --ulysses-degree --ring-degree",
    "--micro-batch-size": "--batch-size --train-batch-size",
    "--global-batch-size": "--gradient-accumulation-steps --grad-acc-step",
    "--train-iters": "--train-steps --max-train-steps --max-steps --num-train-steps",
    "--num-workers": "--dataloader-num-workers --dataset-num-workers",
    "--seed": "--random-seed --base-seed",
    "--deterministic-mode": "--use-deter-comp --npu-deterministic --deterministic --use-deterministic-algorithms",
    "--recompute-granularity": "--recompute-activations --gradient-checkpointing --use-gradient-checkpointing",
    "--recompute-num-layers": "--recompute-full-layers",
    "--bf16": "--mixed-precision --fp16 --params-dtype",
    "--lr": "--learning-rate",
    "--lr-decay-style": "--lr-scheduler --lr-scheduler-type",
    "--lr-warmup-iters": "--warmup --warmup-steps --lr-warmup-steps",
    "--weight-decay": "--adam-weight-decay",
    "--adam-eps": "--adam-epsilon",
    "--clip-grad": "--max-grad-norm",
    "--ema-decay": "--use-ema --ema",
    "--lora-r": "--lora-rank --network-dim",
    "--lora-alpha": "--network-alpha",
    "--load": "--pretrained-checkpoint --pretrained-model-name-or-path --ckpt-dir --transformer-path",
    "--load-base-model": "--base-model",
    "--save": "--output-dir --resume-from-checkpoint",
    "--save-path": "--save --output-dir --output --out",
    "--save-interval": "--checkpointing-steps --save-steps",
    "--keep-latest": "--checkpoints-total-limit --save-total-limit --keep-last-n",
    "--save-on-signal": "--exit-signal-handler",
    "--check-replica-hash-interval": "--check-weight-hash-across-dp-replicas-interval",
    "--on-nonfinite": "--check-for-nan-in-loss-and-grad --no-check-for-nan-in-loss-and-grad --rerun-mode",
    "--straggler-interval": "--log-straggler",
    "--layerzero": "--use-fsdp --use-deepspeed --zero-stage",
    "--num-inference-steps": "--steps --num-steps --sample-steps",
    "--guidance-scale": "--cfg-scale --sample-guide-scale --cfg",
    "--flow-shift": "--shift --sample-shift --sigma-shift",
    "--input-size": "--num-frames --frame-num --video-length --size --height --width",
    "--image": "--image-path --input-image",
    "--video": "--video-path --input-video",
    "--prompt": "--prompt-path --prompt-file",
    "--lora": "--lora-path",
    "--lora-strength": "--lora-scale --lora-weight",
    "--overwrite": "--force",
}


def name_here(word: str, known: Mapping[str, object]) -> str | None:
    """The flag among `known` that does here what `word` does elsewhere, or None."""
    plain = word.replace("_", "-")
    if plain in known:
        return plain
    return next((name for name, words in _NAMES.items() if name in known and plain in words.split()), None)
