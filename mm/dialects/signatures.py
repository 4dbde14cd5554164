"""Words that only one system's command line has, by which a command that mixes two is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SIGNATURES: Mapping[str, frozenset[str]] = {
    "MindSpeed-MM": frozenset({"--mm-data", "--mm-model", "--mm-tool"}),
    "VideoX-Fun": frozenset(
        {
            "--train_data_dir",
            "--train_data_meta",
            "--video_sample_n_frames",
            "--video_sample_stride",
            "--video_sample_size",
            "--token_sample_size",
            "--config_path",
            "--trainable_modules",
            "--vae_mini_batch",
            "--uniform_sampling",
            "--random_hw_adapt",
            "--training_with_video_token_length",
            "--train_mode",
        }
    ),
    "DiffSynth-Studio": frozenset(
        {
            "--dataset_base_path",
            "--dataset_metadata_path",
            "--dataset_repeat",
            "--model_paths",
            "--model_id_with_origin_paths",
            "--remove_prefix_in_ckpt",
            "--trainable_models",
            "--lora_base_model",
            "--data_file_keys",
            "--extra_inputs",
            "--use_gradient_checkpointing_offload",
        }
    ),
    "SimpleTuner": frozenset(
        {"--model_family", "--model_flavour", "--data_backend_config", "--lora_type", "--lycoris_config"}
    ),
}


def dialects_in(words: Sequence[str]) -> dict[str, list[str]]:
    """The systems whose own words are in a command line, each with these words in order."""
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    found = {system: [name for name in names if name in own] for system, own in SIGNATURES.items()}
    return {system: own for system, own in found.items() if own}
