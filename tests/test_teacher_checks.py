"""What a teacher cannot do is refused by its configurations, before any of its weights are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from parts import run_arguments
from parts_configs import write_configs
from parts_families import CALLS, MAKERS, make_pipeline
from torch import nn

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import FAMILIES, PromptOptions
from rdm_diffusers.training.assembly import lora_config
from rdm_diffusers.training.finite import NonFiniteError
from rdm_diffusers.training.optimizers import RoleOptimizer
from rdm_diffusers.training.teacher_checks import check_layers, check_with_teacher


@pytest.fixture(scope="module")
def no_weights(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that cannot be loaded, because all but its configurations is missing."""
    folder = tmp_path_factory.mktemp("no-weights") / "teacher"
    return Path(shutil.copytree(teacher_folder, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def complaint(no_weights: Path, prompts_file: Path, tmp_path: Path):
    """What a run of that teacher says, in one line."""

    def run(script=train_rdm_lora, **changes) -> str:
        changes = {"rank": None, **changes} if script is train_rdm_full else changes
        with pytest.raises(ValueError) as caught:
            script.main(run_arguments(no_weights, prompts_file, tmp_path / "student", **changes))
        said = str(caught.value)
        assert "\n" not in said and said.endswith(".")
        return said

    return run


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ("to_q, to_kk", "to_kk (did you mean to_k"),
        ("to_q,,to_k", "an empty name"),
        ("attn1", "attn1 (did you mean attn1.to_"),
        ("to_q,to_v,norm1", "norm1, which no linear"),
        ("all-linear", "all-linear (did you mean linear_"),
        ("zzz", "zzz, which no linear"),
    ],
)
def test_layers_that_the_network_does_not_have_are_named_with_those_that_it_has(
    complaint, layers: str, named: str
) -> None:
    said = complaint(lora_layers=layers)
    assert said.startswith(f"--lora_layers names {named}")
    assert "which no linear or convolutional layer of this UNet2DConditionModel is called; it has " in said
    assert said.split("; it has ")[1].rstrip(".").split(", ").count("to_out.0") == 1


def test_every_name_of_a_list_of_layers_gets_its_lora(teacher_folder: Path) -> None:
    args = parse_args(
        ["--pretrained_model", str(teacher_folder), "--lora_layers", "attn1.to_q, to_out.0", "--rank", "2"]
    )
    assert check_with_teacher(args) is None
    names = lora_config(FAMILIES["StableDiffusionPipeline"], args.student).target_modules
    assert names == {"attn1.to_q", "to_out.0"}


def test_a_rank_that_no_adapted_layer_holds_is_refused(complaint) -> None:
    assert complaint(rank=1000).startswith(
        "--rank is 1000; no adapted layer of this UNet2DConditionModel holds more, so"
    )
    network = nn.Sequential(nn.Linear(300, 100), nn.Conv2d(10, 400, 3))
    assert check_layers(network, ["0"], 100) is None and check_layers(network, ["0", "1"], 100) is None
    with pytest.raises(ValueError, match="--rank is 101; no adapted layer of this Sequential holds more"):
        check_layers(network, ["0", "1"], 101)


@pytest.mark.parametrize("script", [train_rdm_lora, train_rdm_full])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"resolution": 30},
            "This teacher draws no pictures of 30 x 30 pixels, because each side must be",
        ),
        ({"max_sequence_length": 77}, "A StableDiffusionPipeline reads a fixed number of tokens; leave"),
        ({"num_student_steps": 463, "eta": 0}, "--num_student_steps is 463, for which the stock scheduler of --eta 0"),
        ({"attention_backend": "sage"}, "--attention_backend sage does not work here: "),
        ({"hub_model_id": "no name"}, "'no name' is no name of a repository; give NAME or USER/NAME"),
        ({"cache_dir": __file__}, f"--cache_dir {__file__} cannot be written (File exists); choose another."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_this_teacher_cannot_do(complaint, script, changes: dict, said: str) -> None:
    assert complaint(script, **changes).startswith(said)


def test_more_steps_than_the_teacher_knows_times(no_weights: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(no_weights, tmp_path / "teacher"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"num_train_timesteps": 1000', '"num_train_timesteps": 100'))
    args = parse_args(["--pretrained_model", str(folder), "--num_student_steps", "101"])
    with pytest.raises(ValueError, match="--num_student_steps is 101; this teacher knows 100 times, so it must be at"):
        check_with_teacher(args)


def test_a_dry_run_is_checked_as_well_but_for_what_the_machine_cannot_do(complaint, no_weights: Path) -> None:
    assert complaint(dry_run=True, lora_layers="to_nowhere").startswith("--lora_layers names to_nowhere")
    assert complaint(dry_run=True, resolution=30).startswith("This teacher draws no pictures of 30 x 30")
    words = ["--pretrained_model", str(no_weights), "--attention_backend", "sage", "--dry_run"]
    assert check_with_teacher(parse_args(words)) is None


def test_a_teacher_without_a_configuration_is_one_sentence(complaint, no_weights: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(no_weights, tmp_path / "teacher"))
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^The teacher .* cannot be read: .*config.json"):
        check_with_teacher(parse_args(["--pretrained_model", str(folder)]))


@pytest.mark.parametrize("name", MAKERS)
def test_what_every_family_takes_by_default_is_taken(name: str, tmp_path: Path) -> None:
    make_pipeline(name).save_pretrained(tmp_path)
    length, height = CALLS.get(name, {}).get("max_sequence_length"), CALLS.get(name, {}).get("height")
    words = ["--pretrained_model", str(tmp_path), "--num_student_steps", "4"]
    for flag, value in (("max_sequence_length", length), ("resolution", height)):
        words += [f"--{flag}", str(value)] if value is not None else []
    assert check_with_teacher(parse_args(words, student="lora" if FAMILIES[name].has_lora else "full")) is None


def test_a_teacher_of_real_size_is_checked_by_its_configurations(tmp_path: Path) -> None:
    folder = write_configs("stabilityai/stable-diffusion-xl-base-1.0", tmp_path / "teacher")
    words = ["--pretrained_model", str(folder), "--lora_layers", "to_q, ff.net.0.proj"]
    assert check_with_teacher(parse_args([*words, "--rank", "1280"])) is None
    with pytest.raises(ValueError, match=r"--rank is 1281; .* at most 1280"):
        check_with_teacher(parse_args([*words, "--rank", "1281"]))


@pytest.mark.parametrize(
    ("name", "most"), [("StableDiffusion3Pipeline", 512), ("FluxPipeline", 512), ("QwenImagePipeline", 1024)]
)
def test_prompts_longer_than_the_stock_pipeline_reads(name: str, most: int) -> None:
    assert FAMILIES[name].check_options(PromptOptions(most)) is None
    with pytest.raises(ValueError, match=f"--max_sequence_length is {most + 1}; a {name} reads at most {most} tokens"):
        FAMILIES[name].check_options(PromptOptions(most + 1))


# --- no clipping --------------------------------------------------------------------------------------------------


def stepped(max_grad_norm: float, gradient: float) -> torch.Tensor:
    """What a step of size 1 takes from a weight of 0."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], 1.0)
    weight.grad = torch.full((4,), gradient)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    norm = RoleOptimizer([weight], optimizer, schedule, max_grad_norm).step()
    assert norm == pytest.approx(2 * gradient)
    return -weight.detach()


def test_a_largest_norm_of_0_clips_nothing_and_a_gradient_that_is_not_finite_is_still_refused() -> None:
    assert stepped(0.0, 50.0).tolist() == [50.0] * 4
    assert stepped(1.0, 50.0).norm() == pytest.approx(1.0, rel=1e-5)
    assert parse_args(["--max_grad_norm", "0"]).optimisation.max_grad_norm == 0
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError):
            stepped(0.0, bad)
