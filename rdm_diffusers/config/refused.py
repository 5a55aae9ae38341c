"""Flags of other training scripts that a run does not have, and why."""

from __future__ import annotations

REFUSED = {
    "lora_dropout": (
        "a first pass without gradients computes the student's directions, and dropout in the second would make "
        "another student of it; to regularise, lower --rank or raise --adam_weight_decay"
    ),
    "enable_group_offload": (
        "diffusers moves a block off the device after its forward, adapters included, and the backward needs it there; "
        "use --base_quantization with --gradient_checkpointing and --offload"
    ),
}


def refusal(name: str) -> str:
    """Why there is no such flag, and what to use."""
    return f"--{name} is not offered, because {REFUSED[name]}."
