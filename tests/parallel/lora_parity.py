"""LoRA training three times: on a layout of ranks, as a plain loop over the single-device model, and as the same loop
over PEFT on diffusers' transformer.

All see the same samples, noise, base weights and adapters. The plain loops use no part of mm.parallel but the function
that adds adapters to a model; PEFT's uses nothing of the model either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from parity import Row, WholeTrace, compare, gather, micro_batches
from peft import LoraConfig, inject_adapter_in_model
from published_names import diffusers_to_native
from torch import Tensor

from mm.activation.host_pool import make_offloader
from mm.activation.recompute import block_runner
from mm.config.diffusion import DiffusionConfig
from mm.device.backend import Backend
from mm.diffusion.flow import FlowMatching
from mm.doctor.parity import SEED, SETTINGS, STEPS, RelativeErrors, value_of
from mm.lora.layer import Adapted, initial_adapter_value
from mm.lora.low_bit import LowBit, quantise
from mm.lora.plan import LoRAPlan
from mm.lora.targets import linears_of, target_linears
from mm.optim.make import make_optimizer
from mm.optim.step_statistics import gather_statistics
from mm.parallel.apply import apply
from mm.parallel.mesh import Mesh, build_mesh
from mm.parallel.placement import whole_shapes
from mm.train.step import compute_gradients
from mm.wan.inputs import ModelInputs
from mm.wan.model import WanModel
from mm.wan.names import native_to_diffusers

RANK, ALPHA = 4, 6.0
ALL = ("q", "k", "v", "o", "ffn.0", "ffn.2")
FIRST = ("blocks.0.self_attn.q", "blocks.0.cross_attn.o")
IMAGES = ("k_img", "v_img", "self_attn.v")
BLOCKS = ("blocks.", "vace_blocks.")
LAST = ("blocks.{last}.cross_attn.k", "blocks.{last}.ffn.2")


@dataclass(frozen=True)
class LoRARow:
    """One row: a layout, the words of its targets ({last} is the last block), and how the base is kept."""

    row: Row
    words: tuple[str, ...] = ALL
    base_dtype: LowBit | None = None

    @property
    def id(self) -> str:
        which = {ALL: "all", FIRST: "first", LAST: "last", IMAGES: "images"}[self.words]
        plan = self.row.recompute
        how = [f"recompute{plan.full_layers}-{plan.keep_layers}" + "-offload" * plan.offload] if plan else []
        parts = [self.row.id, which, *how, *(["compiled"] if self.row.compiled else []), self.base_dtype or ""]
        return "-".join(part for part in parts if part)

    @property
    def targets(self) -> list[str]:
        linears = linears_of(whole_shapes(self.row.wan))
        return target_linears([word.format(last=self.row.wan.num_layers - 1) for word in self.words], linears)

    @property
    def plan(self) -> LoRAPlan:
        how = dict.fromkeys(self.targets, Adapted(RANK, ALPHA))
        return LoRAPlan(linears_of(whole_shapes(self.row.wan)), how, self.base_dtype)


def start(name: str, shape: tuple[int, ...], base_dtype: LowBit | None) -> Tensor:
    """Values of the base and of adapters; B is not zero, which would leave A without gradients."""
    module, _, kind = name.rpartition(".")
    if kind == "lora_B":
        return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(len(name) + shape[0]))
    if kind == "lora_A":
        return initial_adapter_value(name, shape, SEED)
    if base_dtype is None or not name.startswith(BLOCKS) or kind == "bias" or not _is_matrix(name, shape):
        return value_of(name, shape)
    weight = f"{module}.weight"
    quantised, scale = quantise(value_of(weight, _SHAPES[weight]), base_dtype)
    return scale if kind == "weight_scale" else quantised


_SHAPES: dict[str, tuple[int, ...]] = {}


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith("weight_scale") or (name.endswith("weight") and len(shape) == 2)


def plain_run(row: LoRARow) -> WholeTrace:
    """The reference of the layouts: the single-device model."""
    with torch.device("meta"):
        model = WanModel(row.row.wan)
    row.plan.extension().prepare(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start(name, tuple(parameter.shape), row.base_dtype))
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return plain_loop(model, named, row.row)


def peft_run(row: LoRARow) -> WholeTrace:
    """The reference of the reference: what others make of the same numbers."""
    wan = row.row.wan
    model = WanTransformer3DModel(
        patch_size=wan.patch_size, num_attention_heads=wan.num_heads, attention_head_dim=wan.head_dim,
        in_channels=wan.in_dim, out_channels=wan.out_dim, text_dim=wan.text_dim, freq_dim=wan.freq_dim,
        ffn_dim=wan.ffn_dim, num_layers=wan.num_layers,
    )  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        native, shape = diffusers_to_native(name), tuple(value.shape)
        found = start(native, shape, row.base_dtype)
        if row.base_dtype is not None and native.startswith(BLOCKS) and _is_matrix(native, shape):
            found = found.float() * start(f"{native}_scale", shape[:1], row.base_dtype).unsqueeze(1)
        state[name] = found
    model.load_state_dict(state)
    modules = {native_to_diffusers(f"{name}.weight").removesuffix(".weight"): name for name in row.targets}
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(modules))
    inject_adapter_in_model(config, model)
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, half = name.removesuffix(".default.weight").rsplit(".", 1)
            named[f"{modules[module]}.{half}"] = parameter
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start(name, tuple(parameter.shape), None))
    return plain_loop(lambda of: model(of.latents, of.timestep, of.text, return_dict=False)[0], named, row.row)


def plain_loop(model: Callable[..., Tensor], named: dict[str, Any], row: Row) -> WholeTrace:
    flow = FlowMatching(DiffusionConfig())
    optimizer = torch.optim.AdamW(
        named.values(), lr=SETTINGS.lr, betas=(0.9, 0.95), eps=SETTINGS.adam_eps, weight_decay=SETTINGS.weight_decay
    )
    trace = WholeTrace()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.lr - (SETTINGS.lr - SETTINGS.min_lr) * step / STEPS
        optimizer.zero_grad()
        losses = []
        for sample in row.case.global_batch(step):
            sigma, timestep, weight = flow.draw_timesteps(SEED, sample["sample"], sample["draw"])
            noise = flow.draw_noise(SEED, sample["sample"], sample["draw"], sample["latents"].shape[1:])
            noisy = flow.noisy(sample["latents"], noise, sigma)
            velocity = model(ModelInputs(noisy, timestep, sample["text"], sample["features"]))
            losses.append(((velocity - (noise - sample["latents"])).square().mean() * weight[0]) / row.case.samples)
            losses[-1].backward()
        trace.losses.append(float(torch.stack([loss.detach() for loss in losses]).double().sum()))
        trace.gradients.append({name: p.grad.clone() for name, p in named.items()})
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), SETTINGS.clip_grad)))
        optimizer.step()
    trace.weights = {name: p.detach().clone() for name, p in named.items()}
    return trace


def parallel_run(lora: LoRARow, mesh: Mesh, backend: Backend) -> WholeTrace:
    """The same on a layout."""
    row = lora.row
    offloader = make_offloader(row.recompute, row.wan, mesh, backend, row.case.step_shape)
    parallel = apply(
        row.wan, mesh, backend, row.options, torch.float32,
        lambda name, shape: start(name, shape, lora.base_dtype), zero=row.zero,
        run_blocks=block_runner(row.recompute, offloader, backend.model_code),
        compiled_for=2 if row.compiled else None, extension=lora.plan.extension(),
    )  # fmt: skip
    frozen = {name: _bytes(p) for name, p in parallel.all_parameters().items() if not p.requires_grad}
    optimizer = make_optimizer(parallel, SETTINGS)
    flow = FlowMatching(DiffusionConfig())
    trace = WholeTrace()
    for step in range(STEPS):
        mine = micro_batches(row, row.case.global_batch(step), mesh)
        losses = compute_gradients(parallel, flow, mine, SEED, row.case.counts)
        optimizer.reduce_gradients()
        trace.gradients.append(gather(optimizer, "gradient"))
        statistics = gather_statistics(parallel, optimizer, losses, samples=row.case.samples)
        trace.losses.append(statistics.loss)
        trace.norms.append(statistics.grad_norm)
        optimizer.update(statistics.grad_norm, row.case.samples)
    trace.weights = gather(optimizer, "master")
    for name, parameter in parallel.all_parameters().items():
        if name in frozen:
            assert parameter.grad is None and not hasattr(parameter, "main_grad"), name
            assert torch.equal(_bytes(parameter), frozen[name]), f"{name} changed"
    return trace


def _bytes(parameter: Tensor) -> Tensor:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach().contiguous().view(-1).view(torch.uint8).clone()


def against_peft(row: LoRARow) -> RelativeErrors:
    """How far the reference of the layouts is from PEFT on diffusers' model."""
    _SHAPES.update(whole_shapes(row.row.wan))
    return compare(plain_run(row), peft_run(row))


def run_rows(rows: list[LoRARow], backend: Backend) -> dict[str, RelativeErrors]:
    """Every row on the ranks of one job; the results are rank 0's."""
    references: dict[Any, WholeTrace] = {}
    results = {}
    for row in rows:
        _SHAPES.update(whole_shapes(row.row.wan))
        with build_mesh(row.row.layout, 2, "cpu") as mesh:
            trace = parallel_run(row, mesh, backend)
        if dist.get_rank() == 0:
            reference = row.row.reference, row.words, row.base_dtype
            if reference not in references:
                references[reference] = plain_run(row)
            results[row.id] = compare(trace, references[reference])
    return results
