"""Flags of Megatron and MindSpeed that mean what is done here anyway: taken out of a command line, and noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mm.dialects.mindspeed.accepted import Note

Accepted = Mapping[str, tuple[frozenset[str] | None, str]]
"""Flag -> the values that are accepted, None for any one and an empty set for no value; and why."""

_SWITCH: frozenset[str] = frozenset()
_NEVER_CAUSAL = (frozenset({"general"}), "attention in Wan is never causal")
_BACKEND = (frozenset({"nccl", "hccl", "gloo"}), "the device chooses its backend")
_DUMMY = "Megatron asks for it; the model is that of the file"
_DUMMIES: Accepted = {
    "--num-layers": (frozenset({"1"}), _DUMMY),
    "--hidden-size": (frozenset({"3072"}), _DUMMY),
    "--num-attention-heads": (frozenset({"48"}), _DUMMY),
    "--seq-length": (frozenset({"24"}), _DUMMY),
    "--max-position-embeddings": (frozenset({"24"}), _DUMMY),
    "--tokenizer-type": (frozenset({"NullTokenizer"}), _DUMMY),
    "--vocab-size": (frozenset({"0"}), _DUMMY),
    "--position-embedding-type": (frozenset({"rope"}), _DUMMY),
    "--rotary-base": (frozenset({"500000"}), _DUMMY),
    "--swiglu": (_SWITCH, _DUMMY),
    "--normalization": (frozenset({"RMSNorm"}), _DUMMY),
    "--no-masked-softmax-fusion": (_SWITCH, "attention has one kernel"),
}
"""What the scripts of early versions give, with the values that these have: of the model's own file nothing follows."""
ACCEPTED_TRAIN_FLAGS: Accepted = {
    **_DUMMIES,
    "--no-gradient-accumulation-fusion": (_SWITCH, "gradients are added up in fp32"),
    "--accumulate-allreduce-grads-in-fp32": (_SWITCH, "gradients are added up in fp32"),
    "--use-fused-rmsnorm": (_SWITCH, "the device chooses its fastest kernel"),
    "--use-fused-ring-attention-update": (_SWITCH, "the device chooses its fastest kernel"),
    "--megatron-cp-in-bnsd": (_SWITCH, "the device chooses its kernel's layout"),
    "--no-save-rng": (_SWITCH, "random numbers are keyed by seed and sample"),
    "--use-cpu-initialization": (_SWITCH, "weights are read straight into place"),
    "--untie-embeddings-and-output-weights": (_SWITCH, "Wan ties no weights"),
    "--log-throughput": (_SWITCH, "every line of the log has it"),
    "--attention-mask-type": _NEVER_CAUSAL,
    "--distributed-backend": _BACKEND,
    "--mm-tool": (None, "tools.json belongs to feature extraction"),
    "--eval-iters": (None, "an evaluation uses all samples of --eval-data"),
    "--lora-register-forward-hook": (None, "gradients reach every adapter"),
    "--optimizer-selection": (
        frozenset({"fused_adamw", "fused_torch_adamw"}),
        "--optimizer names the algorithm, which runs by the device's fastest kernel",
    ),
}
_OF_TRAINING = "it concerns training"
_NUMBERS = (
    "--lr",
    "--min-lr",
    "--train-iters",
    "--weight-decay",
    "--clip-grad",
    "--adam-beta1",
    "--adam-beta2",
    "--adam-eps",
)
_SWITCHES = (
    "--no-load-optim",
    "--no-load-rng",
    "--no-save-optim",
    "--no-save-rng",
    "--no-gradient-accumulation-fusion",
)
ACCEPTED_GENERATE_FLAGS: Accepted = {
    **_DUMMIES,
    "--attention-mask-type": _NEVER_CAUSAL,
    "--distributed-backend": _BACKEND,
    "--pipeline-model-parallel-size": (frozenset({"1"}), "generation has no pipeline"),
    "--virtual-pipeline-model-parallel-size": (frozenset({"1"}), "generation has no pipeline"),
    "--global-batch-size": (None, "--micro-batch-size says how many prompts run together"),
    "--bf16": (_SWITCH, "the precision is predictor.dtype"),
    "--use-fused-rmsnorm": (_SWITCH, "the device chooses its fastest kernel"),
    **dict.fromkeys(_NUMBERS, (None, _OF_TRAINING)),
    **dict.fromkeys(_SWITCHES, (_SWITCH, _OF_TRAINING)),
}


_ALONE = "each process encodes one sample at a time"
_UNCUT = (frozenset({"1"}), _ALONE)
ACCEPTED_EXTRACT_FLAGS: Accepted = {
    **_DUMMIES,
    **dict.fromkeys(_NUMBERS, (None, _OF_TRAINING)),
    **dict.fromkeys(_SWITCHES, (_SWITCH, _OF_TRAINING)),
    "--attention-mask-type": _NEVER_CAUSAL,
    "--distributed-backend": _BACKEND,
    "--micro-batch-size": (None, _ALONE),
    "--global-batch-size": (None, _ALONE),
    "--bf16": (_SWITCH, "the precision is that of the encoders' file"),
    "--use-fused-rmsnorm": (_SWITCH, "the device chooses its fastest kernel"),
    "--tensor-model-parallel-size": _UNCUT,
    "--pipeline-model-parallel-size": _UNCUT,
    "--virtual-pipeline-model-parallel-size": _UNCUT,
    "--context-parallel-size": _UNCUT,
}


def take_accepted(argv: Sequence[str], table: Accepted = ACCEPTED_TRAIN_FLAGS) -> tuple[list[str], list[Note]]:
    """A command line without these flags, and what they were.

    A flag with a value that would change something stays, and so does one without the value that it needs.

    Args:
        argv: the words. table: the flags of the command.
    """
    kept: list[str] = []
    notes: list[Note] = []
    for flag, values in _groups(argv):
        if flag in table and _fits(table[flag][0], values):
            notes.append(Note(flag, " ".join(values), table[flag][1]))
        else:
            kept += [flag, *values] if flag else values
    if any(note.key == "--eval-iters" for note in notes) and not any(f == "--eval-data" for f, _ in _groups(kept)):
        return _without_evaluation(kept, notes)
    return kept, notes


def _fits(allowed: frozenset[str] | None, values: Sequence[str]) -> bool:
    if allowed is not None and not allowed:
        return not values
    return len(values) == 1 and (allowed is None or values[0] in allowed)


def _without_evaluation(words: list[str], notes: list[Note]) -> tuple[list[str], list[Note]]:
    """An interval without held-out features, as scripts that know no such features give it."""
    kept: list[str] = []
    for flag, values in _groups(words):
        if flag == "--eval-interval":
            notes.append(Note(flag, " ".join(values), "no features are held out, and nothing is evaluated"))
        else:
            kept += [flag, *values] if flag else values
    return kept, notes


def _groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(flag, its values) in order; words before any flag have an empty one. `--flag=value` is two words."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append(("", [word]))
    return groups
