"""VideoX-Fun's scripts that are here, and the tasks that each of their modes trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mm.config.tasks.fun_camera import FUN_CAMERA
from mm.config.tasks.fun_control import FUN_CONTROL
from mm.config.tasks.fun_control_ref import FUN_CONTROL_REF
from mm.config.tasks.fun_inp import FUN_INP
from mm.config.tasks.i2v import I2V
from mm.config.tasks.t2v import T2V
from mm.config.tasks.task import Task
from mm.dialects.videox_fun.flags import (
    FullControlFlags,
    FullPlainFlags,
    LoRAControlFlags,
    LoRAPlainFlags,
    VideoxFlags,
)


@dataclass(frozen=True)
class Script:
    """One script.

    Attributes:
        path: below scripts/, which is what it is called.
        flags: what it takes.
        modes: by the word of --train_mode, the tasks that it may mean; the model tells which.
        full_share: of samples that keep the whole side, where sides are drawn.
        drops_conditions: a tenth of the samples is trained without each condition beside the caption.
        is_control: half of the clips get the side nearest to --token_sample_size.
    """

    path: str
    flags: type[VideoxFlags]
    modes: Mapping[str, tuple[Task, ...]]
    full_share: float = 0.9
    drops_conditions: bool = True
    is_control: bool = False


_WAN = {"normal": (T2V,), I2V.name: (I2V,)}
_FUN = {"normal": (T2V,), "inpaint": (FUN_INP,)}
_CAMERA = (FUN_CAMERA,)
_CONTROL = {
    "control_ref": (FUN_CONTROL, FUN_CONTROL_REF),
    "control_ref_camera": _CAMERA,  # in the guide
    "control_camera_ref": _CAMERA,  # in the code
}
_ALL = (
    Script("wan2.1/train.py", FullPlainFlags, _WAN, 0.75, drops_conditions=False),
    Script("wan2.1/train_lora.py", LoRAPlainFlags, _WAN, 0.75, drops_conditions=False),
    Script("wan2.1_fun/train.py", FullPlainFlags, _FUN),
    Script("wan2.1_fun/train_lora.py", LoRAPlainFlags, _FUN),
    Script("wan2.1_fun/train_control.py", FullControlFlags, _CONTROL, is_control=True),
    Script("wan2.1_fun/train_control_lora.py", LoRAControlFlags, _CONTROL, is_control=True),
)
SCRIPTS = {script.path: script for script in _ALL}
