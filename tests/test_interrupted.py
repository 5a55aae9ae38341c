"""How a run ends before its time, and what the end of a run may lose: never the student, its card or its push."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parts import make_run, run_arguments, train_run

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.folders import locked
from rdm_diffusers.training import finish, loop, tracking, trainer
from rdm_diffusers.training.checkpoint_files import damage, find_checkpoint
from rdm_diffusers.training.run_folder import locked_for_run
from rdm_diffusers.training.tracking import check_trackers, end_trackers


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run."""
    options = dict(num_validation_images=1, max_train_steps=1)
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path / "run", **{**options, **changes})


def test_a_second_run_is_refused_and_a_run_that_nobody_reads_saves_and_tells_its_signal(argv, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = argv(checkpointing_steps=1, max_train_steps=10_000)
    process = subprocess.Popen(
        [sys.executable, train_rdm_lora.__file__, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    try:
        while not (folder / "checkpoint-2").exists():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.1)
        process.stderr.close()  # from now on the progress bar cannot be written either
        with pytest.raises(
            ValueError, match=rf"run is in use by another run \(process {process.pid} on .*\); wait until"
        ):
            train_rdm_lora.main([*words, "--resume_from_checkpoint", "latest"])
        process.send_signal(signal.SIGHUP)
        assert process.wait(100) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert not (folder / "rdm_config.json").exists() and not list(folder.glob(".*"))
    assert damage(find_checkpoint(folder, "latest")) is None


def test_an_interrupted_run_ends_with_128_and_the_signal_and_makes_no_student(argv, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "collect", lambda *args, collect=loop.collect: os.kill(os.getpid(), 15) or collect(*args))
    with pytest.raises(SystemExit) as ended:
        train_rdm_lora.main(argv(max_train_steps=3))
    assert ended.value.code == 143
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-1", "config.yaml", "report.html"]


def test_the_launchers_echo_of_a_signal_is_not_a_second_one(argv, tmp_path: Path) -> None:
    it = make_run(argv(max_train_steps=3, validation_steps=1))

    def twice(update: int) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    assert train_run(it, twice) == signal.SIGTERM
    assert damage(tmp_path / "run" / "checkpoint-1") is None


def test_a_second_sigterm_later_stops_at_once(argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = make_run(argv(max_train_steps=3, validation_steps=1))
    monkeypatch.setattr("rdm_diffusers.training.interrupts.ONE_EVENT", -1.0)
    with pytest.raises(SystemExit) as ended:
        train_run(it, lambda update: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    assert ended.value.code == 143
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_that_was_saved_is_not_saved_again_when_it_is_interrupted(argv, tmp_path: Path) -> None:
    it, written = make_run(argv(max_train_steps=3, checkpointing_steps=1)), []

    def interrupt() -> None:
        written.append((tmp_path / "run" / "checkpoint-1" / "state.json").stat().st_ino)
        os.kill(os.getpid(), signal.SIGINT)

    save = loop.save_checkpoint

    def saved(*args) -> Path:
        path = save(*args)
        interrupt()
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", saved)
        assert train_run(it) == signal.SIGINT
    assert written == [(tmp_path / "run" / "checkpoint-1" / "state.json").stat().st_ino]


def test_the_lock_is_gone_with_the_run_and_a_dry_run_needs_none(argv, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / ".run.lock"):
        train_rdm_lora.main(argv(dry_run=True))
        with pytest.raises(ValueError, match="in use by another run"):
            train_rdm_lora.main(argv())
    assert not list((tmp_path / "run").glob(".*"))


def test_where_there_are_no_locks_a_run_says_so_and_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("rdm_diffusers.folders._take", lambda *args: None)
    accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    with pytest.warns(UserWarning, match="has no locks, so nobody would notice a second run in this folder"), \
            locked_for_run(tmp_path, accelerator):  # fmt: skip
        pass


def let_push(monkeypatch: pytest.MonkeyPatch, pushed: list[Path]) -> None:
    """Has a run only note which folder it would push."""
    monkeypatch.setattr(trainer, "check_hub", lambda *args: None)
    monkeypatch.setattr(trainer, "publish", lambda config: pushed.append(Path(config.output.output_dir)))


@pytest.mark.parametrize("script", [train_rdm_lora, train_rdm_full], ids=["lora", "full"])
def test_pictures_that_fail_take_neither_card_nor_push(script, argv, tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    pushed: list[Path] = []
    monkeypatch.setattr(finish, "save_samples", fail)
    let_push(monkeypatch, pushed)
    with pytest.warns(UserWarning, match=r"The student is safe, but the student's pictures and numbers could not"):
        script.main(argv(push_to_hub=True, **({} if script is train_rdm_lora else {"rank": None})))
    assert pushed == [tmp_path / "run"]
    assert (tmp_path / "run" / "README.md").exists() and (tmp_path / "run" / "rdm_config.json").exists()


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("bad"), KeyError("colour")], ids=repr)
def test_no_error_in_what_is_extra_ends_a_run_and_a_bug_shows_its_traceback(error: Exception, capsys) -> None:
    with pytest.warns(UserWarning, match=r"The student is safe, but this failed \(.*\)\."), finish.extra("this failed"):
        raise error
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError)


def test_numbers_that_fail_keep_the_pictures(prompts_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(finish, "tiny_metrics", lambda *args: 1 / 0)
    options = dict(num_eval_images=7, max_train_steps=1, num_validation_images=1, steps_per_rollout=1)
    with pytest.warns(UserWarning, match="The student is safe"):
        train_rdm_lora.main(run_arguments("tiny", prompts_file, tmp_path, **options))
    assert (tmp_path / "samples.png").exists()
    assert json.loads((tmp_path / "metrics.json").read_text())["student"]["nfe"] == 2


def test_a_card_that_cannot_be_written_does_not_take_the_push(argv, tmp_path: Path, monkeypatch) -> None:
    pushed: list[Path] = []
    (tmp_path / "run" / "README.md").mkdir(parents=True)
    let_push(monkeypatch, pushed)
    with pytest.warns(UserWarning, match=r"the card could not be written; try again with rdm-card .*run \("):
        train_rdm_lora.main(argv(push_to_hub=True))
    assert pushed == [tmp_path / "run"]


@pytest.mark.parametrize(("patience", "warnings"), [("0", 1), ("600", 0), (None, 0)])
def test_a_launcher_that_would_kill_a_stopped_run_before_its_checkpoint_is_named_once(
    patience: str | None, warnings: int, argv, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    if patience is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", patience)
    train_run(make_run(argv(checkpointing_steps=1, max_train_steps=2)))
    said = [str(warning.message) for warning in recwarn if "checkpoint" in str(warning.message)]
    assert len(said) == warnings
    if said:
        assert "kills a run 0 s after it is told to stop" in said[0]
        assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=" in said[0]


def test_a_tracker_that_fails_on_the_way_or_at_the_end_does_not_end_the_run(argv, monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no server")

    it = make_run(argv(max_train_steps=10))
    monkeypatch.setattr(it.accelerator, "log", fail)
    monkeypatch.setattr(it.accelerator, "trackers", [SimpleNamespace(finish=fail)])
    with pytest.warns(UserWarning) as warned:
        assert train_run(it) == 0
        end_trackers(it.accelerator)
    said = " ".join(str(warning.message) for warning in warned)
    assert "The trackers took no numbers (no server)" in said and "The trackers could not be closed (no server)" in said


def test_a_validation_picture_that_cannot_be_written_does_not_end_the_run(argv, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "validation").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"The picture of update 1 could not be shown \(.*\); the run goes on"):
        train_rdm_lora.main(argv(validation_steps=1))
    assert (tmp_path / "run" / "rdm_config.json").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(argv, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    for name in ("none", "tensorboard", "all"):
        check_trackers(name)
    with pytest.raises(ImportError, match=r"--report_to wandb needs a package that is not installed, so .*\[track\]'"):
        train_rdm_lora.main(argv(report_to="wandb"))
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ImportError, match="--report_to all needs a package"):
        check_trackers("all")


def test_a_tracker_that_cannot_start_is_one_sentence(argv, monkeypatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match=r"--report_to none cannot start \(division by zero\); fix that, or leave"):
        train_rdm_lora.main(argv())
