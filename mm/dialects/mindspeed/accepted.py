"""Words accepted from MindSpeed-MM's own files: values that mean what is done here anyway, and other names.

A key is taken out where its value changes nothing, another spelling is replaced, and both are noted, so that a log says
once what became of them. A value that would change something stays, and is refused where the file is checked.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mm.config.model import task_named_in

Kind = Literal[
    "data.json", "feature_data.json", "pretrain_model.json", "model_wan.json", "tools.json", "inference_model.json"
]
Accepts = Callable[[Any, Any], bool]
"""(value, whole file) -> whether it means what is done here anyway."""


@dataclass(frozen=True)
class Note:
    """Note of what became of one key.

    Attributes:
        key: dotted. value: as the file had it. why: `read as fp32`, or why it changes nothing.
    """

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{' '.join(filter(None, (self.key, _short(self.value))))} ({self.why})"


def settle(values: Any, kind: Kind) -> tuple[Any, list[Note]]:
    """A file's values without what changes nothing, and with the names used here.

    Args:
        values: parsed JSON, which stays as it is. kind: of file.
    """
    result = copy.deepcopy(values)
    if not isinstance(values, dict):
        return result, []
    notes = [*_unwrapped(result), *_renamed(result, _MOVED.get(kind, {})), *_respelled(result, kind)]
    return result, [*notes, *_taken(result, _ACCEPTED[kind], values)]


def said(file: str, notes: Sequence[Note]) -> str:
    """One line for the log."""
    return f"{file}: taken as it is done here: {', '.join(map(str, notes))}"


def _unwrapped(values: dict[str, Any], path: str = "") -> Iterator[Note]:
    """A list of one section is the section."""
    for name, value in values.items():
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and name not in _LISTS:
            values[name] = value = value[0]
            yield Note(path + name, "[...]", "a list of one")
        if isinstance(value, dict):
            yield from _unwrapped(value, f"{path}{name}.")


def _renamed(values: dict[str, Any], moved: Mapping[str, str]) -> Iterator[Note]:
    for old, new in moved.items():
        place, name = _place(values, old)
        target, new_name = _place(values, new)
        if place is not None and name in place and target is not None and new_name not in target:
            value = target[new_name] = place.pop(name)
            yield Note(old, value, f"read as {new}")


def _respelled(values: dict[str, Any], kind: Kind) -> Iterator[Note]:
    for dotted, spellings in _SPELLINGS.get(kind, {}).items():
        place, name = _place(values, dotted)
        value = place.get(name) if place is not None else None
        if place is not None and isinstance(value, str) and value in spellings:
            place[name] = spellings[value]
            yield Note(dotted, value, f"read as {spellings[value]}")


def _taken(values: dict[str, Any], accepted: Mapping[str, tuple[Accepts, str]], whole: Any) -> Iterator[Note]:
    for dotted, (accepts, why) in accepted.items():
        place, name = _place(values, dotted)
        if place is not None and name in place and accepts(place[name], whole):
            yield Note(dotted, place.pop(name), why)


def _place(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any] | None, str]:
    *parents, name = dotted.split(".")
    place: Any = values
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    return (place if isinstance(place, dict) else None), name


def value_at(values: Any, dotted: str) -> Any:
    """The value of a key, or None where there is none."""
    for name in dotted.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _any(value: Any, whole: Any) -> bool:
    del value, whole
    return True


def _is(*allowed: Any) -> Accepts:
    """One of these; 0 is not False, and 1 is 1.0."""

    def accepts(value: Any, whole: Any) -> bool:
        del whole
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)

    return accepts


def _is_the_area(value: Any, whole: Any) -> bool:
    clip = _at(whole, "dataset_param.preprocess_parameters")
    return bool(value == clip.get("max_height", 0) * clip.get("max_width", 0))


def _is_cleaning(value: Any, whole: Any) -> bool:
    del whole
    return isinstance(value, dict) and value.get("method") in ("whitespace_clean", ["whitespace_clean"])


def _without_interval(value: Any, whole: Any) -> bool:
    """A rate that nothing reads: frames are taken by their interval unless it is automatic."""
    del value
    return _at(whole, "dataset_param.preprocess_parameters").get("auto_interval", False) is False


def _in_a_feature_file(value: Any, whole: Any) -> bool:
    """Accept with `dataset_type` feature, which is MindSpeed-MM's own name: nothing reads a tokenizer there either."""
    del value
    return _at(whole, "dataset_param").get("dataset_type") == "feature"


def _unchunked(value: Any, whole: Any) -> bool:
    del value
    return not _at(whole, "predictor").get("FPDT")


def _is_the_models(value: Any, whole: Any) -> bool:
    model = _at(whole, "predictor").get("dtype")
    return bool(_DTYPES.get(str(value), value) == _DTYPES.get(str(model), model))


def _not_of_the_task(size: str) -> Accepts:
    """A size of other tasks' models, which this one has no use for."""

    def accepts(value: Any, whole: Any) -> bool:
        del value
        task = task_named_in(_at(whole, "predictor"))
        return task is not None and size not in task.sizes

    return accepts


def _is_the_one_way(value: Any, whole: Any) -> bool:
    """Transforms that make of a clip what is made of it here, or whose work is done here for frames that are given."""
    clip = _at(whole, "dataset_param.preprocess_parameters")
    sizes = {clip.get("max_height"), clip.get("max_width"), _OF_CLIP}
    return isinstance(value, dict) and all(
        stage in _TRANSFORMS
        and isinstance(steps, list)
        and all(_is_known(step, _TRANSFORMS[stage], sizes) for step in steps)
        for stage, steps in value.items()
    )


def _is_known(step: Any, known: frozenset[str], sizes: set[Any]) -> bool:
    if not isinstance(step, dict) or not step.keys() <= {"trans_type", "param"}:
        return False
    plain = str(step.get("trans_type")).lower().replace("_", "")
    return plain in known and all(_is_shipped(leaf, sizes) for leaf in _leaves(step.get("param", {})))


def _is_shipped(leaf: Any, sizes: set[Any]) -> bool:
    """A value of a transform as MindSpeed-MM ships it: sizes of the clip, scales, ways to interpolate, switches."""
    if isinstance(leaf, bool) or leaf is None:
        return True
    return leaf in sizes or leaf in _SCALES or (isinstance(leaf, str) and leaf.lower().replace("_", "") in _MODES)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _at(values: Any, dotted: str) -> dict[str, Any]:
    found = value_at(values, dotted)
    return found if isinstance(found, dict) else {}


_OF_CLIP = 224  # pixels that CLIP sees
_SCALES = {0.5, 0.48145466, 0.4578275, 0.40821073, 0.26862954, 0.26130258, 0.27577711}  # to [-1, 1], and CLIP's own
_MODES = {"bilinear", "bicubic", "shortside", "auto"}
_RESIZED = frozenset(
    {"resizevideo", "resize", "totensorvideo", "totensor", "normalize", "normalise", "normfun", "aenorm"}
)
_TRANSFORMS: Mapping[str, frozenset[str]] = {
    "video_and_first_frame": frozenset({"resizevideo", "totensorvideo"}),
    "video_only": frozenset({"centercropresizevideo", "totensorvideo", "normalize", "normalise", "normfun", "aenorm"}),
    "first_frame": _RESIZED,
    "first_frame_clip": _RESIZED,
    "first_frame_vae": _RESIZED,
}
"""Transforms of each stage of `train_pipeline`, without case and underscores."""
_LISTS = {"lora", "shares"}  # of sections, in which a list of one is a list
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "torch.float32": "fp32", "torch.bfloat16": "bf16"}
_READERS = {"DecordVideo": "decord", "decoder": "auto", "TorchvisionVideo": "auto", "AvVideo": "pyav"}
_P = "dataset_param.preprocess_parameters."
_SPELLINGS: Mapping[Kind, Mapping[str, Mapping[str, str]]] = {
    "data.json": {_P + "video_reader_type": _READERS},
    "feature_data.json": {"dataset_param.dataset_type": {"feature": "t2v"}},
    "pretrain_model.json": {"predictor.dtype": _DTYPES},
    "model_wan.json": {"ae.dtype": _DTYPES, "text_encoder.dtype": _DTYPES},
    "inference_model.json": {f"{part}.dtype": _DTYPES for part in ("ae", "text_encoder", "image_encoder", "predictor")},
}
_MOVED: Mapping[Kind, Mapping[str, str]] = {
    "inference_model.json": {
        "strength": "pipeline_config.strength",
        "start_frame": "pipeline_config.start_frame",
        "dual_image": "pipeline_config.dual_image",
        "diffusion.num_inference_timesteps": "diffusion.num_inference_steps",
        "diffusion.shift": "diffusion.flow_shift",
    },
}

_NOT_READ = (_any, "training reads features, which are made already")
_OF_READING = ("video_reader_type", "min_num_frames", "min_hxw", "hw_aspect_thr", "train_pipeline")
_ORDER = "the order is drawn from --seed alone"
_CLIPS: Mapping[str, tuple[Accepts, str]] = {
    "dataset_param.use_feature_data": (_is(True), "features are what is read"),
    "dataset_param.text_preprocess_methods": (_is_cleaning, "captions are cleaned so"),
    _P + "video_processor_type": (_is("OpensoraplanVideoProcessor", "VideoProcesser"), "the one way to take a clip"),
    _P + "image_reader_type": (_any, "there are no data sets of images"),
    _P + "auto_interval": (_is(False), "frames are taken by frame_interval"),
    _P + "train_fps": (_without_interval, "frames are taken by frame_interval"),
    _P + "speed_factor": (_is(1), "frames are taken by frame_interval"),
    _P + "drop_short_ratio": (_is(0), "no short clip is dropped"),
    _P + "max_hxw": (_is_the_area, "clips have max_height x max_width pixels"),
    _P + "hw_stride": (_is(8), "of the bookkeeping of sizes"),
    _P + "force_resolution": (_is(False), "clips are resized to cover, and cropped"),
    _P + "truncate_t_by_sp": (_any, "clips need not divide by the context-parallel size"),
}
_WALK: Mapping[str, tuple[Accepts, str]] = {
    "dataloader_param.dataloader_mode": (_is("sampler"), _ORDER),
    "dataloader_param.sampler_type": (_is("LengthGroupedSampler", "stateful_distributed_sampler"), _ORDER),
    "dataloader_param.group_data": (_any, _ORDER),
    "dataloader_param.group_frame": (_is(False), _ORDER),
    "dataloader_param.group_resolution": (_is(False), _ORDER),
    "dataloader_param.initial_global_step_for_sampler": (_is(0), "a resumed run goes on where it was"),
    "dataloader_param.drop_last": (_is(True), "batches run on across the end of an epoch"),
}
_MODEL: Mapping[str, tuple[Accepts, str]] = {
    "predictor.qk_norm_type": (_is("rmsnorm"), "queries and keys have an RMSNorm"),
    "predictor.max_seq_len": (_any, "rotary tables are made to measure"),
    "predictor.use_fused_rmsnorm": (_any, "the device chooses its fastest kernel"),
    "predictor.fa_layout": (_any, "the device chooses its kernel's layout"),
    "predictor.vae_scale_factor": (_is([4, 8, 8]), "of the VAE"),
    "predictor.FPDT": (_is(False), "attention is not chunked"),
    "predictor.FPDT_chunk_number": (_unchunked, "attention is not chunked"),
    "predictor.FPDT_with_offload": (_unchunked, "attention is not chunked"),
    "predictor.img_dim": (_not_of_the_task("img_dim"), "models of this task take no images"),
    "predictor.clip_token_len": (_not_of_the_task("clip_token_len"), "models of this task take no images"),
}
_SAMPLER = "flow matching is sampled so"
_ACCEPTED: Mapping[Kind, Mapping[str, tuple[Accepts, str]]] = {
    "data.json": {
        **_CLIPS,
        _P + "min_hxw": (_any, "no clip is left out for its size"),
        _P + "hw_aspect_thr": (_any, "no clip is left out for its shape"),
        _P + "train_pipeline": (
            _is_the_one_way,
            "clips are resized to cover, cropped and scaled to [-1, 1]; frames that are given are the clip's",
        ),
        "dataset_param.cfg": (_is(0), "captions are dropped in training"),
        _P + "cfg": (_is(0), "captions are dropped in training"),
        "dataloader_param": (_any, "each process takes its share of the samples"),
    },
    "feature_data.json": {
        **{name: (_any, why) for name, (_, why) in _CLIPS.items() if name.startswith(_P)},
        **{name: rule for name, rule in _CLIPS.items() if not name.startswith(_P)},
        **_WALK,
        "dataset_param.tokenizer_config": (_in_a_feature_file, "captions are embedded already"),
        "dataset_param.use_text_processer": _NOT_READ,
        "dataset_param.enable_text_preprocessing": _NOT_READ,
        **{_P + name: _NOT_READ for name in _OF_READING},
    },
    "pretrain_model.json": {
        **_MODEL,
        "predictor.fp32_calculate": (_is(False), "what must be fp32 always is"),
    },
    "model_wan.json": {},
    "tools.json": {
        "profile": (lambda value, _: isinstance(value, dict) and not value.get("enable"), "nothing is profiled"),
        "memory_profile": (lambda value, _: isinstance(value, dict) and not value.get("enable"), "nothing is profiled"),
    },
    "inference_model.json": {
        **_MODEL,
        "predictor.attention_async_offload": (_is(False), "it concerns training"),
        "predictor.pipeline_num_layers": (_any, "generation has no pipeline"),
        "frame_interval": (_is(1), "clips are made of consecutive frames"),
        "use_prompt_preprocess": (_is(True), "prompts are cleaned so"),
        "num_inference_videos_per_sample": (_is(1), "each line makes one clip"),
        "fp32_calculate": (_any, "what must be fp32 always is"),
        "predictor.fp32_calculate": (_any, "what must be fp32 always is"),
        "pipeline_config.cpu_offload": (_any, "the text encoder leaves the device before the transformer is loaded"),
        "device": (_is("npu", "cuda"), "the best device is chosen"),
        "dtype": (_is_the_models, "each part has its own"),
        "diffusion.num_train_steps": (_is(1000), _SAMPLER),
        "diffusion.num_train_timesteps": (_is(1000), _SAMPLER),
        "diffusion.final_sigmas_type": (_is("zero"), _SAMPLER),
        "diffusion.lower_order_final": (_is(True), _SAMPLER),
        "diffusion.predict_x0": (_is(True), _SAMPLER),
        "diffusion.prediction_type": (_is("flow_prediction"), _SAMPLER),
        "diffusion.use_flow_sigmas": (_is(True), _SAMPLER),
        "diffusion.disable_corrector": (_is([]), _SAMPLER),
        "diffusion.solver_p": (_is(None), _SAMPLER),
        "diffusion.steps_offset": (_is(0), _SAMPLER),
        "diffusion.timestep_spacing": (_is("linspace"), _SAMPLER),
        "diffusion.thresholding": (_is(False), _SAMPLER),
        "diffusion.dynamic_thresholding_ratio": (_is(0.995), _SAMPLER),
        "diffusion.sample_max_value": (_is(1), _SAMPLER),
        "diffusion.use_beta_sigmas": (_is(False), _SAMPLER),
        "diffusion.use_exponential_sigmas": (_is(False), _SAMPLER),
        "diffusion.use_karras_sigmas": (_is(False), _SAMPLER),
        "diffusion.beta_start": (_any, "flow matching has no betas"),
        "diffusion.beta_end": (_any, "flow matching has no betas"),
        "diffusion.beta_schedule": (_any, "flow matching has no betas"),
        "diffusion.trained_betas": (_is(None), "flow matching has no betas"),
        "diffusion.rescale_betas_zero_snr": (_is(False), "flow matching has no betas"),
    },
}
