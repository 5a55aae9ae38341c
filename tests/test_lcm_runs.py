"""Whole runs of `--algorithm lcm`: what they train, what they need not, what they export, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from parts import PROMPTS, make_run, randomise_adapters, read_state, relative_error, run_arguments, train_only
from parts_families import make_pipeline
from parts_float64 import ROUNDING
from torch import Tensor

import train_rdm_lora
from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import LORA_FILE
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TARGET, TEACHER
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.training.batches import weigh_samples
from rdm_diffusers.training.consistency import collect_noised
from rdm_diffusers.training.memory_plan import plan_memory
from rdm_diffusers.training.updates import student_update

LCM_RUN = dict(
    algorithm="lcm", group_size=None, num_student_steps=4, num_target_images=40, target_inference_steps=2,
)  # fmt: skip
KINDS = pytest.mark.parametrize("student", ["lora", "full"])


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run into a named folder of this test."""

    def make(name: str = "run", **changes) -> list[str]:
        options = {**LCM_RUN, "cache_dir": tmp_path / "cache", **changes}
        return run_arguments(options.pop("teacher", teacher_folder), prompts_file, tmp_path / name, **options)

    return make


def own(student: str) -> dict:
    return {} if student == "lora" else {"rank": None}


def gradients(argv: list[str]) -> list[Tensor]:
    """The student's gradients in a run's first update, with adapters that do something."""
    it = make_run(argv)
    randomise_adapters(it.networks)
    batch, _ = weigh_samples(it.distillation, collect_noised(it.distillation, 0), it.state.statistics, 0)
    student_update(it.distillation, batch, it.state.statistics)
    return [parameter.grad for parameter in it.networks.parameters(STUDENT)]


# ---------------------------------------------------------------------------------------------- what is trained


def test_the_target_is_what_the_student_predicts_after_one_step_of_the_guided_teacher(argv) -> None:
    it = make_run(argv())
    randomise_adapters(it.networks)
    run, networks = it.distillation, it.networks
    batch = collect_noised(run, 0)
    x_t, t, conditioning = batch.samples.x_t, batch.samples.t, batch.samples.conditioning
    alpha = networks.schedule.alphas_cumprod
    earlier = t - 20
    last = alpha.new_ones(len(t))
    a, b = (alpha[t], torch.where(earlier < 0, last, alpha[earlier.clamp(min=0)]))
    a, b = a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)
    with torch.no_grad():
        image = networks.predict(TEACHER, x_t, t, conditioning)
        noise = (x_t - a.sqrt() * image) / (1 - a).sqrt()
        arrived = b.sqrt() * image + (1 - b).sqrt() * noise
        target = networks.predict(STUDENT, arrived, earlier.clamp(min=0), conditioning)
        x0 = networks.predict(STUDENT, x_t, t, conditioning)
    assert networks.guidance_scale == 2
    assert batch.target is not None
    torch.testing.assert_close(batch.target[earlier >= 0], target[earlier >= 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.samples.x0, x0)


def test_where_no_noise_is_left_the_target_is_the_teachers_own_image(argv) -> None:
    it = make_run(argv(num_ddim_timesteps=1))  # so that the first step arrives
    batch = collect_noised(it.distillation, 0)
    samples = batch.samples
    with torch.no_grad():
        image = it.networks.predict(TEACHER, samples.x_t, samples.t, samples.conditioning)
    torch.testing.assert_close(batch.target, image)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [{}, {"reward": ["tiny_bold"]}], ids=["alone", "with_a_reward"])
def test_eight_samples_at_once_are_one_sample_eight_times(argv, options: dict) -> None:
    at_once = gradients(argv(**options))
    one_by_one = gradients(argv(train_batch_size=1, gradient_accumulation_steps=8, **options))
    assert relative_error(one_by_one, at_once) < ROUNDING


def test_two_processes_noise_what_one_does_with_twice_the_samples(argv) -> None:
    whole, half = (make_run(argv(train_batch_size=size)).distillation for size in (8, 4))
    parts = []
    for process in (0, 1):
        object.__setattr__(half, "process_index", process)
        object.__setattr__(half, "num_processes", 2)
        parts.append(collect_noised(half, 3))
    together = collect_noised(whole, 3)
    assert torch.equal(torch.cat([part.samples.x_t for part in parts]), together.samples.x_t)
    assert [*parts[0].prompts, *parts[1].prompts] == together.prompts


def test_each_sample_is_a_picture_with_its_own_prompt_time_and_noise(argv) -> None:
    it = make_run(argv())
    batch = collect_noised(it.distillation, 0)
    embeds = batch.samples.conditioning.tensors["prompt_embeds"]
    expected = it.distillation.prompts.once([list(PROMPTS).index(prompt) for prompt in batch.prompts])
    assert torch.equal(embeds, expected.tensors["prompt_embeds"])
    assert len(batch.samples.t.unique()) > 4
    grid = it.distillation.scheduler.timesteps.tolist()
    for t, step in zip(batch.samples.t.tolist(), batch.samples.step.tolist(), strict=True):
        assert t <= grid[step] and (step == 3 or t > grid[step + 1])


def test_a_differentiable_reward_changes_the_students_gradient(argv) -> None:
    alone, joined = gradients(argv()), gradients(argv(reward=["tiny_bold"], reward_share=0.5))
    assert relative_error(joined, alone) > 0.1


@KINDS
def test_there_is_no_fake_score_in_the_networks_the_optimisers_or_the_plan(argv, student: str) -> None:
    words = argv(**own(student))
    it = make_run(words, student)
    assert it.networks.parameters(FAKE_SCORE) == []
    assert list(it.state.optimizers) == [STUDENT]
    without = plan_memory(it.config)
    with_it = plan_memory(RunConfig.of(student, **{**parsed(words, student), "algorithm": "gndm"}))
    one, two = ("one LoRA", "two LoRAs") if student == "lora" else ("student", "student and fake score")
    assert with_it.sizes[two] == 2 * without.sizes[one]
    assert with_it.sizes["two optimisers"] == 2 * without.sizes["one optimiser"]
    assert without.peak < with_it.peak


def parsed(words: list[str], student: str) -> dict:
    """The flags of a command line that a run without pictures takes, too."""
    kept = ("pretrained_model_name_or_path", "output_dir", "train_batch_size", "teacher_target", "rank")
    arguments = parse_args(words, student=student).as_arguments()
    return {name: arguments[name] for name in kept if name in arguments}


def test_an_update_makes_six_calls_for_a_sample_of_a_guided_teacher(argv) -> None:
    """Two of the teacher, two of the student without gradients, one forward and one backward."""
    it = make_run(argv())
    it.networks.calls.clear()
    student_update(it.distillation, collect_noised(it.distillation, 0), it.state.statistics)
    assert it.networks.calls == {"teacher forward": 16, "student forward": 24, "student backward": 8}


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "StableDiffusionXLPipeline"])
def test_flow_and_other_teachers_train_and_export(argv, tmp_path: Path, name: str) -> None:
    make_pipeline(name).save_pretrained(tmp_path / name)
    train_only(argv(teacher=tmp_path / name, train_batch_size=2))
    assert (tmp_path / "run" / LORA_FILE).exists()


# ---------------------------------------------------------------------------------------------- whole runs


@KINDS
def test_a_resumed_run_is_an_uninterrupted_one(argv, tmp_path: Path, student: str) -> None:
    options = dict(max_train_steps=4, checkpointing_steps=2, **own(student))
    train_only(argv("straight", **options), student)
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "broken" / "checkpoint-2")
    train_only(argv("broken", resume_from_checkpoint="latest", **options), student)
    straight, broken = (read_state(tmp_path / name / "checkpoint-4") for name in ("straight", "broken"))
    assert straight.keys() == broken.keys()
    assert not any("fake" in name for name in straight)
    assert all(torch.equal(tensor, broken[name]) for name, tensor in straight.items())
    record = json.loads((tmp_path / "straight" / "checkpoint-4" / "state.json").read_text())
    assert record["arguments"]["algorithm"] == "lcm" and record["arguments"]["num_student_steps"] == 4


def test_stock_diffusers_draws_the_students_images_with_its_lora_and_the_lcm_scheduler(
    argv, teacher_folder: Path, tmp_path: Path
) -> None:
    train_rdm_lora.main(argv())
    student = RdmDistillationPipeline.from_pretrained(tmp_path / "run")
    stock = StableDiffusionPipeline.from_pretrained(teacher_folder)
    stock.load_lora_weights(tmp_path / "run")
    stock.scheduler = LCMScheduler.from_pretrained(tmp_path / "run", subfolder="scheduler")
    images = []
    for pipeline in (student, stock):
        pipeline.set_progress_bar_config(disable=True)
        options = dict(num_inference_steps=4, guidance_scale=0.0, output_type="pt")
        images.append(pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images)
    assert (images[0] - images[1]).abs().max() < 1e-3
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2310.04378" in card and "from prompts alone" not in card
    assert "| consistency | 50 steps of the teacher's solver, huber_c 0.001, guidance 2.0 |" in card
    assert "R_dm" not in card and "fake score's updates" not in card


def test_a_student_starts_at_a_target_and_follows_its_ode(argv) -> None:
    learns = dict(teacher_target="samples", target_train_steps=4, target_learning_rate=1e-2, target_rank=2)
    it = make_run(argv(**learns))
    it.networks.calls.clear()
    student_update(it.distillation, collect_noised(it.distillation, 0), it.state.statistics)
    assert it.networks.real_score == TARGET
    assert it.networks.calls["target forward"] == 8 and not it.networks.calls["teacher forward"]
    x_t = torch.randn(2, *it.distillation.latent_shape)
    with torch.no_grad():
        t, conditioning = torch.full((2,), 500), it.distillation.prompts.once([0, 1])
        student, target = (it.networks.predict(role, x_t, t, conditioning) for role in (STUDENT, TARGET))
    torch.testing.assert_close(student, target)


def test_a_step_down_the_gradient_lowers_the_loss(argv) -> None:
    it = make_run(argv(huber_c=0.1))
    randomise_adapters(it.networks)
    run, networks = it.distillation, it.networks
    batch = collect_noised(run, 0)
    before = student_update(run, batch, it.state.statistics)["consistency_loss"]
    with torch.no_grad():
        for parameter in networks.parameters(STUDENT):
            parameter -= 1e-3 * parameter.grad / parameter.grad.norm()
        samples = batch.samples
        x0 = run.student(samples.x_t, samples.t, samples.conditioning)
    assert run.objective.losses(x0, batch.target).mean() < before


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gndm_lambda": 1}, "--gndm_lambda would have no effect with --algorithm lcm"),
        ({"group_size": 4}, "--group_size would have no effect"),
        ({"num_renoisings": 2}, "--num_renoisings would have no effect"),
        ({"fake_updates_per_step": 1}, "--fake_updates_per_step would have no effect"),
        ({"fake_learning_rate": 1e-5}, "--fake_learning_rate would have no effect"),
        ({"fake_score_steps": True}, "--fake_score_steps would have no effect"),
        ({"reuse_rollouts": 2}, "--reuse_rollouts would have no effect"),
        ({"steps_per_rollout": 2}, "--steps_per_rollout would have no effect"),
        ({"pool_steps": 1}, "--pool_steps would have no effect"),
        ({"renoising_time_distribution": "logit_normal"}, "--renoising_time_distribution would have no effect"),
        ({"decoupled_guidance": True}, "--decoupled_guidance would have no effect"),
        ({"reward": ["tiny_bold"], "reward_tilt": 1}, "--reward_tilt would have no effect"),
        ({"preset": "gndm"}, "--algorithm lcm is the preset lcm; leave --preset gndm out"),
        ({"algorithm": "gndm", "preset": "lcm"}, "--preset lcm trains no fake score"),
        ({"algorithm": "gndm", "huber_c": 0.1, "num_target_images": None, "target_inference_steps": None},
         "--huber_c would have no effect with --algorithm gndm"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(argv, changes: dict, said: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv(**changes))
    assert said in capsys.readouterr().err


def test_a_reward_without_gradients_is_refused(argv) -> None:
    with pytest.raises(ValueError, match="tiny_prompt_black_box gives no gradients and acts through the fake score"):
        make_run(argv(reward=["tiny_prompt_black_box"]))


def test_the_tiny_teachers_defaults_suit_it(prompts_file: Path, tmp_path: Path) -> None:
    config = parse_args(["--algorithm", "lcm", "--output_dir", str(tmp_path)])
    assert (config.method.group_size, config.method.steps_per_rollout, config.method.fake_score_steps) == (1, 1, False)
    again = RunConfig.from_yaml(written(config, tmp_path))
    assert again.as_arguments() == config.as_arguments()


def written(config: RunConfig, folder: Path) -> Path:
    (folder / "config.yaml").write_text(config.as_yaml())
    return folder / "config.yaml"
