"""`mm ui`: a page on this computer, to make clips and look at them."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mm.cli.entry import run
from mm.config.flags import Flags, parse_flags
from mm.config.model import Precision
from mm.config.output import require_writable_folder
from mm.config.run.generation import DeviceName
from mm.errors import ConfigError, Problem, raise_all


class UiFlags(Flags):
    """Open a page on this computer to make clips with models of a folder and to compare them."""

    models: Path = Field(Path("models"), description="folder of models in the layout of diffusers, or one of them")
    encoders: Path | None = Field(None, description="folder of encoders, for models that are a transformer alone")
    outputs: Path = Field(Path("clips"), description="folder of clips; each gets one, with the run.yaml that makes it")
    port: int = Field(7860, ge=0, le=65535, description="of this computer alone; 0 takes a free one")
    device: DeviceName | None = Field(None, description="the best there is by default")
    precision: Precision = Field("bf16", description="of the transformer")
    open: bool = Field(False, description="open the page in the browser")


def main(argv: Sequence[str]) -> None:
    """Show the page until the process is interrupted.

    Raises:
        ConfigError: CFG-410 without gradio, CFG-411 where no model can be used, CFG-131 for the folder of clips.
    """
    flags = parse_flags(UiFlags, argv, program="mm ui")
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("CFG-410", "The page needs gradio, which is not installed.", "pip install 'mm-wan[ui]'.")
    require_writable_folder(str(flags.outputs), "--outputs")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    logging.getLogger("httpx").setLevel(logging.WARNING)  # which tells of each request of the page to itself

    from mm.ui.making import Maker
    from mm.ui.models import find_models
    from mm.ui.page import build_page
    from mm.ui.serve import serve

    models, reasons = find_models(flags.models, flags.encoders)
    if not models:
        problems = [Problem("CFG-411", f"{reason}.", "Correct the model.") for reason in reasons]
        nothing = f"{flags.models} holds no model in the layout of diffusers (a folder with transformer/, vae/, ...)."
        raise_all(ConfigError, problems or [Problem("CFG-411", nothing, "Name another folder with --models.")])
    maker = Maker(flags.outputs, flags.device, flags.precision)
    serve(build_page(models, reasons, maker), flags.outputs, flags.port, open_browser=flags.open)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
