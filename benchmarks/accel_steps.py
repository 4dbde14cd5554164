"""Training steps on an accelerator: the real engine by recomputation mode, and diffusers doing the same work."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accel_bench import Bench, Timing, normal, relative, require, weight
from modes import MODES, Mode
from results import Result, Target
from torch import Tensor, nn

from mm.activation.host_pool import StepShape, make_offloader
from mm.activation.recompute import block_runner
from mm.config.diffusion import DiffusionConfig
from mm.config.model import WAN_1_3B, WAN_14B, WanConfig
from mm.data.loader import FeatureBatch
from mm.diffusion.flow import FlowMatching
from mm.lora.layer import Adapted
from mm.lora.plan import LoRAPlan
from mm.lora.targets import linears_of
from mm.optim.make import make_optimizer
from mm.optim.settings import UpdateSettings
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.placement import whole_shapes
from mm.train.flops import train_flops
from mm.train.step import train_step
from mm.wan.inputs import ModelInputs
from mm.wan.layers import BlockRunner, ModuleFactories
from mm.wan.model import WanModel
from mm.wan.patches import token_grid

Latent = tuple[int, int, int]

SETTINGS = UpdateSettings(
    lr=1e-5, min_lr=0.0, lr_decay_style="constant", lr_warmup_init=0.0, warmup_samples=0, decay_samples=1_000_000,
    weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=1.0, fused=True,
)  # fmt: skip
FLOPS = "mm.train.flops.train_flops, 3 forwards; HFU adds what is recomputed. Peak: dense bf16 by data sheet."
VELOCITY_BOUND, GRADIENT_BOUND = 2e-2, 5e-2  # of bf16 against fp32: largest error / largest value; error / length


@dataclass(frozen=True)
class Work:
    """A model and the latents of one sample, and the r of adapters that are trained instead of the model.

    `small` is the same width with fewer blocks and tokens, to be checked.
    """

    wan: WanConfig
    latent: Latent
    lora_r: int | None = None

    @property
    def tokens(self) -> int:
        """Of a sample."""
        frames, rows, columns = token_grid(self.latent, self.wan.patch_size)
        return frames * rows * columns

    @property
    def small(self) -> Work:
        """Two blocks and a few frames of a quarter of the picture."""
        frames, height, width = self.latent
        few = self.wan.model_copy(update={"num_layers": 2})
        return Work(few, (min(frames, 5), height // 2, width // 2), self.lora_r)

    @property
    def lora(self) -> LoRAPlan | None:
        """Adapters of every linear of the blocks."""
        if self.lora_r is None:
            return None
        linears = linears_of(whole_shapes(self.wan))
        return LoRAPlan(linears, dict.fromkeys(linears, Adapted(self.lora_r, float(self.lora_r))), None)

    @property
    def shapes(self) -> dict[str, Any]:
        """For the result."""
        wan = self.wan
        return {"D": wan.hidden_size, "f": wan.ffn_dim, "heads": wan.num_heads, "layers": wan.num_layers,
                "latent": self.latent, "s": self.tokens, "text": wan.text_len, "dtype": "bf16",
                **({} if self.lora_r is None else {"LoRA r": self.lora_r})}  # fmt: skip

    def sample(self, draw: int) -> FeatureBatch:
        """Random features in host memory."""
        host = torch.device("cpu")
        return FeatureBatch(
            latents=normal((1, self.wan.in_dim, *self.latent), "latents", host),
            text=normal((1, self.wan.text_len, self.wan.text_dim), "text", host),
            sample=["random"],
            draw=[draw],
            features={},
        )


TINY = Work(
    WanConfig(text_dim=16, text_len=8, hidden_size=64, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=16), (2, 8, 8)
)
SMALL_MODEL = Work(WAN_1_3B, (21, 60, 104))  # 480x832, 81 frames
LARGE_MODEL = Work(WAN_14B.model_copy(update={"num_layers": 8}), (21, 60, 104))
LORA = Work(WAN_14B, (21, 60, 104), lora_r=64)


def runner(bench: Bench, work: Work, mode: Mode) -> BlockRunner:
    """The blocks' runner of a mode, with its host memory."""
    shape = StepShape(1, work.tokens, 1, torch.bfloat16)
    offloader = make_offloader(mode.recompute, work.wan, bench.mesh, bench.backend, shape)
    return block_runner(mode.recompute, bench.keep(offloader))


def gradients(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and all gradients in one vector, of the mean squared error."""
    velocity = model(ModelInputs(*inputs))
    (velocity.float() - target).square().mean().backward()
    return velocity.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def check(bench: Bench, work: Work, mode: Mode) -> str:
    """The mode in bf16 against the plain model in fp32, on fresh random numbers; ends the program when they differ."""
    small, device = work.small, bench.device
    inputs = (normal((1, small.wan.in_dim, *small.latent), "noisy", device), torch.full((1,), 500.0, device=device),
              normal((1, small.wan.text_len, small.wan.text_dim), "text", device))  # fmt: skip
    target = normal((1, small.wan.out_dim, *small.latent), "target", device)
    found = []
    for dtype, parts in (
        (torch.float32, ModuleFactories()),
        (torch.bfloat16, ModuleFactories(run_blocks=runner(bench, small, mode))),
    ):
        with torch.device("meta"):
            model = WanModel(small.wan, parts)
        model.to_precision(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weight(name, parameter.shape, device).to(torch.bfloat16))  # the same to both
        found.append(gradients(model, inputs, target))
    (velocity, gradient), (low_velocity, low_gradient) = found
    off = relative(low_velocity, velocity), float((low_gradient - gradient).norm() / gradient.norm())
    require("the velocity", off[0], VELOCITY_BOUND)
    require("the gradient", off[1], GRADIENT_BOUND)
    return f"{off[0]:.0e}, {off[1]:.0e}"


def engine_step(bench: Bench, work: Work, mode: Mode) -> Callable[[], object]:
    """One step of the engine, with fresh noise each time."""
    options = DataParallelOptions(use_distributed_optimizer=True)
    value_of = partial(weight, device=bench.device)
    lora = work.lora
    parallel = apply(
        work.wan, bench.mesh, bench.backend, options, torch.bfloat16, value_of, run_blocks=runner(bench, work, mode),
        extension=None if lora is None else lora.extension(),
    )  # fmt: skip
    optimizer, flow, draws = make_optimizer(parallel, SETTINGS), FlowMatching(DiffusionConfig()), itertools.count()
    batch = work.sample(0)

    def step() -> object:
        batches = [FeatureBatch({**batch, "draw": [next(draws)]})]
        return train_step(parallel, optimizer, flow, batches, samples=1, seed=0)

    return step


def diffusers_step(bench: Bench, work: Work) -> Callable[[], object]:
    """The same work with diffusers' model and its gradient checkpointing, clipping and torch's fused AdamW.

    Parameters and moments are bf16, except what diffusers keeps in fp32; the engine's master weights and moments are
    fp32, which is more work.
    """
    from diffusers import WanTransformer3DModel

    wan = work.wan
    with torch.device(bench.device):
        model = WanTransformer3DModel(
            patch_size=wan.patch_size, num_attention_heads=wan.num_heads, attention_head_dim=wan.head_dim,
            in_channels=wan.in_dim, out_channels=wan.out_dim, text_dim=wan.text_dim, freq_dim=wan.freq_dim,
            ffn_dim=wan.ffn_dim, num_layers=wan.num_layers,
        )  # fmt: skip
    for name, parameter in model.named_parameters():  # what its from_pretrained does for a bf16 model
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    model.train()
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    flow, draws, batch = FlowMatching(DiffusionConfig()), itertools.count(), work.sample(0)

    def step() -> object:
        sample, draw, device = batch["sample"], [next(draws)], bench.device
        sigma, timestep, loss_weight = flow.draw_timesteps(0, sample, draw)
        noise = flow.draw_noise(0, sample, draw, batch["latents"].shape[1:])
        noisy = flow.noisy(batch["latents"], noise, sigma).to(device, torch.bfloat16)
        target = flow.target(batch["latents"], noise).to(device)
        velocity = model(noisy, timestep.to(device), batch["text"].to(device, torch.bfloat16)).sample
        loss, _ = flow.loss(velocity, target, loss_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def columns(bench: Bench, work: Work, mode: Mode, timing: Timing) -> dict[str, Any]:
    """The figures of a timed step."""
    wan, tokens = work.wan, work.tokens
    forward, attention = train_flops(wan, tokens) // 3, 4 * tokens**2 * wan.hidden_size * wan.num_layers
    again = (mode.other_runs - 1) * (forward - attention) + (mode.attention_runs - 1) * attention
    model = train_flops(wan, tokens, trained_share=0.0 if work.lora_r is not None else 1.0)
    rates = {"MFU": model / timing.median / 1e12, "HFU": (model + again) / timing.median / 1e12}
    shares = {} if bench.peak_tflops is None else {n: f"{rate / bench.peak_tflops:.1%}" for n, rate in rates.items()}
    return {"s, median": timing.median, "least": timing.least, "most": timing.most, "steps": timing.count,
            "model TFLOP/s": rates["MFU"], **shares, **bench.memory()}  # fmt: skip


def step_line(bench: Bench, work: Work, name: str) -> dict[str, Any]:
    """Check and time one mode."""
    mode = MODES[name]

    def run() -> dict[str, Any]:
        checked = check(bench, work, mode)
        bench.free()
        timing = bench.seconds(engine_step(bench, work, mode))
        return {"bf16 - fp32": checked, **bench.figures(columns(bench, work, mode, timing))}

    return bench.guarded({"mode": name}, run)


def steps(bench: Bench, title: str, work: Work, modes: Sequence[str], bounds: dict[tuple[str, str], float]) -> Result:
    """A table of modes, with targets by (mode, column)."""
    work = replace(TINY, lora_r=None if work.lora_r is None else 2) if bench.tiny else work
    result = bench.result(title, work.shapes, FLOPS)
    result.rows = [step_line(bench, work, mode) for mode in modes]
    if not bench.tiny:
        lines = {line["mode"]: line for line in result.rows}
        result.targets = [Target(f"{m}: {c}", lines[m].get(c), bound) for (m, c), bound in bounds.items()]
    return result


def a1(bench: Bench) -> Result:
    """1.3B, full recomputation."""
    return steps(bench, "a1: step of 1.3B, full recomputation", SMALL_MODEL, ["full"],
                 {("full", "s, median"): 2.3, ("full", "GB allocated"): 33.0})  # fmt: skip


def a2(bench: Bench) -> Result:
    """1.3B, attention kept, on the device and offloaded."""
    kept, offloaded = "keep O", "keep O, offloaded"
    result = steps(bench, "a2: step of 1.3B, attention kept", SMALL_MODEL, [kept, offloaded],
                   {(kept, "s, median"): 1.95})  # fmt: skip
    return _offload_target(bench, result)


def a3(bench: Bench) -> Result:
    """1.3B, nothing recomputed."""
    return steps(bench, "a3: step of 1.3B, no recomputation", SMALL_MODEL, ["none"],
                 {("none", "s, median"): 1.8, ("none", "GB allocated"): 115.0})  # fmt: skip


def b1(bench: Bench) -> Result:
    """LoRA of 14B, full recomputation."""
    return steps(bench, "b1: LoRA step of 14B, full recomputation", LORA, ["full"],
                 {("full", "s, median"): 11.5, ("full", "GB allocated"): 60.0})  # fmt: skip


def b2(bench: Bench) -> Result:
    """LoRA of 14B, attention kept, on the device and offloaded."""
    kept, offloaded = "keep O", "keep O, offloaded"
    bounds = {(kept, "s, median"): 9.9, (offloaded, "GB allocated"): 60.0}
    return _offload_target(bench, steps(bench, "b2: LoRA step of 14B, attention kept", LORA, [kept, offloaded], bounds))


def _offload_target(bench: Bench, result: Result) -> Result:
    """Add how much slower the second row, the offloaded one, may be."""
    whole, offloaded = (line.get("s, median") for line in result.rows)
    if not bench.tiny:
        slower = None if whole is None or offloaded is None else offloaded / whole
        result.targets.append(Target("time offloaded / not", slower, 1.02))
    return result


def c1(bench: Bench) -> Result:
    """Eight blocks of 14B by mode."""
    return steps(bench, "c1: step of eight blocks of 14B", LARGE_MODEL, ["none", "keep O", "full"],
                 {("none", "s, median"): 2.0, ("keep O", "s, median"): 2.25, ("full", "s, median"): 2.55})  # fmt: skip


def e1(bench: Bench) -> Result:
    """diffusers with gradient checkpointing beside the engine with full recomputation."""
    title = "e1: step of 1.3B beside diffusers'"
    if importlib.util.find_spec("diffusers") is None:
        result = bench.result(title, {})
        result.notes.append("Left out: diffusers is not installed.")
        return result
    result = steps(bench, title, SMALL_MODEL, ["full"], {})
    work = TINY if bench.tiny else SMALL_MODEL

    def run() -> dict[str, Any]:
        timing = bench.seconds(diffusers_step(bench, work))
        return bench.figures(columns(bench, work, MODES["full"], timing))

    result.rows.append(bench.guarded({"mode": "diffusers, gradient checkpointing"}, run))
    if not bench.tiny:
        ours, theirs = (line.get("s, median") for line in result.rows)
        speedup = None if ours is None or theirs is None else theirs / ours
        result.targets.append(Target("diffusers' time / ours", speedup, 1.5, at_most=False))
    result.notes.append("diffusers' parameters and moments are bf16 without masters; the engine's masters are fp32.")
    return result
