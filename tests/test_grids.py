"""Students on grids of their own: trained, exported, and drawn alike by our pipeline and by the stock one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from parts import PROMPTS, run_arguments, train_only
from parts_families import CALLS, MAKERS, make_pipeline
from parts_sd3 import TOKENS, make_sd3_pipeline
from torch import Tensor

from rdm_diffusers import RdmDistillationPipeline, RdmScheduler
from rdm_diffusers.config import RunConfig, TimesConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import FAMILIES, PromptOptions, Teacher
from rdm_diffusers.hub import write_card
from rdm_diffusers.hub.comfyui import comfyui_node, comfyui_sigmas
from rdm_diffusers.pipelines import StudentConfig, stock_grid, stock_scheduler
from rdm_diffusers.training.assembly import teacher_scheduler

TOLERANCE = 1e-3  # of a picture in [0, 1]


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 teacher whose noise levels are shifted."""
    folder = tmp_path_factory.mktemp("sd3")
    make_sd3_pipeline(shift=3.0).save_pretrained(folder)
    return folder


def draw(pipeline, **options) -> Tensor:
    """Pictures of given noises; later noises come from the global generator."""
    size = pipeline.vae.config.latent_channels, 8, 8
    latents = torch.randn(2, *size, generator=torch.Generator().manual_seed(5))
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(6)
    return pipeline(list(PROMPTS[:2]), latents=latents, output_type="pt", **options).images


@pytest.mark.parametrize(
    ("eta", "grid", "expected"),
    [
        (1, {"student_timesteps": [999, 850, 500, 1]}, {"timesteps": [999, 850, 500, 1]}),
        (0, {"student_timesteps": [900, 500]}, {"timesteps": [900, 500]}),
        (1, {"student_sigmas": [1.0, 0.8, 0.3]}, {"sigmas": [1.0, 0.8, 0.3]}),
        (0, {"student_grid": "shifted", "num_student_steps": 4}, {"sigmas": [1.0, 0.9, 0.75, 0.5]}),
    ],
    ids=str,
)
def test_the_cards_call_of_the_stock_pipeline_draws_what_ours_draws(
    eta: int, grid: dict, expected: dict, teacher_folder: Path, flow_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    folder = flow_folder if "sigmas" in expected else teacher_folder
    reading = {"max_sequence_length": TOKENS} if folder is flow_folder else {}
    changes = {"num_student_steps": None, "learning_rate": 5e-2, "eta": eta, **grid, **reading}
    train_only(run_arguments(folder, prompts_file, tmp_path, **changes))
    ours = RdmDistillationPipeline.from_pretrained(tmp_path)
    (name, own), *_ = expected.items()
    assert list(ours.scheduler.config[f"student_{name}"]) == pytest.approx(own)
    pictures = draw(ours)

    write_card(tmp_path)
    call = re.findall(r"^pipeline\(\"[^\"]*\", (.*)\)\.images", (tmp_path / "README.md").read_text(), re.MULTILINE)
    told = eval(f"dict({call[-1]})")
    assert told[name] == pytest.approx(own) and "num_inference_steps" not in told
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    missing = {"text_encoder_3": None, "tokenizer_3": None} if folder is flow_folder else {}
    stock = type(ours).__bases__[1].from_pretrained(folder, **missing)
    stock.load_lora_weights(tmp_path)
    stock.scheduler = getattr(diffusers, scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    assert float((draw(stock, **told) - pictures).abs().max()) < TOLERANCE

    ours.save_pretrained(tmp_path / "full")
    full = type(ours).__bases__[1].from_pretrained(tmp_path / "full", **missing)
    assert float((draw(full, **told) - pictures).abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", MAKERS)
def test_every_stock_pipeline_takes_the_grid_with_its_exported_scheduler(name: str) -> None:
    pipeline, family = make_pipeline(name), FAMILIES[name]
    prediction_type = family.prediction_type(pipeline.scheduler)
    is_flow = prediction_type == "flow_prediction"
    grid = {"student_sigmas": [1.0, 0.6]} if is_flow else {"student_timesteps": [999, 300]}
    settings = {**pipeline.scheduler.config, "steps_offset": 0}
    ours = RdmScheduler.from_config(settings, prediction_type=prediction_type, eta=0.0, **grid)
    call = {**CALLS.get(name, {}), **family.unguided(pipeline, PromptOptions()), "output_type": "latent"}
    told, stock = stock_grid(ours, family), stock_scheduler(ours, family)
    latents = []
    for scheduler, steps in ((ours, {"num_inference_steps": 2}), (stock, told)):
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        latents.append(pipeline(prompt="a red seven", generator=generator, **call, **steps).images)
    assert float((latents[0] - latents[1]).abs().max()) < TOLERANCE * float(latents[0].abs().max())


@pytest.mark.parametrize(
    "name", [name for name in MAKERS if "Flux" in name or name in ("QwenImagePipeline", "ChromaPipeline")]
)
@pytest.mark.parametrize("steps", [3, 8])
def test_a_teachers_own_grid_is_the_one_that_its_stock_pipeline_lays(name: str, steps: int) -> None:
    teacher = Teacher(make_pipeline(name), FAMILIES[name], name)
    words = ["--pretrained_model", "me/teacher", "--prompts_file", "x", "--resolution", str(CALLS[name]["height"])]
    ours = teacher_scheduler(teacher, parse_args(words), steps)
    teacher.pipeline(prompt="a red seven", num_inference_steps=steps, output_type="latent", **CALLS[name])
    assert torch.allclose(ours.sigmas, teacher.pipeline.scheduler.sigmas, atol=1e-6)
    assert not torch.allclose(ours.sigmas[:-1], torch.linspace(1, 1 / steps, steps), atol=1e-2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_usual_grid_given_explicitly_is_exported_as_the_usual_one(eta: float) -> None:
    for name, grid in (
        ("StableDiffusionPipeline", {"student_timesteps": [999, 749, 499, 249]}),
        ("FluxPipeline", {"student_sigmas": [1.0, 0.75, 0.5, 0.25], "prediction_type": "flow_prediction"}),
    ):
        scheduler, family = RdmScheduler(eta=eta, **grid), FAMILIES[name]
        assert stock_grid(scheduler, family) == {}
        assert stock_scheduler(scheduler, family).config == family.stock_scheduler(scheduler, 4, eta).config


def test_comfyui_is_told_noise_levels_where_its_own_would_be_others() -> None:
    def student(name: str, **grid) -> StudentConfig:
        return StudentConfig("base", name, dict(RdmScheduler(**grid).config), 2)

    flow = {"prediction_type": "flow_prediction"}
    assert comfyui_sigmas(student("FluxPipeline", student_sigmas=[1.0, 0.5], **flow)) == []
    own = student("FluxPipeline", student_sigmas=[1.0, 0.75], **flow)
    assert comfyui_sigmas(own) == [1.0, 0.75, 0.0] and comfyui_node(own) is None
    levels = comfyui_sigmas(student("StableDiffusionPipeline", student_timesteps=[999, 300]))
    euler = diffusers.EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear")
    euler.set_timesteps(timesteps=[999, 300])
    assert levels == pytest.approx(euler.sigmas.tolist(), rel=1e-5)


def test_a_grid_sets_the_number_of_steps_also_from_a_file(tmp_path: Path) -> None:
    own = ["--pretrained_model", "me/teacher", "--prompts_file", "x"]
    config = parse_args([*own, "--student_sigmas", "1", "0.8", "0.3"])
    assert config.method.num_student_steps == 3 and config.times.student_sigmas == (1.0, 0.8, 0.3)
    (tmp_path / "run.yaml").write_text(config.as_yaml())
    again = parse_args(["--config", str(tmp_path / "run.yaml")])
    assert (again.method, again.times) == (config.method, config.times)
    assert RunConfig.from_record(config.as_arguments()).times == config.times
    assert RunConfig.from_record({"rank": 4, "num_student_steps": 4}).times == TimesConfig()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--student_sigmas 1 1.2", "--student_sigmas is 1.2; it must lie in (0, 1]"),
        ("--student_sigmas 1 .5 .5", "--student_sigmas is 1.0 0.5 0.5; each must be below the one before"),
        ("--student_timesteps 999 .5", "is no whole number"),
        ("--student_timesteps 999 0", "--student_timesteps is 0; it must be at least 1"),
        ("--num_student_steps 4 --student_sigmas 1 .5", "--num_student_steps is 4, and --student_sigmas has 2 steps"),
        ("--student_sigmas 1 --student_timesteps 999", "exclude each other; give one"),
        ("--student_sigmas 1 --student_grid shifted", "exclude each other; give one"),
    ],
)
def test_a_grid_that_contradicts_itself_is_one_sentence(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(words.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teacher", "changes", "said"),
    [
        ("tiny", {"student_sigmas": [1.0, 0.5]}, "--student_sigmas is for teachers of flow, which this one is not"),
        ("tiny-flow", {"student_timesteps": [999, 500]}, "--student_timesteps is for other teachers than this one"),
        ("tiny", {"student_timesteps": [1000, 500]}, "--student_timesteps has 1000; this teacher knows 1000 times"),
        ("tiny-flow", {"student_grid": "shifted"}, "would have no effect, as this teacher has no shift"),
    ],
)
def test_a_grid_that_does_not_fit_the_teacher_is_one_sentence(
    teacher: str, changes: dict, said: str, prompts_file: Path, tmp_path: Path
) -> None:
    steps = None if changes.keys() != {"student_grid"} else 2
    with pytest.raises((ValueError, SystemExit), match=re.escape(said)):
        train_only(
            run_arguments(
                teacher, prompts_file, tmp_path, **{"num_student_steps": steps, "steps_per_rollout": 1, **changes}
            )
        )
