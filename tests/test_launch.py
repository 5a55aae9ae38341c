"""Launchers that a run cannot serve, or that did less than they were asked, are refused in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from parts import run_arguments

import train_rdm_lora
from rdm_diffusers.training.launch import check_launch, is_sharded_launch, promised_processes


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_deepspeed_and_megatron_are_refused_with_what_to_use(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match=rf"{engine} keeps one model .* accelerate launch --use_fsdp --fsdp_version 2"):
        check_launch()


def test_the_first_fsdp_is_refused_and_the_second_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_sharded_launch()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert is_sharded_launch()
    with pytest.raises(ValueError, match=r"FSDP 1 flattens .* add --fsdp_version 2"):
        check_launch()
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch()
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match="leave --fsdp_offload_params out"):
        check_launch()


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--fold_adapters"], "--fold_adapters and FSDP exclude each other"),
     (["--use_8bit_adam"], "--use_8bit_adam cannot step FSDP's shards"),
     (["--base_quantization", "int8"], "FSDP cannot shard a quantised base")],
)  # fmt: skip
def test_what_shards_cannot_do_is_refused(
    flags: list[str], message: str, teacher_folder: Path, prompts_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(SystemExit):
        train_rdm_lora.main([*run_arguments(teacher_folder, prompts_file, tmp_path), *flags])
    assert message in capsys.readouterr().err


def test_a_program_that_accelerate_did_not_start_was_promised_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert promised_processes() == 1


@pytest.mark.parametrize("way", ["flag", "configuration"])
def test_an_accelerate_launch_that_silently_became_one_process_is_told_so(
    way: str, teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = tmp_path / "accelerate.yaml"
    count = "num_processes: 2" if way == "configuration" else "num_processes: 1"
    config.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\n{count}\n")
    asked = ["--num_processes", "2"] if way == "flag" else ["--config_file", str(config)]
    command = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    launcher = command if way == "flag" else [sys.executable, "-m", "accelerate.commands.launch"]
    script = str(train_rdm_lora.__file__)
    done = subprocess.run(
        [*launcher, "--cpu", *asked, script,
         *run_arguments(teacher_folder, prompts_file, tmp_path / "student")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: The launcher was asked for 2 processes and made 1" in done.stderr
    assert not list((tmp_path / "student").glob("*.safetensors"))
