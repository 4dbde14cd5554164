"""inference_model.json: what the shipped files say, what flags override, and what is refused."""

import hashlib
import json
import shlex
from pathlib import Path

import pytest
from mindspeed_alone import load_generation

from mm.config.flags import parse_flags
from mm.config.model import WAN_1_3B, WAN_14B, WAN_FLF2V_14B, WAN_I2V_1_3B, WAN_I2V_14B
from mm.config.run.generation import latent_size
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.inference_retired import RETIRED_GENERATE_FLAGS
from mm.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples/wan2.1"


def shipped(size="1.3b"):
    return json.loads((EXAMPLES / size / "t2v/inference_model.json").read_text())


def load(tmp_path, values, **flags):
    path = tmp_path / "inference_model.json"
    path.write_text(json.dumps(values))
    return load_generation(GenerateFlags(mm_model=str(path), **{"load": "weights", **flags}))


def refused(tmp_path, values, **flags):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, values, **flags)
    return caught.value.problems


# Of sample_neg_prompt in wan/configs/shared_config.py of the Wan2.1 release.
NEGATIVE_LENGTH, NEGATIVE_SHA256 = 137, "ce96e0324e4b54ce"


@pytest.mark.parametrize(
    ("script", "shape", "size"),
    [
        ("1.3b/t2v", WAN_1_3B, (81, 480, 832)),
        ("14b/t2v", WAN_14B, (81, 480, 832)),
        ("1.3b/i2v", WAN_I2V_1_3B, (81, 480, 832)),
        ("14b/i2v", WAN_I2V_14B, (81, 720, 1280)),
        ("14b/flf2v", WAN_FLF2V_14B, (81, 720, 1280)),
        ("1.3b/v2v", WAN_1_3B, (49, 480, 832)),
        ("14b/v2v", WAN_14B, (49, 480, 832)),
    ],
)
def test_shipped_files(script, shape, size):
    flags = GenerateFlags(mm_model=str(EXAMPLES / script / "inference_model.json"), load="weights")
    config = load_generation(flags)
    assert config.wan == shape
    assert config.task == script.split("/")[1]
    assert config.output.size == size
    assert latent_size(size, 8) == ((size[0] + 3) // 4, size[1] // 8, size[2] // 8)
    assert (config.sampling.solver, config.sampling.steps, config.output.fps) == ("unipc", 50, 16)
    shift, guidance = {"flf2v": (16.0, 5.5)}.get(config.task, (5.0 if size[1] == 720 else 3.0, 5.0))
    assert (config.sampling.shift, config.sampling.guidance_scale) == (shift, guidance)
    before, common = config.negative_text[:-NEGATIVE_LENGTH], config.negative_text[-NEGATIVE_LENGTH:]
    assert before == {"i2v": "镜头晃动，", "flf2v": "镜头切换，镜头晃动，"}.get(config.task, "")
    assert hashlib.sha256(common.encode()).hexdigest().startswith(NEGATIVE_SHA256)
    for listed in (config.inputs.prompts, config.inputs.images, config.inputs.videos):
        assert listed is None or (EXAMPLES.parents[1] / listed).is_file()


@pytest.mark.parametrize("section", [{"from_pretrained": "file", "boundary": 0.8, "guidance_scale": 3.0}, None, "none"])
def test_the_second_expert_is_named_by_a_flag(tmp_path, section):
    """Over the file's, whose other values stay, and without a section as well."""
    values = shipped() | ({} if section == "none" else {"low_noise": section})
    low = load(tmp_path, values, low_noise="flag").model.low_noise
    boundary, guidance = (0.8, 3.0) if isinstance(section, dict) else (None, None)
    assert (low.weights, low.boundary, low.guidance_scale) == ("flag", boundary, guidance)
    (problem,) = refused(tmp_path, shipped() | {"low_noise": ["x"]}, low_noise="flag")
    assert (problem.id, "low_noise" in problem.message) == ("CFG-005", True)


def test_flags_win_over_the_file(tmp_path):
    words = shlex.split(
        "--mm-model x --load w --prompt p.txt --negative-prompt= --save-path out --seed 7 --fps 8 --input-size 9 64 96 "
        "--sample-solver euler --num-inference-steps 3 --flow-shift 8 --guidance-scale 1"
    )
    values = shipped()
    del values["diffusion"]["solver_order"], values["diffusion"]["solver_type"]
    flags = parse_flags(GenerateFlags, words, program="generate")
    config = load(tmp_path, values, **flags.model_dump(exclude={"mm_model"}))
    assert (config.inputs.prompts, config.negative_text, config.output.path) == ("p.txt", "", "out")
    assert (config.generation.seed, config.output.fps, latent_size(config.output.size, 8)) == (7, 8, (3, 8, 12))
    sampling = config.sampling
    assert (sampling.solver, sampling.steps) == ("euler", 3)
    assert (sampling.shift, sampling.guidance_scale) == (8.0, 1.0)
    assert config.model.weights == "w"


def test_flags_can_supply_what_the_file_lacks(tmp_path):
    values = shipped()
    del values["prompt"], values["save_path"], values["pipeline_config"]
    assert [problem.id for problem in refused(tmp_path, values)] == ["CFG-004"] * 3
    config = load(tmp_path, values, prompt="p", save_path="s", input_size=[5, 32, 32])
    assert latent_size(config.output.size, 8) == (2, 4, 4)


def test_weights_from_the_file_or_the_flag(tmp_path):
    values = shipped()
    assert [problem.id for problem in refused(tmp_path, values, load=None)] == ["CFG-062"]
    values["predictor"]["from_pretrained"] = "here"
    assert load(tmp_path, values, load=None).model.weights == "here"
    assert load(tmp_path, values, load="there").model.weights == "there"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ([80, 480, 832], [("CFG-060", "Use 77 or 81.")]),
        ([0, 480, 832], [("CFG-060", "Use 1 or 5.")]),
        ([81, 481, 832], [("CFG-061", "Use 480 or 496.")]),
        ([81, 480, 8], [("CFG-061", "Use 16 or 32.")]),
        (
            [82, 470, 840],
            [("CFG-060", "Use 81 or 85."), ("CFG-061", "Use 464 or 480."), ("CFG-061", "Use 832 or 848.")],
        ),
    ],
)
def test_sizes_that_cannot_work(tmp_path, size, expected):
    problems = refused(tmp_path, shipped(), input_size=size)
    assert [(problem.id, problem.remedy) for problem in problems] == expected


def test_keys_of_the_reference_system_get_their_own_remedy(tmp_path):
    values = shipped()
    values |= {"dtype": "fp32", "device": "cpu", "frame_interval": 2}
    values["diffusion"] |= {"use_karras_sigmas": True, "shift": 5.0}
    problems = refused(tmp_path, values)
    assert [problem.id for problem in problems] == ["CFG-008"] * 5
    by_key = {problem.message.split('"')[1]: problem.remedy for problem in problems}
    assert by_key["diffusion.shift"] == "Call it flow_shift."
    assert "fps" in by_key["frame_interval"]
    assert "--device" in by_key["device"]


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        ({"fpss": 16}, ["CFG-003"]),
        ({"fps": 0}, ["CFG-005"]),
        ({"pipeline_class": "OpenSoraPipeline"}, ["CFG-005"]),
        ({"pipeline_config": {"input_size": [81, 480]}}, ["CFG-004"]),
        ({"pipeline_config": {"input_size": [81, 480, "832"]}}, ["CFG-005"]),
        ({"pipeline_config": []}, ["CFG-005"]),
        ({"predictor": {"hidden_size": 1}}, ["CFG-004"] * 4),
    ],
)
def test_wrong_values(tmp_path, change, ids):
    assert [problem.id for problem in refused(tmp_path, shipped() | change)] == ids


def test_values_without_effect(tmp_path):
    problems = refused(tmp_path, shipped(), sample_solver="euler")
    assert [problem.id for problem in problems] == ["CFG-063"]
    assert "solver_order and diffusion.solver_type" in problems[0].message
    values = shipped()
    values["predictor"]["text_len"] = 256
    assert [problem.id for problem in refused(tmp_path, values)] == ["CFG-064"]


def test_not_an_object(tmp_path):
    assert [problem.id for problem in refused(tmp_path, [])] == ["CFG-005"]


def test_flags_of_the_reference_script_are_explained():
    words = shlex.split("--mm-model m --pipeline-model-parallel-size 1 --lr 5e-6 --bf16 --clip-grad 0 --sample-steps 5")
    with pytest.raises(ConfigError) as caught:
        parse_flags(GenerateFlags, words, program="generate", retired=RETIRED_GENERATE_FLAGS)
    assert sorted(problem.id for problem in caught.value.problems) == ["CFG-007"] + ["CFG-008"] * 4


@pytest.mark.parametrize("words", ["--input-size 81 480", "--seed -1", "--guidance-scale -2", "--sample-solver ddim"])
def test_flag_values_that_cannot_work(words):
    with pytest.raises(ConfigError) as caught:
        parse_flags(GenerateFlags, ["--mm-model", "m", *words.split()], program="generate")
    assert [problem.id for problem in caught.value.problems] == ["CFG-005"]


I2V = {"image": "i.txt", "image_encoder": {"from_pretrained": "e", "dtype": "fp32"}}


def images(task="i2v", **more):
    """A file of a model with images."""
    values = json.loads((EXAMPLES / f"14b/{task}" / "inference_model.json").read_text())
    return {**values, **more}


@pytest.mark.parametrize(
    ("values", "flags", "ids"),
    [
        (shipped() | I2V, {}, ["CFG-120"]),
        (shipped(), {"image": "i.txt"}, ["CFG-120"]),
        ({k: v for k, v in images().items() if k != "image"}, {}, ["CFG-120"]),
        ({k: v for k, v in images().items() if k != "image_encoder"}, {}, ["CFG-120"]),
        (images(video="v.txt"), {}, ["CFG-121"]),
        (shipped() | {"video": "v.txt"}, {}, ["CFG-121"]),
        (shipped(), {"strength": 0.5}, ["CFG-121"]),
        (shipped() | {"video": "v.txt"}, {"strength": 0.0}, ["CFG-121"]),
        (shipped() | {"video": "v.txt"}, {"strength": 1.01}, ["CFG-121"]),
        (shipped() | {"video": "v.txt"}, {"strength": 0.019}, ["CFG-121"]),
        (shipped() | {"video": "v.txt"}, {"strength": 0.02}, []),
        (shipped() | {"video": "v.txt"}, {"strength": 1.0}, []),
        (images("flf2v"), {"input_size": [1, 64, 64]}, ["CFG-123"]),
        (images("flf2v"), {"input_size": [6, 64, 64]}, ["CFG-060"]),
        (shipped(), {"batched_guidance": True, "guidance_scale": 1.0}, ["CFG-063"]),
        (shipped() | {"strength": 0.7, "num_frames": 49}, {}, ["CFG-008", "CFG-121"]),
    ],
)
def test_inputs_that_do_not_fit_the_model(tmp_path, values, flags, ids):
    if not ids:
        assert load(tmp_path, values, **flags).task == "v2v"
        return
    problems = refused(tmp_path, values, **flags)
    assert [problem.id for problem in problems] == ids
    assert all(problem.remedy for problem in problems)


def test_an_i2v_model_may_be_given_both_frames(tmp_path):
    values = images(pipeline_config={"input_size": [81, 480, 832], "dual_image": True})
    assert load(tmp_path, values).task == "flf2v"
    assert load(tmp_path, values).negative_text.startswith("镜头切换，镜头晃动，色调艳丽")
    assert load(tmp_path, images()).task == "i2v"
