"""`mm data look`: a page that shows what the model is going to see, before a job costs money."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from tqdm import tqdm

from mm.cli.entry import run as run_command
from mm.cli.run_file import run_file
from mm.cli.storage_flags import StorageFlags
from mm.config.flags import Flags, parse_flags
from mm.config.layout import layout_of
from mm.config.output import require_writable_file
from mm.config.place import process_place
from mm.config.rules.training import check_training
from mm.config.run.data import MinBucket
from mm.config.run.file import load_run, of_kind
from mm.config.run.training import TrainingRun
from mm.config.storage import Location, location_of
from mm.config.unread import read_or
from mm.dialects.mindspeed.reading import Reading
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.training import read_files, read_flags, translate
from mm.errors import ConfigError, Problem, raise_all

if TYPE_CHECKING:  # torch comes later
    import torch

    from mm.look.collect import Question


class LookOptions(Flags):
    """Questions about what is trained on."""

    groups: ClassVar[Mapping[str, str]] = {"out": "look"}

    out: Path = Field(description="page to write, .html; a contact sheet is written beside it, .png")
    overwrite: bool = Field(False, description="replace a page and a sheet that exist")
    vae: Path | None = Field(
        None, description="VAE that the features were made with, to decode them; default: latents in false colours"
    )
    batches: int = Field(4, ge=1, le=1000, description="micro-batches to show")
    frames: int = Field(5, ge=1, le=200, description="frames to show of each clip, the first and the last among them")
    first_step: int = Field(1, ge=1, description="step to begin with")
    accelerator: bool = Field(False, description="decode on this machine's accelerator, not on the CPU")


class LookRunOptions(LookOptions):
    """Questions about what a run trains on."""

    world_size: int | None = Field(
        None, ge=1, description="processes of the job; default: those that the launcher has started"
    )


class LookFlags(LookRunOptions, TrainFlags):
    """Show what a training run is going to see: its first micro-batches, and tables about all samples.

    `mm data look run.yaml [flags]` looks at the run of a file, `mm data look STORE [flags]` at a store without a run.
    """


class LookStoreFlags(LookOptions, StorageFlags):
    """Show the samples of one store without a run.

    `mm data look STORE [flags]`
    """

    micro_batch_size: int = Field(1, ge=1, description="samples of a micro-batch")
    seed: int = Field(1234, ge=0, description="seed of the order")
    min_bucket: MinBucket = Field(
        "error", description="shapes of which there are fewer samples than a micro-batch takes: error, drop or repeat"
    )


def main(argv: Sequence[str]) -> None:
    """Write the page and the contact sheet.

    Raises:
        ConfigError: what `mm train` raises before it starts, of a run; CFG-220 for files that exist, CFG-221 for a page
            that is not called .html, CFG-222 for a step after the run's last, CFG-131 where nothing can be written,
            CFG-030 without an accelerator.
        DataError: what `mm.look.collect` raises; DATA-018 and DATA-019 when writing fails.
    """
    if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml")):
        flags = parse_flags(LookStoreFlags, argv[1:], program=f"mm data look {argv[0]}")
        store = location_of(argv[0], flags.storage())
        page, sheet = _places(flags)
        _look(flags, page, sheet, _of_store(store, flags))
        return
    run, options = _asked(argv)
    sections = run.on(read_or(options.world_size, None) or process_place().world_size)
    check_training(sections)
    page, sheet = _places(options)
    _look(options, page, sheet, _of_run(sections, options, argv))


def _asked(argv: Sequence[str]) -> tuple[TrainingRun, LookRunOptions]:
    """The run that a command line, or a file on it, describes, and what is asked about it."""
    given = run_file(argv, LookRunOptions)
    if given is not None:
        file, words = given
        return of_kind(load_run(file), TrainingRun), parse_flags(LookRunOptions, words, program=f"mm data look {file}")
    reading = Reading()
    flags = read_flags(LookFlags, argv, "mm data look", reading)
    return translate(flags, read_files(flags, reading)), flags


def _places(flags: LookOptions) -> tuple[Path, Path]:
    """The files to write, which may not be there."""
    page = flags.out
    if page.suffix not in (".html", ".htm"):
        message = f"--out is {page}, and a page's name ends in .html."
        raise ConfigError("CFG-221", message, "Name a page, such as look.html.")
    require_writable_file(page, "--out")
    both = (page, page.with_suffix(".png"))
    if not flags.overwrite:
        remedy = "Give another --out, or --overwrite to replace it."
        raise_all(ConfigError, [Problem("CFG-220", f"{file} exists.", remedy) for file in both if file.exists()])
    return both


def _of_store(store: Location, flags: LookStoreFlags) -> Question:
    from mm.data.dataset import checked_sources
    from mm.data.sampler import BatchPlan
    from mm.look.alone import COSTS_OF, features_of_store, open_alone
    from mm.look.collect import Question
    from mm.look.samples import Drawing

    dataset = open_alone(store)
    size = flags.micro_batch_size
    return Question(
        title=str(store),
        dataset=dataset,
        sources=checked_sources(features_of_store(store), dataset.model),
        drawing=Drawing(BatchPlan(size, size), flags.seed, min_bucket=flags.min_bucket, first_step=flags.first_step),
        facts=[
            ("samples", f"{len(dataset):,}"),
            ("micro-batch", f"{size}"),
            ("seed", str(flags.seed)),
            ("costs", f"of {COSTS_OF}, since no run says the model"),
        ],
        num_batches=flags.batches,
        num_frames=flags.frames,
    )


def _of_run(sections: TrainingRun, flags: LookRunOptions, argv: Sequence[str]) -> Question:
    from mm.data.dataset import checked_sources, open_features
    from mm.look.collect import Question
    from mm.look.samples import drawing_of

    steps = sections.training.steps
    if flags.first_step > steps:
        message = f"--first-step is {flags.first_step}, and the run has {steps} steps."
        raise ConfigError("CFG-222", message, "Give a step of the run.")
    data, layout, wan = sections.data, layout_of(sections), sections.wan
    dataset = open_features(data.features, wan)
    batch = sections.samples_of_step(layout.dp_size)
    packs = [] if data.pack_tokens is None else [("packs", f"at most {data.pack_tokens:,} tokens in a sequence")]
    drawing = drawing_of(sections, flags.first_step)
    return Question(
        title=argv[0] if argv[0].endswith((".yaml", ".yml")) else data.features.path,
        dataset=dataset,
        sources=checked_sources(data.features, wan),
        drawing=drawing,
        facts=[
            ("samples", f"{len(dataset):,}"),
            ("steps", f"{steps:,} of {batch:,} samples, on {layout.dp_size:,} replicas"),
            ("micro-batch", str(data.micro_batch_size)),
            *packs,
            ("seed", str(sections.training.seed)),
            ("order", "shuffled" if data.shuffle else "as listed"),
            ("captions dropped", f"{data.caption_dropout:.1%}"),
            *((f"{name} dropped", f"{rate:.1%}") for name, rate in data.condition_dropout.rates.items()),
            ("bad samples", data.on_bad_sample),
            ("costs", f"of the run's model, {wan.num_layers} blocks of width {wan.hidden_size}"),
        ],
        num_batches=flags.batches,
        num_frames=flags.frames,
    )


def _look(flags: LookOptions, page: Path, sheet: Path, question: Question) -> None:
    """Collect, draw, and write both files; nothing is written before all is there."""
    from mm.data.files import make_folder, write_atomically
    from mm.look.collect import collect, matching_eye
    from mm.look.page import render_page
    from mm.look.sheet import draw_sheet

    eye = matching_eye(flags.vae, question.sources, _device(flags))
    with tqdm(total=question.num_batches, desc="look", unit="batch", disable=None) as bar:
        looked = collect(question, eye, flags.vae, bar.update)
    contents = {sheet: draw_sheet(looked), page: render_page(looked)}
    make_folder(page.parent, "--out")
    for file, content in contents.items():
        write_atomically(file, [content], len(content))
    samples = sum(len(batch.samples) for batch in looked.batches)
    print(f"wrote {page} and {sheet}: {samples} samples of {len(question.dataset):,}")


def _device(flags: LookOptions) -> torch.device:
    from mm.device.backend import select

    found = select(None if flags.accelerator else "cpu").device
    if flags.accelerator and found.type == "cpu":
        raise ConfigError("CFG-030", "--accelerator asks for one, and this machine has none.", "Leave it out.")
    return found


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
