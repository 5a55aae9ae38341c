"""`rdm-export`: from a checkpoint, a student's folder or the Hub, to a LoRA, a whole pipeline or a file for ComfyUI."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import modeling_utils
from parts import PROMPTS, files_of_at_most, run_arguments
from parts_families import CALLS, MAKERS, make_pipeline
from parts_sd3 import make_shared
from safetensors.torch import load_file
from torch import Tensor

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.commands import export as command
from rdm_diffusers.families import FAMILIES, LORA_FILE, PromptOptions, load_teacher
from rdm_diffusers.hub import export_lora
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.training.assembly import make_scheduler

RUN = dict(checkpointing_steps=1, lora_alpha=6, ema_decay=0.5)
RUN_FULL = dict(checkpointing_steps=1, ema_decay=0.5, rank=None)


@pytest.fixture(scope="module")
def lora_run(teacher_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a LoRA student, with two checkpoints and a moving average; rank and alpha differ."""
    folder = tmp_path_factory.mktemp("run") / "lora"
    train_rdm_lora.main(run_arguments(teacher_folder, prompts_file, folder, **RUN))
    return folder


@pytest.fixture(scope="module")
def full_run(teacher_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a full student, without a moving average."""
    folder = tmp_path_factory.mktemp("run") / "full"
    options = {**RUN_FULL, "no-use_ema": True}
    train_rdm_full.main(run_arguments(teacher_folder, prompts_file, folder, **options))
    return folder


def export(source: Path | str, target: Path, kind: str, *options: str) -> Path:
    return command.main([str(source), "--format", kind, "--output_dir", str(target), *options])


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by file and name; those for ComfyUI by `comfyui`, as their file's name may differ."""
    files = [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path.relative_to(folder))]
    parts = {path: "comfyui" if path.parent.name == "comfyui" else str(path.relative_to(folder)) for path in files}
    return {f"{part}/{name}": tensor for path, part in parts.items() for name, tensor in load_file(path).items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def draw(pipeline, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(6)
    return pipeline(prompt=list(PROMPTS[:2]), output_type="pt", **options).images


# --- what comes out is what the run wrote ----------------------------------------------------------------------------
def test_the_last_checkpoint_of_a_lora_run_is_what_the_run_exported(lora_run: Path, tmp_path: Path) -> None:
    folder = export(lora_run / "checkpoint-2", tmp_path / "new", "lora")
    assert_equal(tensors_of(folder), tensors_of(lora_run))
    for name in ("rdm_config.json", "scheduler/scheduler_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((lora_run / name).read_text())
    pictures = draw(RdmDistillationPipeline.from_pretrained(folder))
    assert torch.equal(pictures, draw(RdmDistillationPipeline.from_pretrained(lora_run)))


def test_the_last_checkpoint_of_a_full_run_is_what_the_run_exported(full_run: Path, tmp_path: Path) -> None:
    folder = export(full_run / "checkpoint-2", tmp_path / "new", "full")
    assert_equal(tensors_of(folder), tensors_of(full_run))
    config = json.loads((full_run / "rdm_config.json").read_text())
    assert json.loads((folder / "rdm_config.json").read_text()) == config


def test_an_earlier_checkpoint_is_another_student(lora_run: Path, tmp_path: Path) -> None:
    first, last = (tensors_of(export(lora_run / f"checkpoint-{i}", tmp_path / str(i), "lora")) for i in (1, 2))
    assert first.keys() == last.keys()
    assert any((first[name] - last[name]).abs().max() > 1e-3 for name in first)


@pytest.mark.parametrize("kind", ["lora", "comfyui", "full"])
def test_a_students_folder_gives_what_its_checkpoint_gives(kind: str, lora_run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "student", tmp_path / "b" / "student"]
    for source, folder in zip((lora_run, lora_run / "checkpoint-2"), folders, strict=True):
        export(source, folder, kind)
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in folders]
    shown = {
        "samples.png",
        "metrics.json",
        "pictures",
        "pictures/0.png",
        "pictures/1.png",
    }  # of a finished student only
    assert files[0] - files[1] == (set() if kind == "comfyui" else shown) and not files[1] - files[0]
    assert_equal(*(tensors_of(folder) for folder in folders))


def test_one_file_is_written_for_comfyui_as_in_the_students_folder(lora_run: Path, tmp_path: Path) -> None:
    folder = export(lora_run, tmp_path / "for-comfyui", "comfyui")
    assert [path.name for path in folder.iterdir()] == ["for-comfyui.safetensors"]
    own = load_file(lora_run / "comfyui" / f"{lora_run.name}.safetensors")
    assert_equal(load_file(folder / "for-comfyui.safetensors"), own)


def test_average_and_raw_weights_are_told_apart(lora_run: Path, tmp_path: Path) -> None:
    source = lora_run / "checkpoint-2"
    kinds = {"default": [], "average": ["--use_ema"], "raw": ["--no-use_ema"]}
    weights = {
        kind: load_file(export(source, tmp_path / kind, "lora", *options) / LORA_FILE)
        for kind, options in kinds.items()
    }
    assert_equal(weights["default"], weights["average"])
    assert any(not torch.equal(weights["average"][name], weights["raw"][name]) for name in weights["raw"])
    trained = {k: v for k, v in load_file(source / "student.safetensors").items() if k.startswith("parameter/")}
    sums = [sorted(tensor.sum().item() for tensor in tensors.values()) for tensors in (trained, weights["raw"])]
    assert sums[0] == sums[1] and len(trained) == len(weights["raw"])


def test_checkpoints_older_than_an_argument_are_read(lora_run: Path, tmp_path: Path) -> None:
    old = shutil.copytree(lora_run / "checkpoint-2", tmp_path / "checkpoint-2")
    record = json.loads((old / "state.json").read_text())
    for name in ("student", "quantization", "variant", "eta", "pretrained_vae_model_name_or_path", "lora_layers"):
        del record["arguments"][name]
    del record["digest"]
    (old / "state.json").write_text(json.dumps(record))
    assert_equal(tensors_of(export(old, tmp_path / "new", "lora")), tensors_of(lora_run))


def test_a_run_of_relative_folders_is_exported_from_anywhere(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(teacher_folder.parent)
    vae = {"pretrained_vae_model_name_or_path": f"{teacher_folder.name}/vae"}
    train_rdm_lora.main(run_arguments(teacher_folder.name, prompts_file, tmp_path / "run", **RUN, **vae))
    monkeypatch.chdir(tmp_path)
    assert_equal(tensors_of(export("run/checkpoint-2", Path("new"), "lora")), tensors_of(tmp_path / "run"))
    for folder in ("run", "new"):
        student = json.loads((tmp_path / folder / "rdm_config.json").read_text())
        names = [student[name] for name in ("base_model_name_or_path", "vae")]
        assert names == [str(teacher_folder), str(teacher_folder / "vae")]


def test_the_relative_folder_of_an_autoencoder_is_written_by_its_full_path(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(teacher_folder)
    teacher = load_teacher(str(teacher_folder), torch.float32, vae="vae")
    export_lora(
        tmp_path, teacher, make_shared(teacher, rank=2, alpha=5).student_weights(), make_scheduler(teacher, 4, 1.0)
    )
    assert json.loads((tmp_path / "rdm_config.json").read_text())["vae"] == str(teacher_folder / "vae")


# --- whole pipelines -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in MAKERS if FAMILIES[name].has_lora])
def test_a_fused_pipeline_is_stock_and_draws_the_students_pictures(name: str, tmp_path: Path) -> None:
    make_pipeline(name).save_pretrained(tmp_path / "teacher")
    call = CALLS.get(name, {})
    options = PromptOptions(call.get("max_sequence_length"), call.get("height"), 3.5)
    teacher = load_teacher(str(tmp_path / "teacher"), torch.float32, options=options)
    (tmp_path / "student").mkdir()
    weights = make_shared(teacher, rank=2, alpha=5).student_weights()
    export_lora(tmp_path / "student", teacher, weights, make_scheduler(teacher, 4, eta=1.0))
    folder = export(tmp_path / "student", tmp_path / "full", "full")
    student = RdmDistillationPipeline.from_pretrained(tmp_path / "student")
    shutil.rmtree(tmp_path / "teacher")
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "StableDiffusion3Pipeline" else {}
    stock = DiffusionPipeline.from_pretrained(folder, **absent)
    told = {"num_inference_steps": 4, **student.student.call_arguments}
    assert type(stock) is getattr(diffusers, name)
    assert (draw(student) - draw(stock, **told)).abs().max() < 1e-4
    assert (draw(RdmDistillationPipeline.from_pretrained(folder)) - draw(student)).abs().max() < 1e-4
    assert_stock(folder)


def assert_stock(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    libraries = {entry[0] for entry in index.values() if isinstance(entry, list) and not isinstance(entry[0], int)}
    assert libraries <= {"diffusers", "transformers", None}
    assert hasattr(diffusers, index["scheduler"][1]) and not list(folder.rglob("*.py"))
    assert not any("lora" in name for name in tensors_of(folder))


@pytest.mark.parametrize(("kind", "count"), [("lora", 1), ("comfyui", 1), ("full", 3)])
def test_weights_are_written_in_the_precision_that_is_asked_for(
    kind: str, count: int, lora_run: Path, tmp_path: Path
) -> None:
    folder = export(lora_run, tmp_path / "new", kind, "--dtype", "bfloat16")
    files = [path for path in folder.rglob("*.safetensors") if path.parent.name != "comfyui"]
    assert len(files) == count
    for path in files:
        tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("alpha")}
        assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}
    exact = tensors_of(export(lora_run, tmp_path / "exact", kind))
    assert {tensor.dtype for tensor in exact.values() if tensor.is_floating_point()} == {torch.float32}
    if kind == "full":
        rounded = tensors_of(folder)
        assert all(torch.equal(rounded[name], exact[name].to(rounded[name].dtype)) for name in exact)


def test_a_whole_pipeline_is_written_without_a_warning(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning", said.append)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = export(lora_run, tmp_path / "new", "full", "--dtype", "float16")
    assert not said and not [each for each in caught if "scheduler" in str(each.message)]
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["steps_offset"] == 1


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.fixture
def places(lora_run: Path, full_run: Path, tmp_path: Path) -> dict[str, str]:
    """Sources that are something else, or broken."""
    damaged = shutil.copytree(lora_run / "checkpoint-2", tmp_path / "in" / "checkpoint-2")
    (damaged / "ema.safetensors").write_bytes(b"x")
    unreadable = shutil.copytree(lora_run / "checkpoint-1", tmp_path / "in" / "checkpoint-1")
    (unreadable / "state.json").write_text("{")
    student = shutil.copytree(lora_run, tmp_path / "in" / "student", ignore=shutil.ignore_patterns("checkpoint-*"))
    (student / LORA_FILE).write_bytes(b"x")
    without = {"no scheduler": (lora_run, "scheduler"), "no vae": (full_run, "vae")}
    for name, (run, part) in without.items():
        shutil.copytree(run, tmp_path / "in" / name, ignore=shutil.ignore_patterns("checkpoint-*", part))
    unfinished = tmp_path / "in" / "run"
    shutil.copytree(lora_run / "checkpoint-1", unfinished / "checkpoint-1")
    (tmp_path / "in" / "nothing").mkdir()
    return {
        **{name: str(tmp_path / "in" / name) for name in without},
        "lora": str(lora_run), "lora checkpoint": str(lora_run / "checkpoint-2"),
        "full": str(full_run), "full checkpoint": str(full_run / "checkpoint-2"),
        "damaged": str(damaged), "unreadable": str(unreadable), "broken": str(student), "run": str(unfinished),
        "nothing": str(tmp_path / "in" / "nothing"), "missing": str(tmp_path / "in" / "nothing" / "missing"),
        "checkpoint-3": str(unfinished / "checkpoint-3"), "no name": str(tmp_path / "nowhere" / "student"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "kind", "options", "sentence"),
    [
        ("full", "lora", [], r"holds a full student, which cannot become a LoRA; export it with --format full\."),
        ("full checkpoint", "comfyui", [], r"holds a full student, which cannot become a LoRA"),
        ("full checkpoint", "full", ["--use_ema"], r"has no moving average .*; leave --use_ema out\."),
        ("lora", "lora", ["--use_ema"], r"is a finished student with one set of weights; leave --use_ema"),
        ("lora", "lora", ["--no-use_ema"], r"is a finished student with one set of weights"),
        ("damaged", "lora", [], r"is damaged \(ema.safetensors changed since it was written\); export an earlier"),
        ("unreadable", "lora", [], r"is damaged \(JSONDecodeError.*\); export an earlier checkpoint\."),
        ("broken", "full", [], r"pytorch_lora_weights.safetensors is missing or damaged .*; download or export"),
        ("no scheduler", "lora", [], r"scheduler_config.json is missing; download or export the student again\."),
        ("no scheduler", "full", [], r"scheduler_config.json is missing; download or export the student again\."),
        ("no vae", "full", [], r"no vae/vae is missing; download or export the student again\."),
        ("run", "lora", [], r"neither a checkpoint \(state.json\) nor a finished student; .*checkpoint-1 is a check"),
        ("nothing", "lora", [], r"neither a checkpoint .* nor a finished student; give a checkpoint-N folder"),
        ("missing", "lora", [], r"in/nothing holds no folder missing; check the name, or call from another folder\."),
        ("checkpoint-3", "lora", [], r"in/run holds no folder checkpoint-3; its checkpoints are checkpoint-1\."),
        ("no name", "lora", [], r"The student .* is neither a local folder nor a valid Hub id; check its name"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused_in_one_sentence_and_leaves_nothing(
    source: str, kind: str, options: list[str], sentence: str, places: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        export(places[source], tmp_path / "out", kind, *options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_that_holds_something_is_not_overwritten(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = export(lora_run, tmp_path / "empty", "comfyui")
    before = sorted(folder.iterdir())
    for target in (folder, before[0]):
        with pytest.raises(ValueError, match=r"--output_dir .* is not empty; choose another\."):
            export(lora_run, target, "lora")
    assert sorted(folder.iterdir()) == before


def test_a_place_that_cannot_be_written_is_named(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--output_dir .* cannot be written \(.*\); choose another\."):
        export(lora_run, tmp_path / "file" / "new", "lora")


@pytest.mark.parametrize("kind", ["lora", "comfyui", "full"])
@pytest.mark.parametrize("source", [".", "checkpoint-2"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(kind: str, source: str, lora_run: Path, tmp_path: Path) -> None:
    with (
        files_of_at_most(4096),
        pytest.raises(OSError, match=r"could not be written .* nothing is left of it; free some space and export a"),
    ):
        export(lora_run / source, tmp_path / "out", kind)
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_no_longer_the_runs_is_refused(lora_run: Path, tmp_path: Path) -> None:
    from parts import make_pipeline as make_sd

    checkpoint = shutil.copytree(lora_run / "checkpoint-2", tmp_path / "in" / "checkpoint-2")
    make_sd(width=32).save_pretrained(tmp_path / "in" / "wider")
    record = json.loads((checkpoint / "state.json").read_text())
    record["arguments"]["pretrained_model_name_or_path"] = str(tmp_path / "in" / "wider")
    del record["digest"]
    (checkpoint / "state.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"does not fit .*wider \(a tensor is .*\); is that still the teacher"):
        export(checkpoint, tmp_path / "out", "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_console_script_says_what_is_wrong_in_one_line(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["rdm-export", str(tmp_path), "--format", "lora", "--output_dir", "x"])
    with pytest.raises(SystemExit, match=r"^error: .* holds neither a checkpoint"):
        command.run()


def test_the_card_of_a_checkpoint_tells_what_was_taken_of_it(lora_run: Path, tmp_path: Path) -> None:
    cards = {}
    for option in ("--use_ema", "--no-use_ema"):
        cards[option] = (export(lora_run / "checkpoint-1", tmp_path / option, "lora", option) / "README.md").read_text()
    assert "| moving average | decay" in cards["--use_ema"] and "moving average" not in cards["--no-use_ema"]
    assert all("| updates | 1, of 8 samples |" in card for card in cards.values())
