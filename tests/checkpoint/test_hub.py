"""Files of a released model fetched from a hub: a server of ours that answers as Hugging Face's does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "diffusion_pytorch_model.safetensors": b"weights" * 1000,
    "config.json": b"{}",
    "google/umt5-xxl/tokenizer.json": b"tokens",
    "google/umt5-xxl/spiece.model": b"pieces",
}
REPOSITORY = "alibaba-pai/Wan2.1-Fun-1.3B-InP"
FETCH = """
import sys
from pathlib import Path
from mm.checkpoint.hub import download
from mm.config.model_files import ModelFiles
from mm.errors import MMError
try:
    for pattern in sys.argv[3:]:
        print(*download(ModelFiles(sys.argv[2], pattern), Path(sys.argv[1])), sep="\\n")
except MMError as error:
    print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """One repository with four files."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        type(self).asked.append(path)
        if path.startswith(f"api/models/{REPOSITORY}"):
            if "/tree/" in path:
                body = json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in FILES.items()
                    ]
                ).encode()
            else:
                siblings = [{"rfilename": name} for name in FILES]
                body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
            return self.send(200, body, with_body)
        if path.startswith(f"{REPOSITORY}/resolve/"):
            name = path.split("/", 4)[4]
            if name in FILES:
                return self.send(200, FILES[name], with_body)
        return self.send(404, b"{}", with_body)

    def send(self, status: int, body: bytes, with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    Hub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Hub.asked
        server.shutdown()
        thread.join()


def fetch(address: str, folder: Path, model_id: str, *patterns: str) -> tuple[list[str], str]:
    """Lines of the result, and what was shown beside."""
    home = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-c", FETCH, str(folder / "models"), model_id, *patterns]
    done = subprocess.run(words, env={**os.environ, **home}, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines(), done.stderr


def test_what_matches_is_fetched_once(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """Under the owner's name there, into the folder of the name in guides, with a bar."""
    address, asked = hub
    patterns = "diffusion_pytorch_model*.safetensors", "google/*"
    found, shown = fetch(address, tmp_path, "PAI/Wan2.1-Fun-1.3B-InP", *patterns)
    home = tmp_path / "models" / "PAI" / "Wan2.1-Fun-1.3B-InP"
    assert found == [str(home / "diffusion_pytorch_model.safetensors"), str(home / "google" / "umt5-xxl")]
    fetched = {str(file.relative_to(home)) for file in home.rglob("*") if file.is_file() and ".cache" not in file.parts}
    assert fetched == FILES.keys() - {"config.json"}
    assert all((home / name).read_bytes() == FILES[name] for name in fetched)
    assert "%" in shown
    assert not any("config.json" in path for path in asked)


def test_what_is_not_there_is_said(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = hub
    [said], _ = fetch(address, tmp_path, "PAI/Wan2.1-Fun-1.4B-InP", "*.safetensors")
    assert said.startswith(f"CFG-402: alibaba-pai/Wan2.1-Fun-1.4B-InP cannot be fetched from {address} (")
    [said], _ = fetch(address, tmp_path, "PAI/Wan2.1-Fun-1.3B-InP", "*.bin")
    assert said.startswith("CFG-401: *.bin matches nothing in ")
    assert f"nor in what {address} gave of alibaba-pai/Wan2.1-Fun-1.3B-InP. Fix: Correct the pattern" in said
