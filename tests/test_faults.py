"""What goes wrong ends a run with a sentence and leaves what was good; mended, it goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from parts import files_of_at_most, read_state, run_arguments, train_only

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.program import explain
from rdm_diffusers.rewards import RewardError
from rdm_diffusers.training import trainer


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run into a named folder that saves after every update."""
    return lambda name, **changes: run_arguments(
        teacher_folder, prompts_file, tmp_path / name, **{"checkpointing_steps": 1, **changes}
    )


def test_a_reward_that_raises_is_named_with_its_place_and_mended_the_run_is_as_if_it_never_had(
    argv, tmp_path: Path
) -> None:
    reward, fault = tmp_path / "reward.py", tmp_path / "fault"
    reward.write_text(
        "import pathlib\n\n\ndef judge(images, prompts):\n"
        f"    here = pathlib.Path({str(tmp_path)!r})\n"
        "    if (here / 'fault').exists() and (here / 'run' / 'checkpoint-1').exists():\n"
        "        raise KeyError('colour')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    options = dict(algorithm="gndmr", reward=f"{reward}:judge")
    fault.touch()
    with pytest.raises(
        RewardError, match=r"The reward judge raised KeyError at .*reward.py:7 .'colour'.; fix it"
    ) as raised:
        train_rdm_lora.main(argv("run", **options))
    assert [path.name for path in (tmp_path / "run").glob("check*")] == ["checkpoint-1"]
    fault.unlink()
    train_only(argv("run", **options, resume_from_checkpoint="latest"))
    train_only(argv("straight", **options))
    one, other = (read_state(tmp_path / name / "checkpoint-2") for name in ("run", "straight"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert explain(raised.value) == str(raised.value)


def test_a_reward_that_draws_at_random_draws_the_same_when_a_run_is_resumed(argv, tmp_path: Path) -> None:
    reward = tmp_path / "noisy.py"
    reward.write_text("import torch\n\n\ndef noisy(images, prompts):\n    return torch.rand(len(images))\n")
    options = dict(algorithm="gndmr", reward=f"{reward}:noisy")
    train_only(argv("straight", **options))
    train_only(argv("broken", max_train_steps=1, **options))
    torch.rand(3)
    train_only(argv("broken", resume_from_checkpoint="latest", **options))
    one, other = (read_state(tmp_path / name / "checkpoint-2") for name in ("straight", "broken"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("script", [train_rdm_lora, train_rdm_full], ids=["lora", "full"])
def test_a_full_disk_at_the_end_loses_nothing(
    script: ModuleType, argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "export_lora" if script is train_rdm_lora else "export_full"
    export, own = getattr(trainer, name), {} if script is train_rdm_lora else {"rank": None}

    def without_space(*args, **kwargs) -> None:
        with files_of_at_most(4096):
            export(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, name, without_space)
        with pytest.raises(OSError, match=r"The student could not be written .* its checkpoints are intact. Free some"):
            script.main(argv("run", **own))
    script.main(argv("run", resume_from_checkpoint="latest", **own))
    script.main(argv("straight", **own))
    one, other = (RdmDistillationPipeline.from_pretrained(tmp_path / name) for name in ("run", "straight"))
    pairs = zip(one.unet.state_dict().values(), other.unet.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
