"""`benchmarks/peers.py`: students of other projects' code are measured as ours are."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import LCMScheduler, StableDiffusionPipeline

from rdm_diffusers.tiny import TINY_TEACHER

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from peers import METRICS, Run, as_table, measure_run, read_run, summarise

RUN = Run(
    name="a peer", version="1.0", source="https://example.org", licence="Apache-2.0", teacher="tiny", variant="plain",
    command="python train.py --seed 3 --rate 1", changes=[], num_inference_steps=2, call_options={}, seed=3, updates=10,
    network_calls={"student forward": 20}, seconds=1.0,
)  # fmt: skip


def test_a_stock_pipeline_is_measured_once_and_in_the_same_way(tmp_path: Path) -> None:
    student = StableDiffusionPipeline.from_pretrained(TINY_TEACHER)
    student.scheduler = LCMScheduler.from_config(student.scheduler.config)
    for name in ("a", "b"):
        student.save_pretrained(tmp_path / name / "student")
    first = measure_run(tmp_path / "a", RUN, 24)
    assert first == measure_run(tmp_path / "b", RUN, 24)
    assert {"fd_to_teacher", "fd_to_data", "prompt_accuracy"} <= set(first)
    (tmp_path / "a" / "student" / "model_index.json").unlink()
    assert measure_run(tmp_path / "a", RUN, 24) == first


def test_seeds_of_one_variant_are_one_row_with_their_mean_and_its_standard_error() -> None:
    other = replace(RUN, seed=4, command="python train.py --seed 4 --rate 1", seconds=2.0)
    apart = replace(RUN, variant="quick")
    values = ((other, 3.0), (apart, 9.0), (RUN, 1.0))
    rows = summarise([(run, dict.fromkeys(METRICS, value)) for run, value in values])
    row = next(row for row in rows if row["variant"] == "plain")
    assert len(rows) == 2 and row["seeds"] == [3, 4] and row["command"] == "python train.py --seed SEED --rate 1"
    assert row["mean"] == dict.fromkeys(METRICS, 2.0)
    assert row["standard_error"] == dict.fromkeys(METRICS, pytest.approx(1.0))
    assert "| a peer | tiny | plain | 20 | 2 | 2.00 ± 1.00 |" in as_table(rows)
    assert "| a peer | tiny | quick | 20 | 1 | 9.00 |" in as_table(rows)


def test_a_description_with_a_wrong_field_or_an_unknown_teacher_is_refused(tmp_path: Path) -> None:
    for fields, said in (({**vars(RUN), "rate": 1}, "rate"), ({**vars(RUN), "teacher": "huge"}, "use one of tiny")):
        (tmp_path / "peer.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=said):
            read_run(tmp_path)
