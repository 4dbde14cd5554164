"""Words of --lora-target-modules against the counts that other tools publish for the real models."""

import pytest
import torch

from mm.config.model import WAN_1_3B, WAN_14B, WanConfig, of_task
from mm.config.tasks.vace import VACE
from mm.errors import ConfigError
from mm.lora.targets import Sizes, linears_of, target_linears, without_skipped
from mm.wan.model import WanModel

GUIDE = ["ffn.2", "ffn.0", "proj_q", "proj_k", "proj_v", "proj_out"]  # MindSpeed-MM's finetune_lora.sh
DIFFSYNTH = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
DIFFUSERS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def linears(config: WanConfig) -> dict[str, Sizes]:
    with torch.device("meta"):
        return linears_of({name: tuple(p.shape) for name, p in WanModel(config).named_parameters()})


SMALL = linears(WanConfig(hidden_size=8, ffn_dim=12, num_heads=2, num_layers=2))


@pytest.mark.parametrize("words", [GUIDE, DIFFSYNTH, DIFFUSERS], ids=["guide", "diffsynth", "diffusers"])
@pytest.mark.parametrize(
    ("config", "modules", "parameters"), [(WAN_1_3B, 300, 43_745_280), (WAN_14B, 400, 153_354_240)], ids=["1.3B", "14B"]
)
def test_every_spelling_gives_the_published_number_of_modules_and_parameters(words, config, modules, parameters):
    """The numbers are those of DiffSynth-Studio's rank 32."""
    sizes = linears(config)
    targets = target_linears(words, sizes)
    assert len(targets) == len(set(targets)) == modules
    assert sum(32 * (sizes[name][0] + sizes[name][1]) for name in targets) == parameters


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["self_attn.q"], ["blocks.0.self_attn.q", "blocks.1.self_attn.q"]),
        (["attn2.to_out.0"], ["blocks.0.cross_attn.o", "blocks.1.cross_attn.o"]),
        (["cross_attn.proj_out"], ["blocks.0.cross_attn.o", "blocks.1.cross_attn.o"]),
        (["net.2"], ["blocks.0.ffn.2", "blocks.1.ffn.2"]),
        (["blocks.1.self_attn.v"], ["blocks.1.self_attn.v"]),
        (["1.attn1.to_v", "blocks.1.self_attn.v"], ["blocks.1.self_attn.v"]),
        (["ffn.2", "ffn.0"], ["blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.1.ffn.0", "blocks.1.ffn.2"]),
    ],
)
def test_a_word_is_the_end_of_a_name(words, expected):
    assert target_linears(words, SMALL) == expected


def test_bad_words_are_told_together_with_close_ones():
    with pytest.raises(ConfigError) as caught:
        target_linears(["q", "proj_qq", "attn.q", "0", "norm_q", "blocks.7.self_attn.q"], SMALL)
    problems = {problem.message.split("'")[1]: problem for problem in caught.value.problems}
    assert {word: problem.id for word, problem in problems.items()} == {
        "proj_qq": "CFG-100",
        "attn.q": "CFG-100",  # not cut at a dot of self_attn.q
        "0": "CFG-101",
        "norm_q": "CFG-100",
        "blocks.7.self_attn.q": "CFG-100",
    }
    assert "proj_q" in problems["proj_qq"].remedy
    assert "self_attn.q" in problems["attn.q"].remedy
    assert "attn1.to_out.0" not in problems["0"].message and "ffn.0" in problems["0"].message  # native names only


def test_no_words_are_refused():
    with pytest.raises(ConfigError, match="CFG-100"):
        target_linears([], SMALL)


def test_side_blocks_have_adapters_as_blocks_do():
    sizes = linears(of_task(WAN_1_3B, VACE))
    targets = target_linears(GUIDE, sizes)
    assert len(targets) == 300 + 15 * 10
    assert sizes["vace_blocks.14.ffn.0"] == (8960, 1536)
    assert target_linears(DIFFUSERS, sizes) == target_linears(DIFFSYNTH, sizes) == targets
    assert target_linears(["vace_blocks.3.attn1.to_q"], sizes) == ["vace_blocks.3.self_attn.q"]


@pytest.mark.parametrize("word", ["after_proj", "vace_blocks.0.before_proj", "vace_blocks.0.proj_in"])
def test_projections_of_side_blocks_have_no_adapters(word):
    """Every tensor-parallel rank has them whole, and gradients of adapters are added up over the ranks."""
    with pytest.raises(ConfigError, match="CFG-100"):
        target_linears([word], linears(of_task(WAN_1_3B, VACE)))


def test_what_is_left_out_is_what_has_a_word_anywhere_in_its_name():
    every = target_linears(DIFFSYNTH, SMALL)
    left = without_skipped(every, ["cross_attn", "blocks.0."])
    assert left == [name for name in every if name.startswith("blocks.1.") and ".cross_attn." not in name]
    assert len(left) == 6
    assert without_skipped(every, []) == every


@pytest.mark.parametrize(
    ("skipped", "found"),
    [
        (["blocks"], ["--skip blocks leaves no linear"]),
        (["to_q", "head"], ["--skip 'to_q' is in the name of no", "--skip 'head' is in the name of no"]),
        ([""], ["--skip '' is in the name of no"]),
    ],
)
def test_words_that_leave_nothing_in_or_out_are_refused(skipped, found):
    with pytest.raises(ConfigError) as caught:
        without_skipped(target_linears(["q"], SMALL), skipped, "--skip")
    assert [problem.id for problem in caught.value.problems] == ["CFG-427"] * len(found)
    assert all(said in str(caught.value) for said in found)
