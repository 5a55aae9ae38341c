"""Files that somebody else wrote: wrong types, bombs and patterns are one sentence each, with no traceback or wait."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from parts import make_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from rdm_diffusers import RdmDistillationPipeline
from rdm_diffusers.commands import card, export
from rdm_diffusers.families import LORA_FILE, pipeline_config
from rdm_diffusers.hub import check_complete, push, write_card
from rdm_diffusers.hub.card_text import license_of
from rdm_diffusers.pipelines import StudentConfig
from rdm_diffusers.pipelines.lora_file import MAX_HEADER, check_lora_file
from rdm_diffusers.training.exporting import read_run
from rdm_diffusers.untrusted import MAX_BYTES, parse_object, read_object

DEEP = 100_000
NEVER_ENDS = r"(a*)*b"  # on `aaaa...`
PATIENCE = 5.0  # seconds, on a machine that is busy


@pytest.fixture
def student(tiny_student: Path, tmp_path: Path) -> Path:
    """A copy of a student's folder."""
    return shutil.copytree(tiny_student, tmp_path / "student", ignore=shutil.ignore_patterns("checkpoint-*"))


def refusal(act, *words: Any) -> str:
    """The one sentence of a refusal, which does not take long."""
    start = time.monotonic()
    with pytest.raises((ValueError, ImportError)) as caught:
        act(*words)
    assert time.monotonic() - start < PATIENCE
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".") and len(said) < 700
    return said


def change(path: Path, **entries: Any) -> Path:
    """A JSON file with other entries; those with a dot in their name are inside of others."""
    record = json.loads(path.read_text())
    for name, value in entries.items():
        *outer, last = name.split("__")
        place = record
        for each in outer:
            place = place[each]
        place[last] = value
    path.write_text(json.dumps(record))
    return path


# --- any JSON file ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * DEEP + "]" * DEEP, "nested more than 32 deep"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "nested more than 32 deep"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested more than 32 deep"),
        ("[]", "a list instead of an object"),
        ("null", "null instead of an object"),
        ("", "JSONDecodeError: Expecting value"),
        ('{"a": NaN}', "nan, which is not finite"),
        ('{"a": [-Infinity]}', "-inf, which is not finite"),
        ('{"a": 1e999}', "inf, which is not finite"),
        ('{"a": ' + "9" * 50 + "}", "a whole number of more than 64 bits"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"a": "\\ud800"}', "UnicodeEncodeError"),
    ],
)
def test_json_is_small_flat_finite_and_an_object(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    said = refusal(read_object, tmp_path / "x.json", "send it again")
    assert (
        said.startswith(f"{tmp_path / 'x.json'} is damaged (") and said.endswith("; send it again.") and reason in said
    )


def test_what_is_no_file_or_too_large_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "giant", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    for name, reason in {"pipe": "no file", "giant": "more than", "gone": "missing", "latin": "UnicodeDecode"}.items():
        assert reason in refusal(read_object, tmp_path / name, "send it again")


def test_what_diffusers_itself_writes_is_read() -> None:
    assert parse_object('{"lambda_min_clipped": -Infinity}', finite=False)["lambda_min_clipped"] < 0


# --- rdm_config.json -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("format_version", "x", "format_version is text instead of a whole number"),
        ("format_version", True, "format_version is true or false"),
        ("format_version", 0, "format_version is 0"),
        ("base_model_name_or_path", ["tiny"], "base_model_name_or_path is a list instead of text or null"),
        ("pipeline_class", None, "pipeline_class is null instead of text"),
        ("num_inference_steps", "4", "num_inference_steps is text"),
        ("num_inference_steps", 10**9, "num_inference_steps is 1000000000, and should be from 1 to 1000"),
        ("scheduler", [], "scheduler is a list"),
        ("scheduler__num_train_timesteps", 10**12, "scheduler's num_train_timesteps is 1000000000000"),
        ("scheduler__beta_start", "x", "scheduler's beta_start is text instead of a number"),
        ("scheduler__beta_end", float("nan"), "scheduler's beta_end is nan instead of a number"),
        ("scheduler__student_timesteps", [{}], "scheduler's student_timesteps should hold numbers"),
        (
            "scheduler__student_timesteps",
            [10**9, 1],
            "scheduler's student_timesteps should hold numbers from 0 to 1000",
        ),
        ("call_arguments__height", 80_000, "call_arguments' height is 80000, and should be from 8 to 8192"),
        ("call_arguments__width", "x", "call_arguments' width is text"),
        ("call_arguments__guidance_scale", float("inf"), "call_arguments' guidance_scale is inf"),
        ("call_arguments__guidance_scale", "__import__('os')", "call_arguments' guidance_scale is text"),
        ("call_arguments__num_images_per_prompt", 10**6, "call_arguments has 'num_images_per_prompt'"),
        ("license", {"license": 3}, "license's license is a whole number instead of text"),
        ("training", "x", "training is text"),
        ("training__arguments", [], "training's arguments is a list"),
        ("training__arguments__reward", [3], "training's argument reward should hold text"),
        ("training__arguments__train_batch_size", "8", "training's argument train_batch_size is text"),
        ("vae", {"a": 1}, "vae is an object"),
        ("revision", 3, "revision is a whole number"),
    ],
)
def test_a_students_configuration_of_wrong_types_or_sizes_names_the_entry(
    student: Path, entry: str, value: Any, reason: str
) -> None:
    path = change(student / "rdm_config.json", **{entry: value})
    said = refusal(StudentConfig.load, str(student))
    assert said.startswith(f"{path} is damaged ({reason}")
    assert said.endswith("; download or export the student again.")


def test_a_newer_students_entries_are_not_judged(student: Path) -> None:
    change(student / "rdm_config.json", format_version=3, version="9.9", scheduler="elsewhere")
    assert "was made by rdm-diffusers 9.9, which is newer" in refusal(StudentConfig.load, str(student))


# --- the LoRA's file -------------------------------------------------------------------------------------------------
def with_adapter(student: Path, **entries: Any) -> Path:
    """The student's LoRA with other entries in its adapter's description."""
    path = student / LORA_FILE
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    header |= {f"unet.{name}" if name != "text_encoder.r" else name: value for name, value in entries.items()}
    save_file(load_file(path), path, {LORA_ADAPTER_METADATA_KEY: json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"target_modules": NEVER_ENDS}, "target_modules is text instead of a list"),
        ({"target_modules": [NEVER_ENDS]}, f"target_modules hold '{NEVER_ENDS}', which is no module's name"),
        ({"rank_pattern": {NEVER_ENDS: 2}}, "rank_pattern is"),
        ({"alpha_pattern": {NEVER_ENDS: 2}}, "alpha_pattern is"),
        ({"exclude_modules": NEVER_ENDS}, "exclude_modules is"),
        ({"modules_to_save": [NEVER_ENDS]}, "modules_to_save is"),
        ({"layers_to_transform": 0}, "layers_to_transform is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', and no student's is"),
        ({"use_rslora": True}, "use_rslora is 'True'"),
        ({"r": 10**9}, "r is 1000000000, and should be from 1 to 16384"),
        ({"r": 3}, "is of rank 2, and its adapter of 3"),
        ({"r": "2"}, "r is text instead of a whole number"),
        ({"lora_alpha": float("nan")}, "nan, which is not finite"),
        ({"lora_alpha": [1]}, "lora_alpha is a list"),
        ({"text_encoder.r": 4}, "describes 'text_encoder.r', which is not the unet's"),
        ({"revision": "x" * MAX_HEADER}, "more than 1048576 characters"),
    ],
)
def test_a_lora_that_would_have_peft_do_more_than_add_it_is_refused_by_all(
    student: Path, tmp_path: Path, entries: dict[str, Any], reason: str
) -> None:
    path = with_adapter(student, **entries)
    said = refusal(check_lora_file, path, "unet")
    assert said.startswith(f"{path} is missing or damaged (") and reason in said
    assert refusal(push.push_student, student, "me/x") == said
    words = [str(student), "--format", "full", "--output_dir", str(tmp_path / "out")]
    assert refusal(export.main, words) == said


def test_a_lora_with_a_pattern_is_not_loaded_either(student: Path) -> None:
    path = with_adapter(student, alpha_pattern={NEVER_ENDS: 2})
    assert str(path) in refusal(RdmDistillationPipeline.from_pretrained, student)
    assert str(path) in refusal(RdmDistillationPipeline.from_pipe, make_pipeline(), student)


def test_a_lora_of_a_newer_peft_says_so(student: Path) -> None:
    assert "'mood', which this peft does not know; upgrade" in refusal(
        check_lora_file, with_adapter(student, mood="good"), "unet"
    )


@pytest.mark.parametrize("name", ["unet.(a*)*b.lora_A.weight", "text_encoder.q.lora_A.weight", "unet.conv.weight"])
def test_tensors_that_are_no_loras_of_the_network_are_refused(student: Path, name: str) -> None:
    path = student / LORA_FILE
    save_file({name: torch.zeros(2, 4)}, path)
    assert "which is no matrix of a LoRA of the unet" in refusal(check_lora_file, path, "unet")


@pytest.mark.parametrize("length", [10, 2**40, 2**63])
def test_a_giant_header_of_weights_is_not_read(student: Path, length: int) -> None:
    (student / LORA_FILE).write_bytes(struct.pack("<Q", length) + b"{}")
    assert f"{student / LORA_FILE} is" in refusal(push.push_student, student, "me/x")
    assert f"{student / LORA_FILE} is" in refusal(write_card, student)


# --- the other files that a card, a push or an export reads -----------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["rdm_config.json", "metrics.json", "evaluation.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("text", ["[" * DEEP, "[1]", '{"student": 5}', "\x00"])
def test_a_damaged_file_is_named_by_the_card_and_the_old_card_stays(student: Path, name: str, text: str) -> None:
    before = (student / "README.md").read_text()
    (student / name).write_text(text)
    assert refusal(card.main, [str(student), "--overwrite"]).startswith(f"{student / name} is damaged (")
    assert (student / "README.md").read_text() == before


@pytest.mark.parametrize(
    "entries", [{"student": 5}, {"student__nfe": "x"}, {"teacher": {}}, {"prompts": [3]}, {"prompts": {"a": 1}},
                {"arguments": None}, {"student__num_images": 5, "student__fd_to_data": "near"}]
)  # fmt: skip
def test_metrics_of_wrong_types_are_one_sentence(student: Path, entries: dict[str, Any]) -> None:
    path = change(student / "metrics.json", **entries)
    assert refusal(write_card, student).startswith(f"{path} is damaged (")


@pytest.mark.parametrize("metrics", [{"fd": {}}, {"rewards": {"a": 3}}, {"fd": "x"}, {"fd": [1]}, 5])
def test_an_evaluation_of_wrong_types_is_one_sentence(student: Path, metrics: Any) -> None:
    settings = {"features": None, "num_images": 5}
    record = {"settings": settings, "metrics": metrics, "subject": {}, "context": {"arguments": {}}}
    (student / "evaluation.json").write_text(json.dumps(record))
    assert refusal(write_card, student).startswith(f"{student / 'evaluation.json'} is damaged (")


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"_class_name": "os.system"}, "it names no scheduler of diffusers"),
        ({"_class_name": "UNet2DConditionModel"}, "it names no scheduler of diffusers"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000"),
        ({"beta_start": []}, "beta_start is a list"),
    ],
)
def test_a_stock_scheduler_that_is_none_is_refused(student: Path, entries: dict[str, Any], reason: str) -> None:
    path = change(student / "scheduler" / "scheduler_config.json", **entries)
    assert (
        refusal(check_complete, student)
        == f"{path} is damaged ({reason}" + refusal(write_card, student).split(reason)[1]
    )


@pytest.mark.parametrize(
    "changes", [{"_class_name": 5}, {"_class_name": None}, {"unet": "x"}, {"unet": [["a"], "b"]},
                {"unet": ["diffusers", 5]}, {"vae": [None, None]}, {"vae": ["diffusers", "X()"]},
                {"a b": ["diffusers", "X"]}, {"x=1": [None, None]}]
)  # fmt: skip
def test_a_model_index_that_names_no_classes_is_one_sentence(
    teacher_folder: Path, tmp_path: Path, changes: Any
) -> None:
    index = json.loads((teacher_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
    said = refusal(pipeline_config, str(tmp_path))
    assert said == f"{tmp_path / 'model_index.json'} is damaged (it does not name classes); save or download it again."


@pytest.mark.parametrize(
    "head", ["\n" * 200_000, "[" * 50_000, "a: &a [x]\nb: &b [*a, *a]\nlicense: mit",
             "license: !!python/name:os.system", "license_link: javascript://x"]
)  # fmt: skip
def test_a_card_that_was_made_to_hang_its_reader_tells_no_licence(tmp_path: Path, head: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    start = time.monotonic()
    assert license_of(str(tmp_path)) == {}
    assert time.monotonic() - start < PATIENCE


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("[" * DEEP, "nested more than 32 deep"),
        ({"arguments": []}, "arguments is a list instead of an object"),
        ({"arguments": {"rank": 10**9}}, "--rank is 1000000000"),
        ({"arguments": {"rank": "4"}}, "argument rank is text"),
        ({"arguments": {"pretrained_model_name_or_path": None}}, "pretrained_model_name_or_path is null"),
        ({"arguments": {"resolution": 80_000}}, "--resolution is 80000"),
        ({"update": "x"}, "update is text"),
    ],
)
def test_a_checkpoints_record_is_looked_through_before_it_is_exported(tmp_path: Path, record: Any, reason: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    said = refusal(read_run, tmp_path)
    assert (
        said.startswith(f"{path} is damaged (") and reason in said and said.endswith("; export an earlier checkpoint.")
    )


# --- a student's weights ---------------------------------------------------------------------------------------------
def test_weights_that_are_not_those_that_were_exported_are_warned_of_by_all(student: Path, tmp_path: Path) -> None:
    path = student / LORA_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])  # one bit of one number
    readers = [
        lambda: RdmDistillationPipeline.from_pretrained(student),
        lambda: RdmDistillationPipeline.from_lora("tiny", student),
        lambda: check_complete(student),
        lambda: export.main([str(student), "--output_dir", str(tmp_path / "out"), "--format", "comfyui"]),
    ]
    for reader in readers:
        with pytest.warns(UserWarning, match="was changed since it was exported, as weights_sha256"):
            reader()


@pytest.mark.parametrize("file", ["rdm_config.json", "scheduler/scheduler_config.json"])
def test_settings_that_are_not_those_that_were_exported_are_warned_of(student: Path, file: str) -> None:
    path = student / file
    path.write_text(path.read_text().replace('"beta_end": 0.012', '"beta_end": 0.013'))
    with pytest.warns(UserWarning, match=f"{path} was changed since it was exported"):
        check_complete(student)


def test_files_as_they_were_exported_and_those_of_version_0_1_0_are_not_warned_of(student: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_complete(student)
        config = json.loads((student / "rdm_config.json").read_text())
        of_0_1_0 = {name: value for name, value in config.items() if not name.endswith("sha256") and name != "digest"}
        (student / "rdm_config.json").write_text(json.dumps(of_0_1_0))
        (student / LORA_FILE).write_bytes(save(load_file(student / LORA_FILE)))
        check_complete(student)


def test_weights_of_another_precision_have_a_digest_of_their_own(student: Path, tmp_path: Path) -> None:
    export.main([str(student), "--output_dir", str(tmp_path / "half"), "--format", "lora", "--dtype", "bfloat16"])
    digests = [StudentConfig.load(str(folder)).weights_sha256 for folder in (student, tmp_path / "half")]
    assert all(digests) and digests[0] != digests[1]
    check_complete(tmp_path / "half")
