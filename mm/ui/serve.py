"""The page's server: this computer alone can reach it, and it reaches nobody."""

from __future__ import annotations

import socket
from pathlib import Path

import gradio as gr

from mm.errors import ConfigError

HOST = "127.0.0.1"


def serve(page: gr.Blocks, outputs: Path, port: int, *, open_browser: bool) -> None:
    """Serve until the process is interrupted.

    Args:
        page: what is shown. outputs: folder whose files the page may show. port: 0 takes a free one.
        open_browser: show it.

    Raises:
        ConfigError: CFG-412 for a port that is taken.
    """
    chosen = _free_port(port)
    _, address, _ = page.queue().launch(
        server_name=HOST,
        server_port=chosen,
        share=False,
        inbrowser=open_browser,
        quiet=True,
        prevent_thread_lock=True,
        allowed_paths=[str(outputs.absolute())],
        theme=gr.themes.Base(font=["sans-serif"], font_mono=["monospace"]),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
    )
    print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    except KeyboardInterrupt:
        page.close(verbose=False)


def _free_port(port: int) -> int:
    """Port to listen at: the one asked for, or a free one for 0."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            found = f"Port {port} of {HOST} cannot be used ({error.strerror})."
            raise ConfigError("CFG-412", found, "Name another one with --port, or 0 for a free one.") from None
        return int(listener.getsockname()[1])
