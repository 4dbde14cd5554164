"""MindSpeed-MM's own files of today, written from what is known of their fields and values."""

from typing import Any

SHAPES = {
    "1.3b": {"hidden_size": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "stages": [7, 8, 8, 7]},
    "14b": {"hidden_size": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "stages": [10, 10, 10, 10]},
}
SAMPLER = {
    "dataloader_mode": "sampler", "sampler_type": "LengthGroupedSampler", "shuffle": True, "drop_last": True,
    "pin_memory": True, "group_data": True, "group_frame": False, "group_resolution": False,
    "initial_global_step_for_sampler": 0,
}  # fmt: skip
CLIP = {
    "video_reader_type": "DecordVideo", "image_reader_type": "Image", "num_frames": 81, "frame_interval": 1,
    "max_height": 480, "max_width": 832, "max_hxw": 399360, "train_fps": 24, "speed_factor": 1.0,
    "drop_short_ratio": 0.0, "min_num_frames": 1, "cfg": 0.0, "auto_interval": False, "hw_stride": 8,
    "force_resolution": False, "video_processor_type": "OpensoraplanVideoProcessor",
}  # fmt: skip
PIPELINE = {
    "video_and_first_frame": [
        {"trans_type": "ResizeVideo", "param": {
            "transform_size": {"max_height": 480, "max_width": 832}, "mode": "shortside",
            "interpolation_mode": "bilinear", "antialias": True,
        }},
        {"trans_type": "ToTensorVideo"},
    ],
    "video_only": [
        {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": {"max_height": 480, "max_width": 832}}},
        {"trans_type": "norm_fun", "param": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "inplace": True}},
    ],
}  # fmt: skip
OF_FRAMES = {
    "first_frame_clip": [
        {"trans_type": "Resize", "param": {"transform_size": [224, 224], "interpolation_mode": "bicubic",
                                           "antialias": False}},
        {"trans_type": "norm_fun", "param": {"mean": [0.48145466, 0.4578275, 0.40821073],
                                             "std": [0.26862954, 0.26130258, 0.27577711]}},
    ],
    "first_frame_vae": [
        {"trans_type": "ResizeVideo", "param": {"transform_size": {"max_height": 480, "max_width": 832}}},
        {"trans_type": "norm_fun", "param": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}},
    ],
}  # fmt: skip
DUMMIES = (
    "--num-layers 1 --hidden-size 3072 --num-attention-heads 48 --seq-length 24 --max-position-embeddings 24 "
    "--tokenizer-type NullTokenizer --vocab-size 0 --position-embedding-type rope --rotary-base 500000 --swiglu "
    "--no-masked-softmax-fusion --normalization RMSNorm --use-fused-rmsnorm "
)
"""What early versions' scripts give Megatron."""


def tokenizer(length: int) -> dict[str, Any]:
    return {
        "hub_backend": "hf", "autotokenizer_name": "AutoTokenizer", "from_pretrained": "w/tokenizer",
        "model_max_length": length,
    }  # fmt: skip


def extract_data(task: str = "t2v") -> dict[str, Any]:
    transforms = PIPELINE | (OF_FRAMES if task == "i2v" else {})
    shapes = {"min_hxw": 99840, "hw_aspect_thr": 5.0, "train_pipeline": transforms}
    param = {
        "dataset_type": "t2v",
        "basic_parameters": {"data_path": "data.txt", "data_storage_mode": "combine"},
        "preprocess_parameters": {**CLIP, **shapes},
        "use_text_processer": True,
        "enable_text_preprocessing": True,
        "text_preprocess_methods": {"method": "whitespace_clean"},
        "tokenizer_config": tokenizer(512),
    }
    return {"dataset_param": param, "dataloader_param": {**SAMPLER, "shuffle": False}}


def feature_data(task: str) -> dict[str, Any]:
    param = {
        "dataset_type": "feature",
        "basic_parameters": {"data_path": "f/data.jsonl", "data_folder": "f"},
        "preprocess_parameters": {**CLIP, "hw_aspect_thr": 2.0, "train_pipeline": PIPELINE},
        "use_text_processer": True,
        "enable_text_preprocessing": True,
        "text_preprocess_methods": {"method": "whitespace_clean"},
        "tokenizer_config": tokenizer(256 if task == "t2v" else 512),
    }
    return {"dataset_param": param, "dataloader_param": SAMPLER}


def predictor(size: str, task: str) -> dict[str, Any]:
    shape = dict(SHAPES[size])
    stages = shape.pop("stages")
    images = (
        {"clip_token_len": 257}
        if task != "t2v"
        else {"FPDT": False, "FPDT_chunk_number": 4, "FPDT_with_offload": False}
    )
    return {
        "model_id": "wandit", "dtype": "bf16", "model_type": task, "patch_size": [1, 2, 2], "text_len": 512,
        "text_dim": 4096, "in_dim": 16 if task == "t2v" else 36, "out_dim": 16, **shape, "pipeline_num_layers": stages,
        "freq_dim": 256, "img_dim": 1280, "qk_norm": True, "qk_norm_type": "rmsnorm", "cross_attn_norm": True,
        "eps": 1e-6, "max_seq_len": 1024, "attention_async_offload": False, "use_fused_rmsnorm": True, **images,
    }  # fmt: skip


def pretrain_model(size: str, task: str) -> dict[str, Any]:
    return {
        "load_video_features": True, "load_text_features": True, "task": task, "predictor": predictor(size, task),
        "diffusion": {
            "model_id": "wan_flow_match_scheduler", "num_train_timesteps": 1000, "shift": 5, "sigma_min": 0.0,
            "extra_one_step": True,
        },
    }  # fmt: skip


def train_words(size: str, task: str, *, lora: bool = False) -> str:
    """The words of a script, for eight processes."""
    blocks = {("1.3b", "t2v"): 20, ("1.3b", "i2v"): 30}.get((size, task), 40)
    words = (
        "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --virtual-pipeline-model-parallel-size 1 "
        f"--context-parallel-size {2 if (size, task, lora) == ('14b', 'i2v', False) else 1} "
        "--context-parallel-algo ulysses_cp_algo --micro-batch-size 1 --global-batch-size 8 --num-workers 8 "
        "--lr-decay-style constant --lr-warmup-init 0 --lr-warmup-iters 0 --adam-beta1 0.9 --adam-beta2 0.999 "
        "--adam-eps 1e-8 --weight-decay 1e-2 --clip-grad 1.0 --train-iters 5000 --no-gradient-accumulation-fusion "
        f"--no-load-optim --no-load-rng --no-save-optim --no-save-rng --bf16 --recompute-granularity full "
        f"--recompute-method block --recompute-num-layers {min(blocks, SHAPES[size]['num_layers'])} "
        "--use-distributed-optimizer --distributed-backend nccl --mm-tool tools.json --log-interval 1 "
        "--save-interval 10000 --eval-interval 10000 --eval-iters 10 --save saved --ckpt-format torch "
    )
    if lora:
        return words + (
            "--lr 5e-6 --min-lr 5e-6 --lora-r 16 --lora-alpha 16 --lora-register-forward-hook patch_embedding "
            "--lora-target-modules ffn.2 ffn.0 proj_q proj_k proj_v proj_out --load base"
        )
    words += "--lr 1e-5 --min-lr 1e-5 --attention-mask-type general --overlap-grad-reduce --load weights "
    if size == "14b":
        return words + "--use-fused-rmsnorm --layerzero --layerzero-config zero.yaml"
    return words + "--overlap-param-gather" + (" --sequence-parallel" if task == "i2v" else "")


ZERO = """
zero3_size: 8
transformer_layers:
  - mindspeed_mm.models.predictor.dits.wan_dit.WanDiTBlock
backward_prefetch: 'BACKWARD_PRE'
param_dtype: "bf16"
reduce_dtype: "fp32"
forward_prefetch: True
limit_all_gathers: True
ignored_modules:
  - ae
  - text_encoder
"""


def extract_words(*, early: bool = False) -> str:
    """The words of feature_extraction.sh."""
    sizes = "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1 "
    words = sizes + "--micro-batch-size 1 --global-batch-size 8 --num-workers 8 --lr 1e-5 --min-lr 1e-5 --bf16 "
    return words + "--train-iters 5000 --distributed-backend nccl " + (DUMMIES if early else "")


def extract_model(task: str) -> dict[str, Any]:
    ae = {
        "model_id": "wan_video_vae", "from_pretrained": "w/vae", "dtype": "bf16", "enable_tiling": True,
        "tiling_param": {"tile_size": [34, 34], "tile_stride": [18, 16]}, "norm_latents": True,
        "norm_mode": "channel_specified_shift_scale", "do_sample": False,
    }  # fmt: skip
    if task == "i2v":
        ae["i2v_processor"] = {
            "processor_id": "wan_i2v_processor", "image_encoder": "w/image_encoder", "i2v_vae_encode_tiling": False,
        }  # fmt: skip
    text = {"model_id": "UMT5", "dtype": "bf16", "hub_backend": "hf", "from_pretrained": "w/text_encoder"}
    return {"task": task, "ae": ae, "text_encoder": [text]}


def extract_tools() -> dict[str, Any]:
    profile = {"enable": False, "profile_type": "static", "ranks": [0], "static_param": {"level": "level1"}}
    return {
        "profile": profile,
        "memory_profile": {"enable": False, "start_step": 0, "end_step": 2, "save_path": "./memory_snapshot"},
        "sorafeature": {"save_path": "./sora_features"},
    }


def inference(size: str, task: str) -> dict[str, Any]:
    """inference_model.json; `task` may be v2v too."""
    model = "t2v" if task == "v2v" else task
    values: dict[str, Any] = {
        "pipeline_class": "WanPipeline", "prompt": "prompts.txt", "save_path": "out", "fps": 16, "frame_interval": 1,
        "num_inference_videos_per_sample": 1, "use_prompt_preprocess": True, "seed": 42,
        "pipeline_config": {"input_size": [81, 480, 832], "cpu_offload": True},
        "ae": {"model_id": "wan_video_vae", "from_pretrained": "w/vae", "dtype": "float32"},
        "text_encoder": {"model_id": "UMT5", "hub_backend": "hf", "from_pretrained": "w/text_encoder", "dtype": "bf16"},
        "tokenizer": tokenizer(512),
        "predictor": {**predictor(size, model), "from_pretrained": None},
        "diffusion": {
            "model_id": "UniPCMultistepScheduler", "num_inference_steps": 50, "solver_order": 2, "solver_type": "bh2",
            "flow_shift": 3.0, "guidance_scale": 5.0, "predict_x0": True, "prediction_type": "flow_prediction",
            "use_flow_sigmas": True, "final_sigmas_type": "zero", "lower_order_final": True,
            "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
            "timestep_spacing": "linspace", "thresholding": False, "solver_p": None, "disable_corrector": [],
            "steps_offset": 0, "use_karras_sigmas": False,
        },
    }  # fmt: skip
    if task == "i2v":
        values["image"] = "images.txt"
        encoder = {"model_id": "CLIPVisionModel", "hub_backend": "hf", "from_pretrained": "w/e", "dtype": "bfloat16"}
        values["image_encoder"] = encoder
    if task == "v2v":
        values |= {"video": "videos.txt", "start_frame": 0, "strength": 0.7}
    return values
