"""Process groups: what a process makes, at any size of job, and who is in them."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from mm.config.layout import Layout, even_stages
from mm.config.place import process_place
from mm.doctor.fake_job import fake_job
from mm.parallel.groups import ranks_along
from mm.parallel.mesh import Mesh, build_mesh
from mm.supervise.job import Job

LAYOUTS = {
    "ddp": (Layout(512), 2),
    "ulysses": (Layout(512, cp_size=8, ulysses_size=8), 3),
    "zero": (Layout(512, cp_size=8, ulysses_size=8, zero3_size=64), 5),
    "all": (Layout(512, tp_size=2, sequence_parallel=True, cp_size=8, ulysses_size=4, pp_size=4, vp_size=2,
                   stages=even_stages(40, 4, 2)), 7),
    "double ring": (Layout(512, cp_size=8, window_size=4, send_recv_overlap=True), 5),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "calls"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("rank", [0, 311])
def test_calls_of_a_process_do_not_grow_with_the_job(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, calls: int, rank: int
) -> None:
    made: list[Any] = []
    tagged = dist.distributed_c10d._new_group_with_tag

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args[0])
        return tagged(*args, **kwargs)

    monkeypatch.setattr(dist.distributed_c10d, "_new_group_with_tag", counted)
    with fake_job(rank, layout.world_size), build_mesh(layout, 1, "cpu") as mesh:
        assert len(made) == calls
        assert [len(ranks) for ranks in made] == [size for _, size in mesh.made]
        assert all(rank in ranks for ranks in made)


@pytest.mark.parametrize("axes", [["tp"], ["cp"], ["dp", "cp"], ["pp"], ["pp", "tp"], [], ["pp", "dp", "cp", "tp"]])
def test_groups_are_the_ranks_that_differ_along_the_axes(axes: list[str]) -> None:
    """Counted out from rank = tp + TP * (cp + CP * (dp + DP * pp))."""
    sizes = {"pp": 2, "dp": 3, "cp": 4, "tp": 2}
    places = dict(enumerate(itertools.product(*map(range, sizes.values()))))
    expected: dict[tuple[int, ...], list[int]] = {}
    for rank, coordinates in places.items():
        fixed = tuple(at for axis, at in zip(sizes, coordinates, strict=True) if axis not in axes)
        expected.setdefault(fixed, []).append(rank)
    assert sorted(ranks_along(sizes, axes)) == sorted(expected.values())


EIGHT = {
    "tp2-cp2-pp2": Layout(8, tp_size=2, cp_size=2, pp_size=2, stages=((1, 1),)),
    "zero": Layout(8, cp_size=2, zero3_size=4),
    "usp": Layout(8, cp_size=4, ulysses_size=2, send_recv_overlap=True),
}


def members(mesh: Mesh) -> dict[str, tuple[list[int], float]]:
    """Who is in this rank's groups, and the sum of their ranks, added up by themselves."""
    groups = {"tp": mesh.groups.tp, "cp": mesh.groups.cp, "dp_cp": mesh.groups.dp_cp, "pp": mesh.groups.pp,
              "pp backward": mesh.pp_backward, "ulysses": mesh.context.ulysses, "ring": mesh.context.ring}  # fmt: skip
    if mesh.zero is not None:
        groups |= {axis: mesh.zero[axis].get_group() for axis in ("replicate", "shard")}
    found = {}
    for name, group in groups.items():
        if group is not None:
            total = torch.tensor([float(dist.get_rank())])
            dist.all_reduce(total, group=group)
            found[name] = (dist.get_process_group_ranks(group), total.item())
    return found


def meshes() -> list[dict[str, tuple[list[int], float]]]:
    with Job(process_place(), "gloo", torch.device("cpu"), 2):
        found = []
        for layout in EIGHT.values():
            with build_mesh(layout, 2, "cpu") as mesh:
                found.append(members(mesh))
        return found


def test_real_groups_have_the_right_members() -> None:
    ranks = run_ranks(8, meshes, timeout_s=200)
    plain, zero, usp = ([rank[number] for rank in ranks] for number in range(3))
    assert [rank["tp"][0] for rank in plain[:4]] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert plain[5]["cp"][0] == plain[5]["dp_cp"][0] == [5, 7]
    assert plain[6]["pp"][0] == plain[6]["pp backward"][0] == [2, 6]
    assert zero[5]["shard"][0] == [4, 5, 6, 7] and zero[5]["replicate"][0] == [1, 5]
    assert zero[5]["dp_cp"][0] == list(range(8)) and zero[5]["tp"][0] == [5]
    assert usp[6]["ulysses"][0] == [6, 7] and usp[6]["ring"][0] == [4, 6] and usp[6]["cp"][0] == [4, 5, 6, 7]
    for found in (*plain, *zero, *usp):
        assert all(total == sum(group) for group, total in found.values())
