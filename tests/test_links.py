"""Symbolic links in a student's folder: what leaves the folder is not pushed, copied, read or written through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rdm_diffusers import RdmDistillationPipeline
from rdm_diffusers.commands import card, export
from rdm_diffusers.hub import push, student_files, write_card
from rdm_diffusers.training import publish
from rdm_diffusers.training.exporting import read_run
from rdm_diffusers.untrusted import real_path, write_inside

TOKEN = "hf_recognisableSecret0123456789"
SECRET = "the content of a secret file"
LINKED = ("samples.png", "pictures/0.png", "pictures", "metrics.json", "README.md", "rdm_config.json", "scheduler",
          "scheduler/scheduler_config.json", "pytorch_lora_weights.safetensors", "comfyui", "evaluation.json",
          "model_index.json")  # fmt: skip


@pytest.fixture
def student(tiny_student: Path, tmp_path: Path) -> Path:
    """A copy of a student's folder, beside a secret."""
    (tmp_path / "secret").write_text(SECRET)
    return shutil.copytree(tiny_student, tmp_path / "in" / "student", ignore=shutil.ignore_patterns("checkpoint-*"))


def relink(path: Path, target: Path) -> None:
    """Puts a link to another place where something was, which moves there if nothing is there yet."""
    if path.exists() and not target.exists():
        shutil.move(path, target)
    elif path.exists():
        path.unlink()
    path.symlink_to(target)


def outcome(act: Callable[[], object]) -> str:
    """The one sentence that an action is refused with."""
    with pytest.raises(ValueError) as caught:
        act()
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".") and SECRET not in said
    return said


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_folder_is_named_with_its_target_by_every_command(
    student: Path, tmp_path: Path, name: str
) -> None:
    link, target = student / name, tmp_path / "elsewhere"
    relink(link, target)
    before = sorted(path for path in tmp_path.rglob("*"))
    said = f"{link} is a link to {target}, which is not in {student}; replace it by what it stands for, or remove it."
    acts = [
        lambda: push.push_student(student, "me/x", token=TOKEN),
        lambda: write_card(student),
        lambda: card.main([str(student), "--overwrite"]),
        lambda: export.main([str(student), "--format", "lora", "--output_dir", str(tmp_path / "out")]),
    ]
    for act in acts:
        assert outcome(act) == said
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["samples.png", "README.md", "evaluation.json", "pictures/9.png"])
def test_a_broken_link_out_of_the_folder_is_refused_and_nothing_is_made_where_it_leads(
    student: Path, tmp_path: Path, name: str
) -> None:
    (student / name).unlink(missing_ok=True)
    (student / name).symlink_to(tmp_path / "nothing" / "here")
    said = f"{student / name} is a link to {tmp_path / 'nothing' / 'here'}, which is not in "
    assert outcome(lambda: push.push_student(student, "me/x", token=TOKEN)).startswith(said)
    assert outcome(lambda: card.main([str(student)])).startswith(said)
    assert not (tmp_path / "nothing").exists()


def test_a_link_that_leads_to_itself_is_one_sentence(student: Path) -> None:
    (student / "samples.png").unlink()
    (student / "samples.png").symlink_to("samples.png")
    assert (
        outcome(lambda: write_card(student)) == f"{student / 'samples.png'} is a link that leads to itself; remove it."
    )


def test_links_inside_the_folder_and_above_it_are_followed(student: Path, tmp_path: Path) -> None:
    (student / "pictures" / "0.png").unlink()
    (student / "pictures" / "0.png").symlink_to("../samples.png")
    (tmp_path / "door").symlink_to(student.parent)
    folder = tmp_path / "door" / "student"
    assert folder / "pictures" / "0.png" in student_files(folder)
    write_card(folder)
    out = export.main([str(folder), "--format", "lora", "--output_dir", str(tmp_path / "out")])
    copied = out / "pictures" / "0.png"
    assert not copied.is_symlink() and copied.read_bytes() == (student / "samples.png").read_bytes()


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_in_the_hubs_cache_is_exported_and_its_blobs_are_not_written(
    student: Path, tmp_path: Path, shared: bool
) -> None:
    repository = tmp_path / "hub" / "models--me--student"
    snapshot = repository / "snapshots" / "0123"
    blobs = tmp_path / "hub" / "blobs" / "ab" if shared else repository / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(student_files(student)):
        (blobs / str(i)).write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(student)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(i))
    before = {path: path.read_bytes() for path in blobs.iterdir()}
    out = export.main([str(snapshot), "--format", "lora", "--output_dir", str(tmp_path / "out")])
    assert (out / "samples.png").read_bytes() == (student / "samples.png").read_bytes()
    assert f"{snapshot / 'README.md'} is a link to" in outcome(lambda: write_card(snapshot, overwrite=True))
    assert before == {path: path.read_bytes() for path in blobs.iterdir()}
    (tmp_path / "hub" / "models--me--other" / "blobs").mkdir(parents=True)
    (snapshot / "evaluation.json").symlink_to(tmp_path / "hub" / "models--me--other" / "blobs" / "1")
    assert "evaluation.json is a link to" in outcome(lambda: student_files(snapshot))


def test_folders_that_only_look_like_a_cache_open_no_other_place(tmp_path: Path) -> None:
    folder = tmp_path / "models--me--x" / "snapshots" / "0"
    folder.mkdir(parents=True)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "models--me--x" / "blobs").symlink_to(tmp_path / "secrets")
    (folder / "samples.png").symlink_to("../../blobs/key")
    assert "samples.png is a link to ../../blobs/key" in outcome(lambda: real_path(folder, folder / "samples.png"))


def test_a_file_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_text(SECRET)
    (folder / "README.md").hardlink_to(secret)
    assert write_inside(folder, "README.md", "two").read_text() == "two"
    assert secret.read_text() == SECRET and [path.name for path in folder.iterdir()] == ["README.md"]


def test_a_full_students_component_is_checked_as_deep_as_it_is_read(tiny_student: Path, tmp_path: Path) -> None:
    folder, target = tmp_path / "full", tmp_path / "elsewhere"
    RdmDistillationPipeline.from_pretrained(tiny_student).save_pretrained(folder)
    relink(folder / "unet" / "config.json", target)
    said = outcome(lambda: export.main([str(folder), "--format", "full", "--output_dir", str(tmp_path / "out")]))
    assert said.startswith(f"{folder / 'unet' / 'config.json'} is a link to {target}")


def test_a_checkpoint_with_a_link_out_of_it_or_out_of_its_run_is_refused(tmp_path: Path) -> None:
    checkpoint, run = tmp_path / "checkpoint-1", tmp_path / "run"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({"digests": {}, "arguments": {}, "update": 1}))
    (checkpoint / "student.safetensors").symlink_to(tmp_path / "secret")
    assert "student.safetensors is a link to" in outcome(lambda: read_run(checkpoint))
    run.mkdir()
    (run / "checkpoint-1").symlink_to(checkpoint)
    assert "checkpoint-1 is a link to" in outcome(lambda: publish._push_checkpoint(run / "checkpoint-1", "me/x", {}))
