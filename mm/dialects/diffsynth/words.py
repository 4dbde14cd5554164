"""DiffSynth-Studio's words for the values of a training and an extraction."""

from __future__ import annotations

from mm.config.run.origins import Origins, Word
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.dialects.meaning import words_of

PROGRAM = "train.py"
_LINE = "the command line"
"""Named where rules begin a message with the file of a value."""
_RUN_FILE = "checkpoints/run.yaml"
"""Named for values that no argument stands for: `mm run` goes on with that file, which has all of them."""
_BEHIND_A_FILE = ("data.clip", "data.path", "data.folder", "data.file_keys", "data.format")


def origins_of(models_word: str, *, is_lora: bool) -> Origins:
    """The words of a command line.

    Args:
        models_word: the flag that names the models. is_lora: adapters are trained.
    """
    words = dict(words_of(DiffSynthFlags))
    for path in list(words):
        if path.startswith(_BEHIND_A_FILE):
            words[path] = Word(words[path].name, _LINE)
    models = Word(models_word)
    encoders = ("vae", "text", "image")
    words |= {f"encoders.{name}.from_pretrained": models for name in encoders}
    words |= {"adapters.base": models, "model.shape": models}
    words["checkpoint.load"] = Word("--lora_checkpoint") if is_lora else models
    words["data.features.path"] = Word("--output_path", _LINE)
    words |= dict.fromkeys(("training.device", "extraction.device"), Word("accelerate launch --cpu"))
    words["output.overwrite"] = Word("removing OUTPUT_PATH/features")
    return Origins(words, file=_RUN_FILE)
