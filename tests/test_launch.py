"""Launchers that a run cannot serve, or that did less than they were asked, are refused in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from parts import run_arguments

import train_rdm_lora
from rdm_diffusers.training.launch import check_launch, free_threads, is_sharded_launch, promised_processes
from rdm_diffusers.training.processors import usable_processors

CORES = usable_processors()


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


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [([], {}, CORES), (["--num_cpu_threads_per_process", "1"], {}, 1),
     ([], {"OMP_NUM_THREADS": "1"}, 1)],
    ids=["nobody chose", "a flag", "OMP_NUM_THREADS"],
)  # fmt: skip
def test_under_accelerate_launch_a_run_uses_the_cores_that_there_are_unless_somebody_chose(
    flags: list[str], environment: dict[str, str], expected: int, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom rdm_diffusers.config import RunConfig\n"
        "from rdm_diffusers.training.launch import make_accelerator\n"
        "config = RunConfig.of(output_dir='run', report_to='none')\n"
        "make_accelerator(config.output, config.memory)\nprint('threads', torch.get_num_threads())\n"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script)], cwd=tmp_path,
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"threads {expected}", done.stderr


def test_a_program_that_accelerate_did_not_start_keeps_its_threads() -> None:
    assert free_threads(psutil.Process().parent()) is None and free_threads(None) is None


@pytest.mark.parametrize(
    ("groups", "files", "processors"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "20000 100000"}, 1),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "600000 100000"}, 2),
        ("0::/seen/from/the/host", {"cpu.max": "400000 100000"}, 4),
        ("5:memory:/x\n4:cpu,cpuacct:/x\n0::/", {"cpu,cpuacct/x/cpu.cfs_quota_us": "500000",
                                                 "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 5),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (None, {}, 8),
    ],
)  # fmt: skip
def test_a_process_uses_no_more_processors_than_its_container_has(
    groups: str | None, files: dict[str, str], processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    if groups is not None:
        (tmp_path / "own").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert usable_processors(tmp_path / "cgroup", tmp_path / "own") == processors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process cannot be bound to a processor here")
def test_a_process_that_is_bound_to_one_processor_uses_one() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_processors() == 1
    finally:
        os.sched_setaffinity(0, before)
