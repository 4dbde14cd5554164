"""The section `residency`: where the weights of a frozen transformer are, and in how many bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm.config.base import Section


class Residency(Section):
    """Residency of frozen weights. With no limit all of them are on the device.

    Attributes:
        device_limit: device memory that generation may take, `24GiB`: weights that do not fit wait outside of it.
        device_buffer: what is left free of that limit, for what is not planned for; None for 512MiB.
        staying_parameters: the number of the transformer's parameters that stay on the device, in place of a limit.
        host_limit: page-locked host memory of a process, `64GiB`; weights that do not fit are read from their files
            each time. None for no limit.
        fp8: weights of the blocks' linears in e4m3: `scaled` for each output channel, or `unscaled`, a plain cast.
    """

    device_limit: str | None = None
    device_buffer: str | None = None
    staying_parameters: int | None = Field(None, ge=0)
    host_limit: str | None = None
    fp8: Literal["scaled", "unscaled"] | None = None

    @property
    def streams(self) -> bool:
        """True where weights may wait outside of the device."""
        return self.device_limit is not None or self.staying_parameters is not None
