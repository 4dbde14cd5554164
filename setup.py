"""Package definition: pinned ranges; constraints.txt fixes the versions that the tests ran with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

S3 = ["s3fs>=2025.3", "tenacity>=9,<10"]
UI = ["gradio>=6.20,<7"]

[VERSION] = re.findall(r'^__version__ = "(.+)"$', (Path(__file__).parent / "mm" / "__init__.py").read_text(), re.M)

setup(
    name="mm-wan",
    version=VERSION,
    description="Parallel training of Wan2.1 video diffusion transformers on megatron-core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["mm", "mm.*"]),
    package_data={"mm": ["py.typed"], "mm.demo": ["assets/*"], "mm.look": ["*.html"]},
    entry_points={"console_scripts": ["mm = mm.cli.main:process"]},
    install_requires=[
        "torch>=2.13.0,<2.14",
        "megatron-core==0.16.1",
        "diffusers>=0.41,<0.43",
        "fsspec>=2025.3",
        "transformers>=5.20,<6",
        "tokenizers>=0.22",
        "safetensors>=0.8,<0.9",
        "einops>=0.8,<0.9",
        "numpy>=2.0,<3",
        "pydantic>=2.10,<3",
        "pyyaml>=6,<7",
        "av>=15",
        "decord==0.6.0; platform_machine == 'x86_64' and sys_platform == 'linux'",
        "ftfy>=6.1,<7",
        "tqdm>=4.66",
        "tabulate>=0.9",
        "psutil>=6",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "pillow>=10",
        "pyarrow>=23",
        "tensorboard>=2.17",
        "xxhash>=3.4,<5",
    ],
    # triton: its interpreter runs the CUDA kernels on the CPU. A range, because a CUDA build of torch brings triton and
    # fixes its version (torch 2.13.0 from PyPI: 3.7.1), and a CPU build brings none. The kernels also compile with 3.6,
    # whose interpreter stops at numpy 2.4.
    # accelerate, peft: diffusers needs them to load a transformer of its own from disk and a LoRA, which tests compare
    # with. lion-pytorch: the same update as ours, which tests compare with bit for bit. moto with flask: an S3 server.
    # webdataset: reads what is exported for it. playwright: drives the Chromium that is installed, for the page
    extras_require={
        "s3": S3,
        "ui": UI,
        "test": [
            *S3,
            *UI,
            "accelerate>=1.10,<2",
            "flask>=3,<4",
            "flask-cors>=5",
            "lion-pytorch==0.2.5",
            "moto[s3]>=5.1,<6",
            "peft>=0.17,<0.22",
            "playwright>=1.50",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff==0.17.5",
            "webdataset>=1,<2",
            "mypy==2.4.1",
            "triton>=3.7,<3.10; platform_machine == 'x86_64' and sys_platform == 'linux'",
        ],
    },
)
