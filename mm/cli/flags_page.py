"""docs/flags.md: every flag of every command, written from the classes that read them."""

from __future__ import annotations

import re

from mm.cli.convert import ConvertFlags
from mm.cli.data import RepairFlags, StatusFlags
from mm.cli.data_export import CopyFlags, ExportFlags
from mm.cli.data_look import LookFlags, LookStoreFlags
from mm.cli.demo import DemoFlags
from mm.cli.doctor import DoctorFlags
from mm.cli.doctor_data import DoctorDataFlags
from mm.cli.doctor_parity import ParityFlags
from mm.cli.migrate import MigrateFlags
from mm.cli.migrate_entries import MigrateEntriesFlags
from mm.cli.migrate_shards import MigrateShardsFlags
from mm.cli.plot import PlotFlags
from mm.cli.score import ScoreFlags
from mm.cli.ui import UiFlags
from mm.cli.videox_fun_sizes import SizeFlags
from mm.cli.zero_to_bf16 import ZeroFlags
from mm.config.flag_help import FlagText, flag_groups
from mm.config.flags import Flags
from mm.dialects.mindspeed.extract_files import ExtractFlags
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.train_flags import TrainFlags

PROGRAMS: dict[str, type[Flags]] = {
    "mm extract": ExtractFlags,
    "mm train": TrainFlags,
    "mm generate": GenerateFlags,
    "mm convert": ConvertFlags,
    "mm doctor": DoctorFlags,
    "mm doctor data": DoctorDataFlags,
    "mm doctor parity": ParityFlags,
    "mm migrate": MigrateFlags,
    "mm migrate shards": MigrateShardsFlags,
    "mm migrate entries": MigrateEntriesFlags,
    "mm data look": LookFlags,
    "mm data look STORE": LookStoreFlags,
    "mm data status": StatusFlags,
    "mm data repair": RepairFlags,
    "mm data export": ExportFlags,
    "mm data copy": CopyFlags,
    "mm plot": PlotFlags,
    "mm demo": DemoFlags,
    "mm score": ScoreFlags,
    "mm ui": UiFlags,
    "scripts/zero_to_bf16.py": ZeroFlags,
    "scripts/process_json_add_width_and_height.py": SizeFlags,
}
"""Commands that take flags, in the page's order."""

_HEAD = """# Flags

Every flag of every command, as its `--help` says it. `python tools/write_flags.py` writes this page from the classes
that read the flags; the descriptions are there.

A flag that takes nothing is a switch. `--seed 5` and `--seed=5` are the same, the last one counts, and a flag
that does not exist is an error. Where no default is shown, the description says what happens without the flag. `mm
convert` also takes its flags with underscores. `mm launch` takes torchrun's flags, `mm doctor compare` two runs,
`mm doctor costs` one. VideoX-Fun's training scripts take its flags ([migrating.md](migrating.md#from-videox-fun)).
"""


def flags_page() -> str:
    """The page as Markdown."""
    links = [f"[{program}](#{re.sub(r'[^a-z0-9 _-]', '', program.lower()).replace(' ', '-')})" for program in PROGRAMS]
    return "\n".join([_HEAD, "Commands: " + ", ".join(links) + ".", *map(_section, PROGRAMS), ""])


def _section(program: str) -> str:
    flags = PROGRAMS[program]
    lines = [f"\n## {program}\n", re.sub(r"\n +", "\n", (flags.__doc__ or "").strip())]
    shared = set(TrainFlags.model_fields) if issubclass(flags, TrainFlags) and flags is not TrainFlags else set()
    if shared:
        lines.append("\nIts flags are those of [mm train](#mm-train), and what is listed here, if anything.")
    groups = {
        heading: [flag for flag in group if flag.field not in shared] for heading, group in flag_groups(flags).items()
    }
    for heading, own in groups.items():
        if len(groups) > 1 and own:
            lines.append(f"\n### {heading[0].upper()}{heading[1:]} ({program})")
        lines += _table(flags, own) if own else []
    return "\n".join(lines)


def _table(kind: type[Flags], flags: list[FlagText]) -> list[str]:
    head = ["", "| flag | takes | default | |", "| --- | --- | --- | --- |"]
    return [*head, *(_row(kind.spelled(flag.field), flag) for flag in flags)]


def _row(name: str, flag: FlagText) -> str:
    value = flag.value.replace("|", "`, `").join("``") if flag.value else ""
    takes = ", ".join(part for part in (value + " ..." * flag.several, flag.bounds) if part)
    default = flag.default if flag.default in ("", "required") else f"`{flag.default}`"
    description = flag.description.replace("|", r"\|")
    return f"| `{name}` | {takes} | {default} | {description} |"
