"""Scenes of students and their cards: exported into a new folder or over an older student, loaded, exported again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from fault_runs import references
from fault_scenes import DamageScene, KillScene, contents, equal, hidden, same_result
from fault_trials import DEBRIS, INTACT, LOST, SILENT, Verdict

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.commands import card as card_command, export as export_command
from rdm_diffusers.hub import write_card
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.training.exporting import export_checkpoint, read_run

SCRIPTS = {"lora": train_rdm_lora, "full": train_rdm_full}
OLD, NEW = "checkpoint-1", "checkpoint-2"
MOST = 24  # kills of an export, each of which loads and writes a pipeline twice


@cache
def trained(kind: str) -> Path:
    """The folder of a run of two updates of the tiny teacher, made once, with a checkpoint of each."""
    folder = Path(mkdtemp(prefix=f"faults-{kind}-")) / "run"
    words = [
        "--pretrained_model_name_or_path", "tiny", "--output_dir", str(folder), "--max_train_steps", "2",
        "--checkpointing_steps", "1", "--train_batch_size", "4", "--group_size", "4", "--num_student_steps", "2",
        "--steps_per_rollout", "1", "--teacher_target", "score",
        "--max_train_samples", "4", "--num_validation_images", "1", "--num_eval_images", "0", "--monitor_images", "0",
        "--validation_steps", "1000", "--report_to", "none", *(["--rank", "2"] if kind == "lora" else []),
    ]  # fmt: skip
    SCRIPTS[kind].main(words)
    return folder


def export(kind: str, checkpoint: str, folder: Path) -> None:
    """Writes the student of a checkpoint into `folder/student`, over its files."""
    source = trained(kind) / checkpoint
    (folder / "student").mkdir(exist_ok=True)
    export_checkpoint(source, read_run(source), folder / "student")


@cache
def exported(kind: str, checkpoint: str) -> dict[str, Any]:
    """The contents of a student's folder after an undisturbed export."""
    folder = Path(mkdtemp(prefix="faults-student-"))
    export(kind, checkpoint, folder)
    return contents(folder / "student")


def over_an_older(kind: str, older: bool = True) -> KillScene:
    """A student is exported over an older one; after a kill, the folder holds the one or the other."""

    def prepare(folder: Path) -> None:
        if older:
            export(kind, OLD, folder)

    def judge(folder: Path) -> Verdict:
        verdict = _one_of(folder / "student", [exported(kind, NEW), exported(kind, OLD) if older else {}])
        if verdict.outcome != INTACT:
            return verdict
        export(kind, NEW, folder)
        return _as_wanted(folder, exported(kind, NEW))

    def reference() -> None:
        for checkpoint in (OLD, NEW):
            exported(kind, checkpoint)

    name = f"{kind} student " + ("over an older one" if older else "into a new folder")
    return KillScene(name, prepare, partial(export, kind, NEW), judge, reference, MOST)


def _one_of(student: Path, whole: Sequence[dict[str, Any]]) -> Verdict:
    """Whether a folder is one of these students, or becomes one by the command that its refusal names."""
    found = {name: value for name, value in contents(student).items() if not name.startswith(".")}
    if any(equal(found, each) for each in whole):
        return Verdict(INTACT)
    refusal = _refusal(student)
    if refusal is not None and "finish it with `rdm-card" in refusal:
        card_command.main([str(student)])
        (student / "README.md").unlink()
        if any(equal(contents(student), each) for each in whole):
            return Verdict(INTACT, "after rdm-card, as it was told")
    files = ", ".join(sorted(found))
    if refusal is None:
        return Verdict(SILENT, f"a mixture loads as a student: {files}")
    return Verdict(LOST if whole[-1] != {} else INTACT, f"{files}: {refusal}")


def _refusal(student: Path) -> str | None:
    """Why a folder cannot be loaded; None if it can."""
    try:
        RdmDistillationPipeline.from_pretrained(student)
    except Exception as error:  # any error shows that this is no whole student
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def _as_wanted(folder: Path, wanted: dict[str, Any], student: str = "student") -> Verdict:
    """Whether the next export wrote what it should, and nothing hidden is left of the killed one."""
    found = {name: value for name, value in contents(folder / student).items() if not name.startswith(".")}
    if not equal(found, wanted):
        return Verdict(LOST, "the next export wrote something else")
    left = {name for name in hidden(folder) if not name.endswith(".lock")}
    return Verdict(DEBRIS, ", ".join(sorted(left))) if left else Verdict(INTACT)


def rdm_export(kind: str, form: str) -> KillScene:
    """`rdm-export` of a checkpoint into a new folder; after a kill there is no student, and the command works again."""

    def act(folder: Path, target: str = "student") -> None:
        source = str(trained(kind) / NEW)
        export_command.main([source, "--output_dir", str(folder / target), "--format", form])

    @cache
    def wanted() -> dict[str, Any]:
        folder = Path(mkdtemp(prefix="faults-export-"))
        act(folder)
        return _without_card(contents(folder / "student"))

    def judge(folder: Path) -> Verdict:
        student = folder / "student"
        if student.exists() and not equal(_without_card(contents(student)), wanted()):
            return Verdict(SILENT, f"a part of a student: {', '.join(contents(student))}")
        shutil.rmtree(student, ignore_errors=True)
        act(folder)
        shutil.rmtree(student / "pictures", ignore_errors=True)
        (student / "README.md").unlink(missing_ok=True)
        return _as_wanted(folder, wanted())

    return KillScene(f"rdm-export {form} of a {kind} checkpoint", lambda folder: None, act, judge, wanted, MOST)


def _without_card(found: dict[str, Any]) -> dict[str, Any]:
    """The card names its folder."""
    return {name: value for name, value in found.items() if name != "README.md"}


def _card_of(folder: Path, name: str, *more: str) -> None:
    card_command.main([str(folder / "student"), "--name", name, *more])


def card(older: bool, edited: bool = False) -> KillScene:
    """`rdm-card` without a card, over an older one, or over one that a user has edited."""

    def prepare(folder: Path) -> None:
        export("lora", NEW, folder)
        if older:
            _card_of(folder, "me/older")
        if edited:
            path = folder / "student" / "README.md"
            path.write_text(path.read_text() + "Ours.\n")

    def act(folder: Path) -> None:
        _card_of(folder, "me/newer", "--evaluation", str(references()))

    @cache
    def texts(done: bool) -> dict[str, Any]:
        folder = Path(mkdtemp(prefix="faults-card-"))
        prepare(folder)
        if done:
            act(folder)
        return contents(folder / "student")

    def judge(folder: Path) -> Verdict:
        for name, found in contents(folder / "student").items():
            if not name.startswith(".") and not any(equal(found, texts(done).get(name)) for done in (True, False)):
                return Verdict(SILENT if texts(False).get(name) is None else LOST, f"{name} is neither old nor new")
        act(folder)
        return _as_wanted(folder, texts(True))

    kind = "over an edited one" if edited else "over an older one" if older else "for the first time"
    return KillScene(f"card {kind}", prepare, act, judge, lambda: [texts(done) for done in (True, False)])


def _two_students(folder: Path) -> None:
    export("lora", NEW, folder)
    (folder / "another").mkdir()
    export("lora", OLD, folder / "another")
    config = folder / "another" / "student" / "rdm_config.json"
    config.write_text(config.read_text().replace('"num_inference_steps": 2', '"num_inference_steps": 1'))


def _drawn(folder: Path) -> dict[str, Any]:
    """All that a student's images depend on."""
    pipeline = RdmDistillationPipeline.from_pretrained(folder / "student")
    student = pipeline.student
    assert student is not None
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    settings = [student.num_inference_steps, student.call_arguments, student.pipeline_class]
    return {"weights": pipeline.unet.state_dict(), "scheduler": scheduler, "settings": settings}


def _again(folder: Path) -> dict[str, Any]:
    export_command.main(
        [str(folder / "student"), "--output_dir", str(folder / "out"), "--format", "lora", "--dtype", "bfloat16"]
    )
    return contents(folder / "out")


def _card_text(folder: Path) -> str:
    return write_card(folder / "student", "me/student").read_text()


def _measured_student(folder: Path) -> None:
    export("lora", NEW, folder)
    shutil.copy(trained("lora") / "metrics.json", folder / "student")
    shutil.copy(references() / "evaluation.json", folder / "student")


def _reading(name: str, read: Callable[[Path], Any], rounds: int) -> DamageScene:
    files = ["student/*.*", "student/scheduler/*.json"]
    return DamageScene(name, _two_students, files, read, same_result, other="another", rounds=rounds)


KILLS = [
    *(over_an_older(kind, older) for kind in ("lora", "full") for older in (True, False)),
    rdm_export("lora", "lora"), rdm_export("lora", "comfyui"), rdm_export("lora", "full"), rdm_export("full", "full"),
    card(older=False), card(older=True), card(older=True, edited=True),
]  # fmt: skip
DAMAGE = [
    _reading("a student that is loaded", _drawn, rounds=1),
    _reading("a student that is exported", _again, rounds=1),
    DamageScene(
        "what a card is made from", _measured_student, ["student/*.json"], _card_text, same_result,
        kinds=("cut", "emptied", "zeroed"),
    ),
]  # fmt: skip
