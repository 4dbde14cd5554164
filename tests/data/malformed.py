"""The 54 malformed inputs: how each is made, and a process that runs groups of them through the commands.

    python -c "import sys, malformed; malformed.run_groups(sys.argv[1], sys.argv[2:])" FOLDER GROUPS...

prints one JSON object a case: its group, its name, the exit code, the ids of the errors told, and all that was told.
Each case has ten seconds; the process dies of SIGALRM in one that hangs. What each must come to stands in docs/data.md.
"""

import contextlib
import ctypes
import io
import json
import os
import pickle
import signal
import struct
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import av
import torch
from feature_samples import moving_square, write_clip, write_sound
from feature_stores import MODEL, RECIPE, feature, feature_set, train_data, write_store
from numbered_clips import with_edits, with_matrix, write_numbered
from safetensors.torch import save
from test_image_features import with_images

from mm.cli import doctor, train
from mm.cli.entry import run
from mm.data.dataset import open_features
from mm.data.features import text_hash
from mm.data.loader import feature_batches
from mm.data.sampler import BatchPlan

SECONDS = 10
CLIP = {"num_frames": 9, "max_height": 32, "max_width": 48}
Main = Callable[[Sequence[str]], None]
Call = tuple[Main, list[str]]


# Videos: a data set of one row whose video the case writes.


def truncated(path: Path) -> None:
    content = write_clip(path, 40, faststart=True).read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def subtitles(path: Path) -> None:
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\nno picture\n")


def sized(height: int, width: int) -> Callable[[Path], None]:
    """An uncompressed AVI whose stream header claims another size than its one frame has."""

    def write(path: Path) -> None:
        with av.open(str(path), "w", format="avi") as container:
            stream = container.add_stream("rawvideo", rate=8)
            stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moving_square(1, 16, 16)[0])))
            container.mux(stream.encode())
        content = bytearray(path.read_bytes())
        struct.pack_into("<2i", content, content.find(b"strf") + 12, width, height)
        path.write_bytes(content)

    return write


def variable_rate(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for index, pixels in enumerate(moving_square(9, 32, 48)):
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts = index * index + index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def loop(path: Path) -> None:
    path.symlink_to("loop.mp4")
    path.with_name("loop.mp4").symlink_to(path.name)


def forbidden(path: Path) -> None:
    write_clip(path).chmod(0)


def edited(path: Path) -> None:
    with_edits(write_numbered(path.with_name("whole.mp4"), options={"g": "20"}), path, [(13, 40)])


def turned(*matrix: float) -> Callable[[Path], None]:
    return lambda path: with_matrix(write_numbered(path.with_name("stored.mp4"), 9), path, matrix) and None


def of_two_sizes(path: Path) -> None:
    sizes = ((48, 160), (64, 160))
    parts = [write_numbered(path.with_name(f"{h}.ts"), 5, size=(h, w)).read_bytes() for h, w in sizes]
    path.write_bytes(b"".join(parts))


VIDEOS: dict[str, Callable[[Path], Any]] = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "truncated mp4": truncated,
    "no video stream": subtitles,
    "audio only": write_sound,
    "1 frame": lambda path: write_clip(path, 1),
    "80 frames for 81": lambda path: write_clip(path, 80),
    "wrong fps in the annotation": write_clip,
    "0x0 pixels": sized(0, 0),
    "odd dimensions": lambda path: write_clip(path, 9, 33, 49, "yuv444p"),
    "huge dimensions": sized(40000, 40000),
    "variable frame rate": variable_rate,
    "HDR pixel format": lambda path: write_clip(path, 9, pixel_format="yuv420p10le"),
    "trimmed by an edit list": edited,
    "mirrored by its matrix": turned(-1, 0, 0, 1),
    "askew by its matrix": turned(0.8, 0.6, -0.6, 0.8),
    "frames of two sizes": of_two_sizes,
    "unknown codec": lambda path: path.write_bytes(write_clip(path).read_bytes().replace(b"avc1", b"zzzz")),
    "list of files": lambda path: path.write_text(
        f"ffconcat version 1.0\nfile {write_clip(path.with_name('part.mp4')).name}\n"
    ),
    "directory instead of file": Path.mkdir,
    "loop of links": loop,
    "permission denied": forbidden,
    "hanging FIFO": os.mkfifo,
}


def video_case(name: str, folder: Path) -> Call:
    VIDEOS[name](folder / "clip.mp4")
    row: dict[str, Any] = {"path": "clip.mp4", "cap": "a clip"}
    if name == "wrong fps in the annotation":
        row["fps"] = 1000
    annotation = folder / "rows.json"
    annotation.write_text(json.dumps([row]))
    return check_videos(folder, annotation, num_frames=81 if "81" in name else 9)


def check_videos(folder: Path, annotation: Path, **clip: int) -> Call:
    return doctor.main, ["data", "--mm-data", str(data_json(folder, annotation, **clip)), "--num-workers", "1"]


def data_json(folder: Path, annotation: Path, **clip: int) -> Path:
    param = {
        "dataset_type": "t2v",
        "basic_parameters": {
            "data_path": str(annotation), "data_folder": str(folder), "data_storage_mode": "combine",
        },
        "preprocess_parameters": {**CLIP, **clip},
        "tokenizer_config": {"from_pretrained": "tokenizer"},
    }  # fmt: skip
    (folder / "mm_data.json").write_text(json.dumps({"dataset_param": param}))
    return folder / "mm_data.json"


# Features: a store of two samples, of which the case changes the first one's file.


def rewritten(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """The file with other tensors, and the header that belongs to them."""

    def write(path: Path) -> None:
        written = feature(0, tokens=1)
        mask = torch.zeros(512, dtype=torch.uint8)
        assert written.latents is not None
        tensors = {"latents": written.latents, "prompt": written.prompt, "prompt_mask": mask}
        mask[0] = 1
        change(tensors)
        mask = tensors["prompt_mask"]
        mask.copy_(torch.arange(len(mask)) < len(tensors["prompt"]))
        path.write_bytes(save({name: t.contiguous() for name, t in tensors.items()}, {"made_from": about()}))

    return write


def about() -> str:
    origin = {"sample": "videos/0.mp4", "recipe": RECIPE.key, "caption": text_hash("x"), "video": "v"}
    return json.dumps({**origin, "start_frame": 0})


def reheaded(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The file with another header over the same bytes."""

    def write(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return write


class Payload:
    """Would make a file if it were ever unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


FEATURES: dict[str, Callable[[Path], Any]] = {
    "pickle payload": lambda path: path.write_bytes(pickle.dumps(Payload(path.with_name("ran")))),
    "header of a bomb": reheaded(lambda h: h["latents"].update(shape=[2**40, 2**10], data_offsets=[0, 2**52])),
    "missing key": rewritten(lambda tensors: tensors.pop("latents")),
    "NaN latent": rewritten(lambda tensors: tensors["latents"][0, 1, 2, 3].fill_(float("nan"))),
    "Inf latent": rewritten(lambda tensors: tensors["latents"][0, 1, 2, 3].fill_(float("inf"))),
    "float64": rewritten(lambda tensors: tensors.update(latents=tensors["latents"].double())),
    "wrong channels": rewritten(lambda tensors: tensors.update(latents=tensors["latents"][:4])),
    "other number of latent frames": rewritten(lambda tensors: tensors.update(latents=tensors["latents"][:, :2])),
    "negative size": reheaded(lambda header: header["latents"].update(shape=[16, 3, -8, -8])),
    "text longer than text_len": rewritten(lambda tensors: tensors.update(prompt=torch.zeros(513, 8))),
    "empty text": rewritten(lambda tensors: tensors.update(prompt=torch.zeros(0, 8))),
    "I2V without image features": lambda path: None,
    "few samples of a shape": lambda path: None,
    "header longer than the file": lambda path: path.write_bytes((10**6).to_bytes(8, "little") + b"{}"),
}


def feature_case(name: str, folder: Path) -> Call:
    mixed = ((16, 3, 8, 8), (16, 3, 8, 6)) if name == "few samples of a shape" else ((16, 3, 8, 8),)
    images = name == "I2V without image features"
    recipe = RECIPE.model_copy(update={"task": "i2v", "image_encoder": "i"})
    store = write_store(folder / "store", 2, mixed, recipe if images else RECIPE)
    if images:
        listing = store / "data.jsonl"
        listing.write_text(listing.read_text().replace('"task":"t2v"', '"task":"i2v"'))
    FEATURES[name](next((store / "features").glob("0_mp4-*")))
    if name == "few samples of a shape":

        def walk(_: Sequence[str]) -> None:
            dataset = open_features(feature_set(store), MODEL)
            list(islice(feature_batches(dataset, BatchPlan(2, 2), text_len=512, seed=1), 1))

        return walk, []
    model = with_images("i2v") if images else MODEL
    (folder / "model.json").write_text(json.dumps({"predictor": model.model_dump(mode="json"), "diffusion": {}}))
    (folder / "feature_data.json").write_text(train_data(store).model_dump_json())
    words = ["--mm-data", str(folder / "feature_data.json"), "--mm-model", str(folder / "model.json")]
    return doctor.main, ["data", *words, "--num-workers", "1"]


# Metadata: the annotation file of a data set with one good video.

GOOD = '{"path": "clip.mp4", "cap": "a clip"}'
METADATA: dict[str, bytes] = {
    "invalid JSON line": f'{GOOD}\n{{"path": "clip.mp4", "cap": \n'.encode(),
    "byte order mark": b"\xef\xbb\xbf" + GOOD.encode(),
    "sample listed twice": f"{GOOD}\n{GOOD}\n".encode(),
    "absolute path": b'{"path": "/etc/passwd", "cap": "a"}',
    "path that leaves the folder": b'{"path": "../clip.mp4", "cap": "a"}',
    "NUL in a path": rb'{"path": "clip\u0000.mp4", "cap": "a"}',
    "missing file": b'{"path": "none.mp4", "cap": "a"}',
    "empty list": b"[]",
    "caption that is no UTF-8": b'{"path": "clip.mp4", "cap": "caf\xe9"}',
    "list of captions, one of them empty": b'{"path": "clip.mp4", "cap": ["a", ""]}',
    "caption of 10 MB": b'{"path": "clip.mp4", "cap": "' + b"a" * 10**7 + b'"}',
    "CRLF line ends": f"{GOOD}\r\n\r\n".encode(),
}


def metadata_case(name: str, folder: Path) -> Call:
    write_clip(folder / "clip.mp4")
    annotation = folder / "rows.jsonl"
    annotation.write_bytes(METADATA[name])
    return check_videos(folder, annotation)


# Configuration: data.json of extraction, zero_config.yaml of training.

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 64))
CONFIGS: dict[str, str | Callable[[str], str]] = {
    "unknown key": lambda text: text.replace('"max_width"', '"max_witdh": 48, "max_width"'),
    "wrong type": lambda text: text.replace('"num_frames": 9', '"num_frames": "9"'),
    "key twice": lambda text: text.replace('"num_frames": 9', '"num_frames": 9, "num_frames": 9'),
    "NaN literal": lambda text: text.replace('"num_frames": 9', '"num_frames": NaN'),
    "YAML anchor bomb": BOMB,
    "YAML !!python/object": "zero3_size: !!python/object/apply:os.mkdir [PROOF]\n",
}


def config_case(name: str, folder: Path) -> Call:
    change = CONFIGS[name]
    write_clip(folder / "clip.mp4")
    (folder / "rows.jsonl").write_text(GOOD)
    main, words = check_videos(folder, folder / "rows.jsonl")
    if callable(change):
        data = folder / "mm_data.json"
        data.write_text(change(data.read_text()))
        return main, words
    yaml = folder / "zero_config.yaml"
    yaml.write_text(change.replace("PROOF", str(folder / "ran")))
    (folder / "model.json").write_text(json.dumps({"predictor": MODEL.model_dump(mode="json"), "diffusion": {}}))
    (folder / "feature_data.json").write_text(train_data(folder).model_dump_json())
    return train.main, [
        *("--mm-data", str(folder / "feature_data.json"), "--mm-model", str(folder / "model.json"), "--layerzero"),
        *("--layerzero-config", str(yaml), "--train-iters", "1", "--lr", "1", "--init-from-scratch"),
    ]


GROUPS: dict[str, tuple[Sequence[str], Callable[[str, Path], Call]]] = {
    "video": (list(VIDEOS), video_case),
    "feature": (list(FEATURES), feature_case),
    "metadata": (list(METADATA), metadata_case),
    "configuration": (list(CONFIGS), config_case),
}


def run_groups(home: str, groups: Sequence[str]) -> None:
    """Run the cases of each group, each in a folder of its own below `home/GROUP`."""
    obey_permissions()
    first = Path(home) / "first"
    write_clip(first / "clip.mp4")
    (first / "rows.jsonl").write_text(GOOD)
    run_case(groups[0], "good", check_videos(first, first / "rows.jsonl"), 60)  # starts the fork server
    for group in groups:
        names, make = GROUPS[group]
        for number, name in enumerate(names):
            place = Path(home) / group / str(number)
            place.mkdir(parents=True)
            run_case(group, name, make(name, place), SECONDS)
            assert not list(place.rglob("ran")), f"{name} ran code"


def run_case(group: str, name: str, call: Call, seconds: int) -> None:
    print(json.dumps({"group": group, "name": name}), flush=True)
    told = io.StringIO()
    signal.alarm(seconds)
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = run(*call)
    signal.alarm(0)
    lines = [line for line in told.getvalue().splitlines() if line.startswith("error ")]
    ids = [line.split()[1].rstrip(":") for line in lines if " Fix: " in line]
    print(json.dumps({"group": group, "name": name, "code": code, "ids": ids, "told": told.getvalue()}), flush=True)


def obey_permissions() -> None:
    """Give up the capabilities by which root reads everything (capability.h: 1 DAC_OVERRIDE, 2 DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        for index in range(3):  # effective, permitted, inheritable; of the first 32 capabilities
            sets[index] &= ~0b110
        libc.capset(header, sets)
