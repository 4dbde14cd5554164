"""A real S3 server on loopback (moto's), and a proxy before it that can fail as networks and storages do."""

import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "stores"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
SERVER = """
import os, sys, threading
from moto.server import main
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # not outliving who started it
main(sys.argv[1:])
"""
_NOT_HANDED_ON = {"connection", "content-length", "transfer-encoding", "keep-alive", "server", "date"}


@dataclass(frozen=True)
class S3:
    """The server: its endpoint, and a client of another library than the one that is tested."""

    endpoint: str
    client: Any
    environment: dict[str, str]

    def upload(self, folder: Path, prefix: str, bucket: str = BUCKET) -> str:
        """Put the files of a folder below a prefix; returns its address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")
        return f"s3://{bucket}/{prefix}"

    def publish(self, folder: Path, bucket: str) -> str:
        """Put the files of a folder into a new bucket that needs no credentials; returns its address.

        Readers of a test session have the variables that it began with, and so no credentials.
        """
        self.client.create_bucket(Bucket=bucket, ACL="public-read")
        self.upload(folder, "set", bucket)
        for path in filter(Path.is_file, folder.rglob("*")):
            self.client.put_object_acl(Bucket=bucket, Key=f"set/{path.relative_to(folder)}", ACL="public-read")
        return f"s3://{bucket}/set"

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """Start moto's server on a free port, with one bucket."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "moto.log", "wb") as log:
        words = [sys.executable, "-c", SERVER, "-H", "127.0.0.1", "-p", str(port)]
        environment = {**os.environ, **CREDENTIALS}
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _wait(endpoint, process, folder / "moto.log")
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        yield S3(endpoint, client, {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint})
    finally:
        process.kill()
        process.communicate()


def _wait(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(log.read_text())


Fault = Callable[[BaseHTTPRequestHandler, HTTPResponse, bytes], bool]
"""Answers a request in its own way, given the true answer; False where it leaves that to the proxy."""


@dataclass
class Proxy:
    """A proxy: `fault` answers the requests whose path `matches`, `times` of them (None: all)."""

    endpoint: str = ""
    fault: Fault | None = None
    matches: str = ""
    times: int | None = None
    requests: list[str] = field(default_factory=list)
    failed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, fault: Fault, matches: str = "", times: int | None = None) -> None:
        with self.lock:
            self.fault, self.matches, self.times, self.failed = fault, matches, times, 0

    def takes(self, path: str) -> Fault | None:
        with self.lock:
            self.requests.append(path)
            if self.fault is None or self.matches not in path or self.failed == self.times:
                return None
            self.failed += 1
            return self.fault


def answer(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
    handler.send_response_only(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def status(code: int, name: str) -> Fault:
    """An answer of S3 that something is wrong, such as 503 SlowDown."""

    def fault(handler: BaseHTTPRequestHandler, true: HTTPResponse, body: bytes) -> bool:
        text = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>{name} it says</Message></Error>".encode()
        answer(handler, code, {"Content-Type": "application/xml", "Content-Length": str(len(text))}, text)
        return True

    return fault


def reset(handler: BaseHTTPRequestHandler, true: HTTPResponse, body: bytes) -> bool:
    """The connection is reset in the middle of the body."""
    handler.send_response_only(true.status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    return True


def truncated(handler: BaseHTTPRequestHandler, true: HTTPResponse, body: bytes) -> bool:
    """An answer that ends too early and says that it is whole."""
    if handler.command != "GET":
        return False
    half = body[: len(body) // 2]
    answer(handler, true.status, {"Content-Length": str(len(half))}, half)
    return True


def flipped(handler: BaseHTTPRequestHandler, true: HTTPResponse, body: bytes) -> bool:
    """A bit of the answer is another on its way."""
    if handler.command != "GET" or not body:
        return False
    damaged = bytearray(body)
    damaged[len(damaged) // 2] ^= 4
    answer(handler, true.status, {"Content-Length": str(len(damaged))}, bytes(damaged))
    return True


def slow(seconds: float) -> Fault:
    """An answer that comes late."""

    def fault(handler: BaseHTTPRequestHandler, true: HTTPResponse, body: bytes) -> bool:
        time.sleep(seconds)
        return False

    return fault


@contextmanager
def proxy_before(s3: S3) -> Iterator[Proxy]:
    """A proxy before a server, on a free port."""
    proxy = Proxy()
    upstream = s3.endpoint.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def hand_on(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            connection = HTTPConnection(upstream, timeout=60)
            connection.request(self.command, self.path, self.rfile.read(length), dict(self.headers))
            true = connection.getresponse()
            body = true.read()
            fault = proxy.takes(f"{self.command} {self.path}")
            try:
                if fault is None or not fault(self, true, body):
                    kept = {name: value for name, value in true.getheaders() if name.lower() not in _NOT_HANDED_ON}
                    size = true.getheader("Content-Length") if self.command == "HEAD" else None
                    answer(self, true.status, {**kept, "Content-Length": size or str(len(body))}, body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            connection.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = hand_on  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
