"""Keys and flags of generation in MindSpeed-MM that mean nothing here, each with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping

_FIXED_SAMPLER_KEYS = [
    "diffusion.num_train_steps",
    "diffusion.num_train_timesteps",
    "diffusion.sigma_min",
    "diffusion.extra_one_step",
    "diffusion.final_sigmas_type",
    "diffusion.lower_order_final",
    "diffusion.predict_x0",
    "diffusion.prediction_type",
    "diffusion.use_flow_sigmas",
    "diffusion.disable_corrector",
    "diffusion.solver_p",
    "diffusion.steps_offset",
    "diffusion.timestep_spacing",
    "diffusion.thresholding",
    "diffusion.dynamic_thresholding_ratio",
    "diffusion.sample_max_value",
    "diffusion.use_beta_sigmas",
    "diffusion.use_exponential_sigmas",
    "diffusion.use_karras_sigmas",
]
_BETA_KEYS = [
    "diffusion.beta_start",
    "diffusion.beta_end",
    "diffusion.beta_schedule",
    "diffusion.trained_betas",
    "diffusion.rescale_betas_zero_snr",
]
RETIRED_INFERENCE_KEYS: Mapping[str, str] = {
    "dtype": "Remove it; each part has its own: ae.dtype, text_encoder.dtype, predictor.dtype.",
    "device": "Remove it; the best device is chosen, or give --device.",
    "micro_batch_size": "Remove it and give --micro-batch-size.",
    "frame_interval": "Remove it; clips are made of consecutive frames. For another speed change fps.",
    "use_prompt_preprocess": "Remove it; prompts are always cleaned as for training (HTML escapes, white space).",
    "num_inference_videos_per_sample": "Remove it; repeat the prompt's line, each line has its own noise.",
    "pipeline_config.cpu_offload": "Remove it; the text encoder leaves the device before the transformer is loaded.",
    "predictor.qk_norm_type": "Remove it; queries and keys always have an RMSNorm over all heads.",
    "predictor.max_seq_len": "Remove it; the rotary tables are made to measure.",
    "predictor.use_fused_rmsnorm": "Remove it; the device chooses its fastest kernel.",
    "predictor.fa_layout": "Remove it; the device chooses its fastest kernel.",
    "predictor.attention_async_offload": "Remove it; it concerns training.",
    "predictor.pipeline_num_layers": "Remove it; generation has no pipeline. Use tensor parallelism or layer-zero.",
    "dual_image": "Put it into pipeline_config.",
    "strength": "Put it into pipeline_config.",
    "start_frame": "Put it into pipeline_config.",
    "num_frames": "Remove it; pipeline_config.input_size says how many frames.",
    "fp32_calculate": "Remove it; what must be fp32 always is. For all of it in fp32 set predictor.dtype.",
    "pipeline_config.num_frames": "Remove it; input_size says how many frames.",
    "diffusion.num_inference_timesteps": "Call it num_inference_steps.",
    "diffusion.shift": "Call it flow_shift.",
    **dict.fromkeys(_FIXED_SAMPLER_KEYS, "Remove it; flow matching is always sampled this way here."),
    **dict.fromkeys(_BETA_KEYS, "Remove it; it belongs to diffusion with a beta schedule, not to flow matching."),
}

_TRAINING_FLAGS = [
    "--lr",
    "--min-lr",
    "--train-iters",
    "--weight-decay",
    "--optimizer",
    "--clip-grad",
    "--adam-beta1",
    "--adam-beta2",
    "--no-load-optim",
    "--no-load-rng",
    "--no-save-optim",
    "--no-save-rng",
    "--no-gradient-accumulation-fusion",
]
RETIRED_GENERATE_FLAGS: Mapping[str, str] = {
    "--pipeline-model-parallel-size": "Remove it; use --tensor-model-parallel-size or --layerzero to fit a model.",
    "--global-batch-size": "Remove it; --micro-batch-size says how many prompts run together.",
    "--bf16": "Remove it; the precision is predictor.dtype in inference_model.json.",
    "--attention-mask-type": "Remove it; attention in Wan is never causal.",
    "--distributed-backend": "Remove it; the device chooses its backend (gloo, nccl, hccl).",
    **dict.fromkeys(_TRAINING_FLAGS, "Remove it; it concerns training."),
}
