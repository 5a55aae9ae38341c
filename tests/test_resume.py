"""A resumed run is an uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from parts import make_run, read_state, run_arguments, train_only, train_run
from safetensors.torch import load_file

import train_rdm_lora
from rdm_diffusers.config import optimizers
from rdm_diffusers.config.optimizers import EIGHT_BIT, OPTIMIZERS, USUAL
from rdm_diffusers.training import monitor
from rdm_diffusers.training.checkpoint_files import find_checkpoint
from rdm_diffusers.training.checkpoints import load_checkpoint

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run into a named folder of this test."""
    return lambda name, **changes: run_arguments(teacher_folder, prompts_file, tmp_path / name, **changes)


def assert_resuming_changes_nothing(argv, tmp_path: Path, flags: list[str], ended: bool = False, **options) -> None:
    """Six updates at a stretch, against three more from the checkpoint after three.

    The checkpoint is a copy of the first run's, as a kill leaves it, or that of a run that `ended` there.
    """
    options = dict(checkpointing_steps=3, lr_scheduler="constant_with_warmup", lr_warmup_steps=5, **options)
    train_only([*argv("straight", max_train_steps=6, **options), *flags])
    if ended:
        train_only([*argv("broken", max_train_steps=3, **options), *flags])
    else:
        shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "broken" / "checkpoint-3")
    train_only([*argv("broken", max_train_steps=6, resume_from_checkpoint="latest", **options), *flags])
    straight, broken = load_file(tmp_path / "straight" / LORA), load_file(tmp_path / "broken" / LORA)
    assert straight.keys() == broken.keys()
    assert all(torch.equal(tensor, broken[name]) for name, tensor in straight.items())
    states = [read_state(tmp_path / name / "checkpoint-6") for name in ("straight", "broken")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    records = [json.loads((tmp_path / n / "checkpoint-6" / "state.json").read_text()) for n in ("straight", "broken")]
    assert records[0]["monitor"] == records[1]["monitor"]
    assert records[0]["monitor"]["updates"] == 6


def test_resuming_changes_nothing(argv, tmp_path: Path) -> None:
    assert_resuming_changes_nothing(argv, tmp_path, [], ended=True)


def test_resuming_changes_nothing_with_folded_adapters_and_a_validation_at_the_checkpoint(argv, tmp_path: Path) -> None:
    assert_resuming_changes_nothing(argv, tmp_path, ["--fold_adapters"], validation_steps=3)


def test_resuming_changes_nothing_with_rewards_reused_rollouts_and_all_that_has_a_memory(
    argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "WARM_UP", 2)  # so that the alarms' memory is of both halves
    rewards = dict(algorithm="gndmr", reward=["tiny_bold", "tiny_prompt_black_box:-1"])
    rollouts = dict(reuse_rollouts=3, importance_weighting="clipped", num_renoisings=2, monitor_images=1)
    assert_resuming_changes_nothing(argv, tmp_path, ["--fake_score_steps", "--projection_guard"], **rewards, **rollouts)
    state = read_state(tmp_path / "broken" / "checkpoint-6")
    kept = {"variance_within_groups", "tilted_weight", "reward_variance/tiny_bold"}
    assert kept <= {name.removeprefix("statistics/") for name in state}
    assert state["statistics/variance_within_groups"].dtype == torch.float64


def test_a_run_that_reuses_rollouts_resumes_at_their_ends_alone(argv, capsys: pytest.CaptureFixture) -> None:
    options = dict(reuse_rollouts=2, checkpointing_steps=2, max_train_steps=2)
    train_only(argv("run", **options))
    for name, value in (("checkpointing_steps", 3), ("max_train_steps", 5)):
        with pytest.raises(SystemExit):
            train_rdm_lora.main(argv("run", **{**options, name: value}, resume_from_checkpoint="latest"))
        assert f"--{name} is {value}; it must be a multiple of --reuse_rollouts 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--reuse_rollouts \(was 2, is 1\)"):
        train_rdm_lora.main(argv("run", **{**options, "reuse_rollouts": 1}, resume_from_checkpoint="latest"))


def test_ctrl_c_waits_for_the_last_update_that_a_rollout_serves(argv) -> None:
    it = make_run(argv("run", max_train_steps=6, reuse_rollouts=3, checkpointing_steps=3, validation_steps=1))
    ended = train_run(it, lambda update: os.kill(os.getpid(), signal.SIGINT) if update == 1 else None)
    assert ended == signal.SIGINT
    assert it.state.update == 3


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_resuming_changes_nothing_with_8_bit_adam(
    package: str, argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name == package or None)
    # Rank 32 makes matrices of more than 4096 elements, which alone are kept in 8 bits.
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its step for half a minute
        assert_resuming_changes_nothing(argv, tmp_path, ["--use_8bit_adam"], rank=32)
    state = read_state(tmp_path / "broken" / "checkpoint-6")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in (USUAL, *EIGHT_BIT)])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_resuming_changes_nothing_with_any_optimiser(name: str, argv, tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        assert_resuming_changes_nothing(argv, tmp_path, ["--optim", name], rank=32)
    kept = [tensor for key, tensor in read_state(tmp_path / "broken" / "checkpoint-6").items() if "codes" in key]
    assert bool(kept) == (name == "adamw_torch_4bit")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name
)
def test_a_signal_saves_a_checkpoint_is_returned_and_can_be_resumed_from(argv, tmp_path: Path, number: int) -> None:
    straight = make_run(argv("straight", max_train_steps=3))
    assert train_run(straight) == 0
    broken = make_run(argv("broken", max_train_steps=3, validation_steps=2))
    before = signal.getsignal(number)
    assert train_run(broken, lambda update: os.kill(os.getpid(), number)) == number
    assert broken.state.update == 2
    assert [path.name for path in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(number) is before
    resumed = make_run(argv("broken", max_train_steps=3, resume_from_checkpoint="latest"))
    load_checkpoint(find_checkpoint(tmp_path / "broken", "latest"), resumed.state)
    assert train_run(resumed) == 0
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
