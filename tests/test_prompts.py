"""Prompts are what their files say, or one sentence says why not; and a run goes on with the same ones alone."""

from __future__ import annotations

import codecs
import json
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, NamedSplit, Sequence, Value

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.evaluation.records import digest_of_texts
from rdm_diffusers.prompts import read_captions, read_prompts
from rdm_diffusers.tiny import TINY_NAME
from rdm_diffusers.training.prompts import load_prompts
from rdm_diffusers.training.run_folder import check_resumable

BATTERY = [["a cat", "a tom"], ["a dog"]]
DATA = Dataset.from_dict({"text": ["a cat", "a dog"], "label": [0, 1], "all": BATTERY})


def load(config: RunConfig) -> list[str]:
    """A run's prompts."""
    return load_prompts(config.prompts, config.teacher.pretrained_model_name_or_path)


def arguments(**changes) -> RunConfig:
    """What the parser makes of some flags; the teacher is a tiny one."""
    return parse_args([f"--{name}={value}" for name, value in changes.items()])


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + "a cät\na dög\n".encode(),
        codecs.BOM_UTF16_LE + "a cät\na dög".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "a cät\r\na dög".encode("utf-16-be"),
        codecs.BOM_UTF32_LE + "a cät\na dög".encode("utf-32-le"),
        b"a c\xc3\xa4t\ra d\xc3\xb6g",
        codecs.BOM_UTF8 + "a cät\r\n".encode() + codecs.BOM_UTF8 + " a dög".encode(),  # two files, joined
        "\n  \n a cät \t\r\n\r\n\u3000a dög\u2028\n \x0b\n".encode(),
    ],
    ids=["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32", "carriage returns", "joined", "blanks"],
)
def test_a_text_file_holds_one_prompt_a_line_however_it_is_encoded(content: bytes, tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path / "prompts.txt", content), "--prompts_file") == ["a cät", "a dög"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\xa0"])
def test_only_line_feeds_and_carriage_returns_end_a_prompt(character: str, tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.txt", f"a{character}cat\na dog")
    assert read_prompts(path, "--prompts_file") == [f"a{character}cat", "a dog"]
    path.rename(tmp_path / "captions.txt")
    assert read_captions(str(tmp_path / "captions.txt"), "text") == [[f"a{character}cat"], ["a dog"]]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a cat\r\na caf\xe9\n", "no UTF-8 text, because of the byte 0xe9 in line 2; convert it, .* iconv -f WINDOWS"),
        (
            codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"\0",
            "no UTF-16 text, because of the byte 0x00 in line",
        ),
        ("a cat\na dog".encode("utf-16-le"), "holds a NUL character in line 1, as UTF-16 without a byte-order mark"),
        (b"a cat\na\0dog\n", "holds a NUL character in line 2"),
        (b"", "holds no prompts; write one a line"),
        (codecs.BOM_UTF8 + b" \r\n\n", "holds no prompts; write one a line"),
    ],
    ids=["latin-1", "cut utf-16", "utf-16 unmarked", "nul", "empty", "blank"],
)
def test_what_is_no_text_is_refused_with_file_line_and_remedy(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.txt", content)
    with pytest.raises(ValueError, match=f"--prompts_file {re.escape(str(path))} .*{sentence}") as refused:
        load(arguments(prompts_file=path))
    assert "\n" not in str(refused.value)


def test_a_folder_is_no_prompts_file_and_a_table_belongs_to_another_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file; give a text file"):
        load(arguments(prompts_file=tmp_path))
    table = written(tmp_path / "captions.jsonl", '{"text": "a cat"}\n')
    with pytest.raises(ValueError, match=r"is a table, .* give it with --dataset_name and --caption_column"):
        load(arguments(prompts_file=table))
    assert load(arguments(dataset_name=table)) == ["a cat"]


def test_prompts_that_no_encoder_reads_to_their_end_are_warned_of_and_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.txt", "short\n" + "long " * 3000)
    with pytest.warns(UserWarning, match="holds 1 prompts of more than 10,000 characters, the first begins 'long"):
        assert read_prompts(path, "--prompts_file") == ["short", ("long " * 3000).strip()]


@pytest.mark.parametrize(
    "flags",
    [
        {"prompts_file": "a.txt", "dataset_name": "b"},
        {"dataset_split": "validation"},
        {"caption_column": "caption"},
        {"dataset_config_name": "en", "prompts_file": "a.txt"},
    ],
)
def test_a_flag_of_prompts_that_would_be_ignored_is_refused(flags: dict) -> None:
    with pytest.raises(ValueError, match=r"leave one of them out|would have no effect without --dataset_name"):
        load(arguments(**flags))


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "arrow", "txt", "saved", "saved dict"])
def test_a_dataset_may_be_one_file_or_a_folder_that_save_to_disk_wrote(kind: str, tmp_path: Path) -> None:
    place, rows = tmp_path / f"data.{kind}", DATA.select_columns(["text", "label"])
    if kind == "csv":
        rows.to_csv(place)
    elif kind == "tsv":
        rows.to_csv(place, sep="\t")
    elif kind == "json":
        place.write_text(json.dumps(rows.to_list()))
    elif kind == "jsonl":
        rows.to_json(place)
    elif kind == "parquet":
        rows.to_parquet(place)
    elif kind == "txt":
        place.write_text("a cat\na dog\n")
    elif kind == "saved":
        rows.save_to_disk(place)
    elif kind == "saved dict":
        DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(place)
    else:
        rows.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(place)
    assert load(arguments(dataset_name=place)) == ["a cat", "a dog"]


def damage_pictures(path: Path) -> None:
    """Makes the column of pictures unreadable, in place."""
    rows, content = pq.ParquetFile(path).metadata, bytearray(path.read_bytes())
    for group in range(rows.num_row_groups):
        columns = (rows.row_group(group).column(i) for i in range(rows.num_columns))
        for column in (column for column in columns if column.path_in_schema.startswith("image")):
            start = column.dictionary_page_offset or column.data_page_offset
            content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)


def write_pictures(folder: Path) -> Path:
    """A dataset of two parquet files whose pictures can be neither read nor decoded."""
    folder.mkdir()
    for i in range(2):
        rows = {"image": [{"bytes": os.urandom(10_000), "path": None}] * 6, "text": [f"{i} {j}" for j in range(6)]}
        features = Features({"image": Image(), "text": Value("string")})
        Dataset.from_dict(rows, features).to_parquet(folder / f"train-{i}.parquet", batch_size=2)
        damage_pictures(folder / f"train-{i}.parquet")
    return folder


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, slice(None)),
        ({"max_train_samples": 7}, slice(7)),
        ({"dataset_split": "train[25%:75%]"}, slice(3, 9)),
        ({"dataset_split": "train[-2:]", "max_train_samples": 1}, slice(10, 11)),
    ],
    ids=["all", "the first", "a slice", "the first of a slice"],
)
def test_of_parquet_files_only_the_captions_are_read(flags: dict, expected: slice, tmp_path: Path) -> None:
    folder, prompts = write_pictures(tmp_path / "data"), [f"{i} {j}" for i in range(2) for j in range(6)]
    assert load(arguments(dataset_name=folder, **flags)) == prompts[expected]
    if "dataset_split" not in flags:
        found = load(arguments(dataset_name=folder / "train-0.parquet", **flags))
        assert found == prompts[:6][expected]
    with pytest.raises(ValueError, match=r"--caption_column caption is not in .*; its columns are image, text\."):
        load(arguments(dataset_name=folder, caption_column="caption", **flags))


def test_a_split_can_be_chosen_by_the_names_that_others_give_the_flag(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(3)))
    for flag in ("dataset_split", "dataset_split_name", "dataset_train_split"):
        found = load(arguments(dataset_name=tmp_path, **{flag: "validation[:2]"}))
        assert found == ["validation 0", "validation 1"]
    saved = DatasetDict({"train": DATA, "test": DATA.select([1])})
    saved.save_to_disk(tmp_path / "saved")
    assert load(arguments(dataset_name=tmp_path / "saved", dataset_split="test")) == ["a dog"]
    Dataset.from_dict({"text": ["one"]}, split=NamedSplit("test")).save_to_disk(tmp_path / "alone")
    for split in ("train", "test"):  # it is what there is
        assert load(arguments(dataset_name=tmp_path / "alone", dataset_split=split)) == ["one"]
    for name in ("", "saved", "alone", "train.jsonl"):
        with pytest.raises(ValueError, match=r"--dataset_name .* cannot be read \(.*(split|Split).*\); check its name"):
            load(arguments(dataset_name=tmp_path / name, dataset_split="nothing"))


def test_of_a_row_with_several_captions_each_is_a_prompt_and_rows_without_are_counted(tmp_path: Path) -> None:
    DATA.to_json(tmp_path / "train.jsonl")
    assert load(arguments(dataset_name=tmp_path, caption_column="all")) == ["a cat", "a tom", "a dog"]
    rows = [["a cat", None, " "], None, [], ["a dog"]]
    Dataset.from_dict({"text": rows}, Features({"text": Sequence(Value("string"))})).to_parquet(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match=r"2 of 4 rows of .* have no text in text; they are left out"):
        assert load(arguments(dataset_name=tmp_path / "a.parquet")) == ["a cat", "a dog"]
    path = written(tmp_path / "mixed.json", '[{"text": "a cat"}, {"text": ["a dog", "a cur"]}]')
    assert load(arguments(dataset_name=path)) == ["a cat", "a dog", "a cur"]


@pytest.mark.parametrize(
    ("values", "feature", "sentence"),
    [
        ([1, 2], Value("int64"), "--caption_column text of .* holds int64, not text; choose another"),
        ([0, 1], ClassLabel(names=["cat", "dog"]), "holds int64, not text"),
        ([[1], [2]], Sequence(Value("int64")), "holds int64, not text"),
        ([{"en": "a cat"}], {"en": Value("string")}, "not text"),
        ([None, " "], Value("string"), "The column text of .* holds no prompts"),
    ],
    ids=["numbers", "classes", "lists of numbers", "records", "nothing"],
)
def test_captions_that_are_no_text_are_refused(values: list, feature, sentence: str, tmp_path: Path) -> None:
    Dataset.from_dict({"text": values}, Features({"text": feature})).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=sentence):
        load(arguments(dataset_name=tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"\xff\xfe\0"), ("a.json", b'[{"text": "a'), ("a.parquet", b"PAR1 and no more"), ("a.arrow", b"no"),
        ("a.pkl", b"cos\nsystem\n"), ("a.zip", b"PK"), ("saved/dataset_dict.json", b'{"splits": ["train"]}'),
        ("saved/dataset_dict.json", b"[]"), ("other/data.jsonl", b'{"text": "a cat"}\n{"text'), ("none", b""),
    ],
)  # fmt: skip
def test_a_dataset_that_cannot_be_read_is_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    written(path, content)
    place = path if path.parent == tmp_path else path.parent
    with pytest.raises(ValueError, match=r"--dataset_name .*(cannot be read|is damaged|is no .* text)") as refused:
        load(arguments(dataset_name=place))
    assert "\n" not in str(refused.value)


def test_a_damaged_folder_of_save_to_disk_is_one_sentence(tmp_path: Path) -> None:
    DATA.save_to_disk(tmp_path / "data")
    arrow = next((tmp_path / "data").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"--dataset_name .* (cannot be read|is damaged)"):
        load(arguments(dataset_name=tmp_path / "data"))


def saved_arguments(**flags) -> dict:
    """What a checkpoint holds of a run."""
    config = arguments(**flags)
    return json.loads(json.dumps(config.as_arguments() | {"prompts_sha256": digest_of_texts(load(config))}))


def resume(saved: dict, **flags) -> None:
    check_resumable(saved_arguments(**flags), saved)


def test_a_run_goes_on_with_the_same_prompts_wherever_they_are_and_with_no_others(tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.txt", "a cat\na dog\n")
    saved = saved_arguments(prompts_file=path)
    assert len(saved["prompts_sha256"]) == 64
    resume(saved, prompts_file=written(tmp_path / "copy.txt", "a cat\r\na dog"))
    resume(saved, prompts_file=written(tmp_path / "longer.txt", "a cat\na dog\na bird"), max_train_samples=2)
    resume(saved, dataset_name=written(tmp_path / "data.json", '[{"c": "a cat"}, {"c": "a dog"}]'), caption_column="c")
    written(path, "a cat\na dog\na bird\n")
    with pytest.raises(ValueError, match="was made with other arguments: other prompts; set them back or start a new"):
        resume(saved, prompts_file=path)
    with pytest.raises(ValueError, match=r"other arguments: .*--rank \(was 16, is 3\).*, other prompts; set"):
        resume(saved, prompts_file=path, rank=3)


def test_a_checkpoint_of_version_0_1_0_which_holds_no_digest_goes_on_by_the_old_rule(tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.txt", "a cat\n")
    saved = saved_arguments(prompts_file=path)
    del saved["prompts_sha256"], saved["dataset_split"]
    resume(saved, prompts_file=path)
    with pytest.raises(ValueError, match=r"--prompts_file \(was .*prompts.txt, is .*copy.txt\)"):
        resume(saved, prompts_file=written(tmp_path / "copy.txt", "a cat\n"))
    (tmp_path / "validation.json").write_text('[{"text": "a cat"}]')
    saved = {**saved, "prompts_file": None, "dataset_name": str(tmp_path)}
    with pytest.raises(ValueError, match=r"--dataset_split \(was train, is validation\)"):
        resume(saved, dataset_name=tmp_path, dataset_split="validation")


def test_the_tiny_teachers_own_captions_are_known_by_their_digest_too() -> None:
    assert resume(saved_arguments(), pretrained_model_name_or_path=TINY_NAME) is None
