"""Fields of MindSpeed-MM's data files that mean something else than is done here, each with what to do instead."""

from __future__ import annotations

_ONE_SIZE = "Remove it; every clip is resized and centre-cropped to max_height x max_width, and none is filtered out."
_NO_RATE = "Remove it; frames are taken every frame_interval, whatever the frame rate."
_NO_GROUPS = "Remove it; the order of samples is drawn from --seed alone."
_P = "dataset_param.preprocess_parameters."
RETIRED = {
    "dataset_param.use_feature_data": "Remove it; data_storage_mode says whether features are read.",
    "dataset_param.text_preprocess_methods": "Remove it; captions are always cleaned as Wan does.",
    _P + "video_processor_type": _ONE_SIZE,
    _P + "image_reader_type": "Remove it; data sets of images are not available in this version.",
    _P + "auto_interval": _NO_RATE,
    _P + "train_fps": _NO_RATE,
    _P + "speed_factor": _NO_RATE,
    _P + "max_hxw": _ONE_SIZE,
    _P + "min_hxw": _ONE_SIZE,
    _P + "hw_stride": _ONE_SIZE,
    _P + "hw_aspect_thr": _ONE_SIZE,
    _P + "force_resolution": _ONE_SIZE,
    _P + "truncate_t_by_sp": "Remove it; clips need not divide by the context-parallel size.",
    _P + "drop_short_ratio": "Remove it; min_num_frames decides whether short videos are used.",
    _P + "train_pipeline": "Remove it; the one way is to resize to cover, crop the centre and scale to [-1, 1].",
    _P + "dataloader_num_workers": "Remove it and give --num-workers.",
    "dataloader_param.dataloader_mode": _NO_GROUPS,
    "dataloader_param.sampler_type": _NO_GROUPS,
    "dataloader_param.group_data": _NO_GROUPS,
    "dataloader_param.group_frame": _NO_GROUPS,
    "dataloader_param.group_resolution": _NO_GROUPS,
    "dataloader_param.initial_global_step_for_sampler": "Remove it; a resumed run goes on where it was.",
    "dataloader_param.drop_last": "Remove it; batches run on across the end of an epoch and no sample is dropped.",
    "dataloader_param.batch_size": "Remove it and give --micro-batch-size.",
    "dataloader_param.num_workers": "Remove it and give --num-workers.",
}
RETIRED_IN_EXTRACTION = {
    "dataset_param.cfg": "Remove it; captions are dropped in training, see cfg in feature_data.json.",
    _P + "cfg": "Remove it; captions are dropped in training, see cfg in feature_data.json.",
    "dataloader_param": "Remove it; each process takes its share of the samples, and --num-workers reads ahead.",
}
_IN_EXTRACTION = "Remove it; videos and captions are read by feature extraction, see data.json there."
RETIRED_IN_TRAINING = {
    "dataset_param.use_text_processer": _IN_EXTRACTION,
    "dataset_param.enable_text_preprocessing": _IN_EXTRACTION,
    _P + "video_reader_type": _IN_EXTRACTION,
    _P + "min_num_frames": _IN_EXTRACTION,
}
