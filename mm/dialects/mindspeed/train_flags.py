"""Flags of the training command: Megatron's and MindSpeed-MM's names for everything that exists here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from mm.config.optimizer import OptimizerName
from mm.config.run.checkpoint import ResumeChange
from mm.config.run.data import MinBucket
from mm.config.trainable import TrainableWord
from mm.dialects.mindspeed.expert_flags import ExpertFlags
from mm.dialects.mindspeed.flag_paths import NOT, sets


class TrainFlags(ExpertFlags):
    """Train a Wan2.1 transformer on extracted features."""

    groups: ClassVar[Mapping[str, str]] = {
        "mm_data": "files",
        "pipeline_model_parallel_size": "parallelism",
        "micro_batch_size": "steps and samples",
        "deterministic_mode": "device and precision",
        "recompute_granularity": "memory",
        "compile_blocks": "device and precision",
        "lr": "optimizer",
        "on_nonfinite": "supervision",
        "clip_grad": "optimizer",
        "lora_r": "LoRA",
        "trainable_modules": "trained parts",
        "use_distributed_optimizer": "parallelism",
        "load": "checkpoints",
        "load_base_model": "LoRA",
        "save": "checkpoints",
        "eval_interval": "evaluation",
        "hang_timeout": "supervision",
        "log_interval": "logging",
    }

    mm_data: str = Field(description="feature_data.json: which features, caption dropout")
    mm_model: str = Field(description="pretrain_model.json: the transformer, the noise schedule, the loss")

    pipeline_model_parallel_size: int = sets("parallel.pipeline_size", 1, ge=1, description="pipeline-parallel degree")
    virtual_pipeline_model_parallel_size: int | None = sets(
        "parallel.virtual_size", None, ge=1, description="model chunks per pipeline rank", absent=1
    )
    variable_seq_lengths: bool = sets(
        "parallel.variable_sizes",
        False,
        description="samples of different sizes in a pipeline; messages get the size of a step's largest",
    )
    optimization_level: int | None = Field(
        None, ge=2, le=2, description="MindSpeed's level of patches; 2 is how it always works here"
    )
    use_multiparameter_pipeline_model_parallel: bool = Field(
        False, description="several tensors across a pipeline boundary; how it always works here"
    )

    micro_batch_size: int = sets("data.micro_batch_size", 1, ge=1, description="samples in one forward of one replica")
    pack: int | None = sets(
        "data.pack_tokens",
        None,
        ge=1,
        description="put samples of any shapes into sequences of at most so many tokens, a micro-batch each",
    )
    global_batch_size: int | None = sets(
        "data.global_batch_size", None, ge=1, description="samples in one step; default: MBS x replicas"
    )
    train_iters: int = sets(
        "training.steps", ge=1, description="steps of the whole training, those before a resume included"
    )
    num_workers: int = sets("data.workers", 2, ge=0, description="feature-reading processes for each rank")
    read_timeout: float = sets(
        "data.read_timeout", 600.0, gt=0, description="seconds to read a micro-batch; a reader that hangs is ended"
    )
    on_bad_sample: str = sets(
        "data.on_bad_sample",
        "fail",
        description="a damaged feature file: fail, or skip:max=0.1% of the samples, each replaced by the next",
    )
    pair_cost: float | None = sets(
        "data.pair_cost",
        None,
        ge=0,
        allow_inf_nan=False,
        description="cost of a pair of tokens by that of a token, for the balance of replicas; default: by the model's "
        "operations; mm doctor costs measures it",
    )
    min_bucket: MinBucket = sets(
        "data.min_bucket",
        "error",
        description="samples of a shape of which a store has fewer than a micro-batch takes: drop them, or repeat some",
    )
    live: list[str] = sets(
        "live.extractions",
        [],
        description="make the features while training, as these files of extractions say (mm run's), and keep them in "
        "their stores, which --mm-data names",
    )
    live_budget: str | None = sets(
        "live.budget", None, description="the most that kept features may take on the disk: 20GB; default: no limit"
    )
    seed: int = sets(
        "training.seed", 1234, ge=0, description="seed of noise, timesteps, sample order and caption dropout"
    )
    deterministic_mode: bool = sets(
        "training.deterministic", False, description="refuse kernels whose result depends on timing"
    )

    recompute_granularity: Literal["full", "selective"] | None = sets(
        "memory.recompute",
        None,
        description="full: compute blocks again in backward instead of keeping what they made; "
        "selective: all blocks, except for self attention, whose output is kept",
    )
    recompute_method: Literal["uniform", "block"] | None = sets(
        "memory.method",
        None,
        description="uniform: all blocks, in groups; block: the first blocks of every stage, one by one",
    )
    recompute_num_layers: int | None = sets(
        "memory.blocks",
        None,
        ge=0,
        description="blocks of a group (uniform; default 1), or blocks to recompute (block; default all)",
    )
    recompute_skip_core_attention: bool = sets(
        "memory.keep_attention",
        False,
        description="uniform: recompute everything except self attention; block: so for the blocks after the first N",
    )
    recompute_num_layers_skip_core_attention: int | None = sets(
        "memory.keep_attention_blocks",
        None,
        ge=1,
        description="block: how many blocks after the first N keep their attention; default: all the others",
    )
    recompute_keep: Literal["O", "q,k,v,O"] | None = sets(
        "memory.keep", None, description="what is kept of self attention: its output (the default), or its inputs too"
    )

    compile_blocks: bool = sets(
        "memory.compile_blocks",
        False,
        description="compile each block with torch.compile; eager, with a warning, where that does not work",
    )
    bf16: bool = sets(
        "model.precision",
        False,
        description="bf16 parameters and activations with fp32 master weights; else fp32",
        values={"bf16": True, "fp32": False},
    )
    lr: float = sets("optimizer.lr", gt=0, description="peak learning rate")
    min_lr: float = sets("optimizer.min_lr", 0.0, ge=0, description="learning rate at the end of the decay")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = sets(
        "optimizer.decay", "constant", description="shape of the decay"
    )
    lr_decay_iters: int | None = sets(
        "optimizer.decay_steps", None, ge=1, description="steps until min-lr; default: train-iters"
    )
    lr_warmup_iters: int = sets("optimizer.warmup_steps", 0, ge=0, description="steps of linear warm-up")
    lr_warmup_init: float = sets(
        "optimizer.warmup_init", 0.0, ge=0, description="learning rate at the start of the warm-up"
    )
    weight_decay: float = sets(
        "optimizer.weight_decay", 0.01, ge=0, description="decoupled weight decay; none on biases and norms"
    )
    optimizer: OptimizerName = sets(
        "optimizer.name", "adamw", description="adamw, or lion, whose rate is usually a tenth to a third"
    )
    adam_beta1: float | None = sets(
        "optimizer.beta1", None, ge=0, lt=1, description="first decay of averages; default: 0.9"
    )
    adam_beta2: float | None = sets(
        "optimizer.beta2", None, ge=0, lt=1, description="second decay of averages; default: 0.999, for lion 0.99"
    )
    adam_eps: float | None = sets("optimizer.eps", None, gt=0, description="AdamW's epsilon; default: 1e-8")
    on_nonfinite: str = sets(
        "optimizer.on_nonfinite",
        "stop",
        pattern=r"^(stop|skip:[1-9][0-9]*)$",
        description="a loss or gradient that is not finite: stop, or skip:K, which leaves out up to K updates in a row",
    )
    check_replica_hash_interval: int | None = sets(
        "supervision.replica_hash_interval",
        None,
        ge=1,
        description="steps between comparisons of the weights that replicas hold, bit for bit",
    )
    clip_grad: float = sets(
        "optimizer.clip_norm", 1.0, ge=0, description="largest global gradient norm; 0 turns clipping off"
    )
    initial_clip_ratio: float | None = sets(
        "optimizer.initial_clip_ratio",
        None,
        gt=0,
        description="the first step's limit of the gradient norm by clip-grad; it goes to clip-grad in the steps of "
        "abnormal-clip-start; default: 1",
    )
    abnormal_clip_start: int | None = sets(
        "optimizer.abnormal_clip_start",
        None,
        ge=0,
        description="steps after which a norm of more than 5 times clip-grad is clipped to less than it, by as much as "
        "it is above, at most a tenth",
    )
    ema_decay: float | None = sets(
        "optimizer.ema_decay",
        None,
        gt=0,
        lt=1,
        description="average the weights: after each step average = D average + (1-D) weights",
    )
    lora_r: int | None = sets(
        "adapters.rank", None, description="LoRA: train adapters of this width alone; the base model is frozen"
    )
    lora_alpha: float | None = sets("adapters.alpha", None, description="LoRA: alpha, which over r scales an update")
    lora_target_modules: list[str] = sets(
        "adapters.targets",
        [],
        description="LoRA: the linears that get adapters, by the end of their names: q k v o ffn.0 ffn.2",
    )
    lora_skip_modules: list[str] = sets(
        "adapters.skip",
        [],
        description="LoRA: of these linears those that get none, by words anywhere in their names: cross_attn",
    )
    lora_dropout: float | None = Field(None, description="LoRA: 0 is the only value there is")
    lora_base_dtype: Literal["int8", "fp8"] | None = sets(
        "adapters.base_dtype",
        None,
        description="LoRA: keep the frozen weights of the blocks' linears in 8 bits; default: the run's precision",
    )
    trainable_modules: list[TrainableWord] | None = sets(
        "training.trainable",
        None,
        description="train only parameters with one of these in their names, such as self_attn ^blocks.0. head; "
        "ffn:0.5 trains at half the learning rate; with LoRA: beside the adapters. Default: all, with LoRA none",
    )
    use_distributed_optimizer: bool = sets(
        "parallel.distributed_optimizer", False, description="shard master weights and the optimizer over the replicas"
    )
    overlap_grad_reduce: bool = sets(
        "parallel.overlap_grad_reduce", False, description="reduce gradients during backward"
    )
    overlap_param_gather: bool = sets(
        "parallel.overlap_param_gather", False, description="gather parameters during forward"
    )

    load: str | None = sets(
        "checkpoint.load",
        None,
        description="weights to start from (HF, native or MM folder), or a folder of training checkpoints; with LoRA "
        "adapters: a file of PEFT, ComfyUI, kohya or DiffSynth, or checkpoints of a LoRA run",
    )
    load_base_model: str | None = sets(
        "adapters.base", None, description="LoRA: the frozen base model, in any format that --load takes without LoRA"
    )
    save: str | None = sets(
        "checkpoint.save", None, description="folder for checkpoints and metrics; a run found there is resumed"
    )
    save_interval: int | None = sets(
        "checkpoint.save_interval", None, ge=1, description="steps between checkpoints; the last step always saves"
    )
    async_save: bool = sets(
        "checkpoint.in_background",
        False,
        description="write checkpoints in the background; steps wait for a host copy only",
    )
    on_save_failure: Literal["stop", "warn"] = sets(
        "checkpoint.on_save_failure",
        "stop",
        description="where the disk refuses a checkpoint that is not the last: stop, or say so and go on to the next",
    )
    save_on_signal: bool = sets(
        "checkpoint.save_on_signal",
        False,
        description="SIGTERM or SIGUSR1: save at the end of the step and leave with exit code 75",
    )
    keep_latest: int | None = sets(
        "checkpoint.keep_latest", None, ge=1, description="complete checkpoints to keep; default: all"
    )
    resume_policy: Literal["newest", "strict"] = sets(
        "checkpoint.resume_policy",
        "newest",
        description="a damaged newest checkpoint: fall back to the one before, or stop",
    )
    resume_changed: list[ResumeChange] = sets(
        "checkpoint.resume_changed",
        [],
        description="what may be another than the checkpoint's that is gone on from: batch schedule optimizer "
        "objective data precision average; everything else that would change steps is refused",
    )
    verify_checkpoint: Literal["size", "full"] = sets(
        "checkpoint.verify",
        "size",
        description="before a checkpoint is used: compare its files' sizes, or also hash their contents",
    )
    no_save_optim: bool = sets(
        "checkpoint.save_optimizer",
        False,
        description="leave the optimizer out of checkpoints; such a run cannot resume",
        values=NOT,
    )
    no_load_optim: bool = sets("checkpoint.load_optimizer", False, description="start the optimizer anew", values=NOT)
    no_load_ema: bool = sets(
        "checkpoint.load_average",
        False,
        description="begin the average anew, or go on without the saved one",
        values=NOT,
    )
    no_load_rng: bool = sets(
        "checkpoint.same_seed",
        False,
        description="use this --seed although the checkpoint was made with another",
        values=NOT,
    )
    finetune: bool = sets(
        "checkpoint.weights_only", False, description="take only the weights of --load; start at step 0"
    )
    init_from_scratch: bool = sets(
        "checkpoint.from_scratch", False, description="start from random weights on purpose, without --load"
    )
    ckpt_format: Literal["torch_dist", "torch"] = sets(
        "checkpoint.format",
        "torch_dist",
        description="torch_dist: the layout-free sharded format; torch: MindSpeed-MM's files, of weights alone",
    )

    eval_interval: int | None = sets(
        "evaluation.interval", None, ge=1, description="steps between losses on the features of --eval-data"
    )
    eval_data: str | None = Field(None, description="feature_data.json of held-out features")
    validation_interval: int | None = sets(
        "validation.interval", None, ge=1, description="steps between renderings with the model as it is"
    )
    validation_prompts: str | None = sets(
        "validation.prompts", None, description="text file, one prompt a line, of what is rendered"
    )
    validation_images: str | None = sets(
        "validation.images", None, description="text file, one image a line, or first and last, for them"
    )
    validation_config: str | None = sets(
        "validation.config", None, description="inference_model.json or run.yaml: encoders, size, sampler for them"
    )

    hang_timeout: float | None = sets(
        "supervision.hang_timeout",
        None,
        gt=0,
        description="seconds without progress until the run names the suspect rank and ends; default: 120 or "
        "ten steps, more while it starts and saves",
    )
    straggler_interval: int | None = sets(
        "supervision.straggler_interval",
        None,
        ge=1,
        description="steps between comparisons of the ranks' own time, which name a slow one",
    )
    log_interval: int = sets(
        "logging.interval", 1, ge=1, description="steps between console lines; metrics.jsonl has every step"
    )
    log_norms_interval: int | None = sets(
        "logging.norms_interval", None, ge=1, description="steps between norms of each parameter and its gradient"
    )
    tensorboard_dir: str | None = sets(
        "logging.tensorboard", None, description="TensorBoard folder; default: SAVE/tensorboard"
    )
    no_progress_bar: bool = sets("logging.progress_bar", False, description="console lines only", values=NOT)

    @property
    def lora(self) -> bool:
        """True where adapters are trained, by any of LoRA's flags; the rules ask for the others."""
        given = (self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_base_dtype)
        return bool(self.lora_target_modules or self.lora_skip_modules) or any(value is not None for value in given)
