"""The loss of motion sends what the formula says, and nothing else of a step changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import WAN
from test_parity import PLAIN, layout, pp, ring, sp, ulysses

from mm.doctor import formulas
from mm.doctor.dry_run import DryRunJob, dry_run


@pytest.mark.parametrize(
    ("degrees", "packed"),
    [
        pytest.param(sp(2) | ring(2), 2, id="tp2sp-ring2-packed", marks=pytest.mark.nightly),
        *(
            pytest.param(degrees, packed, id=f"{name}{'-packed' if packed else ''}", marks=pytest.mark.nightly)
            for name, degrees, packed in (
                ("tp2sp-ring2", sp(2) | ring(2), None),
                ("ulysses2-pp2", ulysses(2) | pp(2), None),
                ("ulysses2-pp2", ulysses(2) | pp(2), 2),
                ("tp2", {"tp_size": 2}, None),
                ("tp2", {"tp_size": 2}, 2),
            )
        ),
    ],
)
def test_a_step_sends_what_the_formula_says(degrees: dict[str, Any], packed: int | None) -> None:
    wan = WAN.model_copy(update={"num_layers": 4})
    plain = DryRunJob(wan, layout(4, **degrees), PLAIN, None, torch.bfloat16, (3, 6, 10), 1, 2, packed=packed)
    for rank in (0, 3):  # with stages the first and the last
        before, after = (dry_run(job, rank) for job in (plain, replace(plain, motion_loss_ratio=0.25)))
        last = plain.layout.pp_size == 1 or rank == 3
        width = wan.out_dim * 4
        expected = formulas.motion(plain.layout, after.rank_tokens, width, 2) if last else {}
        assert bool(expected) == (last and degrees != {"tp_size": 2})
        for key in before.traffic.keys() | after.traffic.keys():
            nothing = formulas.CallTotals(0, 0.0)
            old, new = before.traffic.get(key, nothing), after.traffic.get(key, nothing)
            more = expected.get(key, nothing)
            assert new.calls - old.calls == more.calls, key
            assert new.bytes - old.bytes == pytest.approx(more.bytes), key
