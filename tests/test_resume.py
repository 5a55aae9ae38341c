"""A resumed run is an uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from parts import make_run, run_arguments, train_run
from safetensors.torch import load_file

import train_rdm_lora
from rdm_diffusers.training.checkpoints import find_checkpoint, load_checkpoint

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run into a named folder of this test."""
    return lambda name, **changes: run_arguments(teacher_folder, prompts_file, tmp_path / name, **changes)


def assert_resuming_changes_nothing(argv, tmp_path: Path, flags: list[str], **options) -> None:
    """Six updates at a stretch, against three and then three more."""
    options = dict(checkpointing_steps=3, lr_scheduler="constant_with_warmup", lr_warmup_steps=5, **options)
    train_rdm_lora.main([*argv("straight", max_train_steps=6, **options), *flags])
    train_rdm_lora.main([*argv("broken", max_train_steps=3, **options), *flags])
    train_rdm_lora.main([*argv("broken", max_train_steps=6, resume_from_checkpoint="latest", **options), *flags])
    straight, broken = load_file(tmp_path / "straight" / LORA), load_file(tmp_path / "broken" / LORA)
    assert straight.keys() == broken.keys()
    assert all(torch.equal(tensor, broken[name]) for name, tensor in straight.items())
    states = [load_file(tmp_path / name / "checkpoint-6" / "state.safetensors") for name in ("straight", "broken")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_resuming_changes_nothing(argv, tmp_path: Path) -> None:
    assert_resuming_changes_nothing(argv, tmp_path, [])


def test_resuming_changes_nothing_with_folded_adapters_and_a_validation_at_the_checkpoint(argv, tmp_path: Path) -> None:
    assert_resuming_changes_nothing(argv, tmp_path, ["--fold_adapters"], validation_steps=3)


def test_resuming_changes_nothing_with_8_bit_adam(argv, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Rank 32 makes matrices of more than 4096 elements, which alone are kept in 8 bits.
    assert_resuming_changes_nothing(argv, tmp_path, ["--use_8bit_adam"], rank=32)
    state = load_file(tmp_path / "broken" / "checkpoint-6" / "state.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values())


def test_ctrl_c_saves_a_checkpoint_returns_false_and_can_be_resumed_from(argv, tmp_path: Path) -> None:
    straight = make_run(argv("straight", max_train_steps=3))
    assert train_run(straight)
    broken = make_run(argv("broken", max_train_steps=3, validation_steps=2))
    before = signal.getsignal(signal.SIGINT)
    finished = train_run(broken, lambda update: os.kill(os.getpid(), signal.SIGINT))
    assert not finished
    assert broken.state.update == 2
    assert [path.name for path in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is before
    resumed = make_run(argv("broken", max_train_steps=3, resume_from_checkpoint="latest"))
    load_checkpoint(find_checkpoint(tmp_path / "broken", "latest"), resumed.state)
    assert train_run(resumed)
    for role, role_optimizer in straight.state.optimizers.items():
        pairs = zip(role_optimizer.parameters, resumed.state.optimizers[role].parameters, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_second_ctrl_c_stops_at_once(argv, tmp_path: Path) -> None:
    it = make_run(argv("run", max_train_steps=3, validation_steps=1))

    def twice(update: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_run(it, twice)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
