"""The target learns the score of the guided teacher's images, which are drawn once; R_dm then leads towards it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from parts import PROMPTS, change, make_run, read_state, relative_error, run_arguments, train_only, train_run
from parts_families import CALLS, make_pipeline
from parts_processes import in_two_processes
from safetensors.torch import load_file

from rdm_diffusers.commands import export
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.distillation import estimate_reward
from rdm_diffusers.evaluation import command as evaluation
from rdm_diffusers.evaluation.pictures import list_images, read_image
from rdm_diffusers.families import LORA_FILE
from rdm_diffusers.folders import ASIDE
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TARGET, TEACHER
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.prompts import read_prompts
from rdm_diffusers.training import shared_parts, target_images
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.run_folder import check_resumable
from rdm_diffusers.training.target import overfitted
from rdm_diffusers.training.target_start import nearest

IMAGES, DRAWN = 80, 128  # two parts of 64
STUDENTS = pytest.mark.parametrize("student", ["lora", "full"])


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run that learns a target, with a cache of this test."""

    def make(folder: str = "run", **changes) -> list[str]:
        options = dict(
            teacher_target="samples", num_target_images=IMAGES, target_inference_steps=3, target_train_steps=4,
            target_learning_rate=1e-2, target_rank=2, cache_dir=tmp_path / "cache", checkpointing_steps=1,
        )  # fmt: skip
        teacher = changes.pop("teacher", teacher_folder)
        return run_arguments(teacher, prompts_file, tmp_path / folder, **{**options, **changes})

    return make


def own(student: str) -> dict:
    return {} if student == "lora" else {"rank": None}


def predictions(it, *roles: str) -> list[torch.Tensor]:
    x_t = torch.randn(4, *it.distillation.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = it.distillation.prompts.once([0, 1, 2, 3])
    with torch.no_grad():
        return [it.networks.predict(role, x_t, torch.full((4,), 500), conditioning) for role in roles]


@STUDENTS
def test_r_dm_leads_towards_the_target_at_which_student_and_fake_score_start(student: str, argv) -> None:
    it = make_run(argv(**own(student)), student)
    assert it.networks.real_score == TARGET
    target, teacher, trained, fake = predictions(it, TARGET, TEACHER, STUDENT, FAKE_SCORE)
    assert relative_error(target, teacher) > 1e-3
    assert relative_error(trained, target) < 1e-5 and relative_error(fake, target) < 1e-5
    untrained = make_run(argv("other", teacher_target=None, **{n: None for n in TARGET_FLAGS}, **own(student)), student)
    assert torch.equal(*predictions(untrained, TEACHER), teacher)
    samples = collect(it.distillation, 0).samples
    tau, noise = torch.full((len(samples),), 300), torch.randn_like(samples.x0)
    estimate = estimate_reward(it.networks, samples, tau, noise)
    with torch.no_grad():
        x_tau = it.networks.schedule.add_noise(samples.x0, noise, tau)
        expected = it.networks.predict(TARGET, x_tau, tau, samples.conditioning)
    assert relative_error(estimate.teacher_x0, expected) < 1e-5


TARGET_FLAGS = ("num_target_images", "target_inference_steps", "target_train_steps", "target_learning_rate",
                "target_rank")  # fmt: skip


def test_a_student_of_lower_rank_starts_at_the_nearest_lora_and_one_of_higher_rank_has_room_left(argv) -> None:
    it = make_run(argv(target_rank=4, rank=8))
    target, student = predictions(it, TARGET, STUDENT)
    assert relative_error(student, target) < 1e-5
    layer = next(iter(it.networks.layers.values()))
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert (up[:, 4:] == 0).all() and (down[4:] != 0).all()
    a, b = (side["target"].weight.detach().flatten(1) for side in (layer.lora_A, layer.lora_B))
    low_a, low_b = nearest(a, b, 2)
    values = torch.linalg.svdvals(b @ a)
    assert torch.isclose((b @ a - low_b @ low_a).norm(), values[2:].norm(), rtol=1e-4)
    assert len(nearest(a, torch.zeros_like(b), 2)[0]) == 0


@pytest.mark.parametrize("flags", [{}, {"fold_adapters": True}, {"gradient_checkpointing": True}], ids=str)
def test_an_untrained_target_is_the_unguided_teacher(flags: dict, argv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdm_diffusers.training.trainer.learn_target", lambda *run: None)
    it = make_run(argv(guidance_scale=1.0, **flags))
    target, teacher = predictions(it, TARGET, TEACHER)
    assert relative_error(target, teacher) < 1e-6


def test_the_record_has_the_losses_on_images_that_the_target_never_saw(argv, tmp_path: Path) -> None:
    target = dict(target_train_steps=30, target_learning_rate=1e-3, target_batch_size=16)
    make_run(argv(teacher="tiny", num_student_steps=4, train_batch_size=16, **target))
    record = json.loads((tmp_path / "run" / "target.json").read_text())
    losses = {int(update): loss for update, loss in record["target"].items()}
    assert losses[0] == record["teacher"]["unguided"] != record["teacher"]["guided"]
    assert min(losses.values()) == losses[record["update"]] < losses[0]


def test_a_loss_that_ends_clearly_above_its_lowest_is_overfitting_and_a_small_rise_is_not() -> None:
    assert overfitted({0: 1.0, 10: 0.5, 20: 0.52})
    assert not overfitted({0: 1.0, 10: 0.5, 20: 0.502}) and not overfitted({0: 1.0, 10: 0.5})


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("StableDiffusionPipeline", {}),
        ("StableDiffusion3Pipeline", {"shift": 3.0}),
        ("StableDiffusion3Pipeline", {"shift": 3.0, "shift_terminal": 0.02}),
    ],
)
def test_the_images_are_those_of_the_stock_pipeline_with_its_own_scheduler(
    name: str, grid: dict, argv, tmp_path: Path
) -> None:
    stock = make_pipeline(name)
    stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config, **grid)
    stock.save_pretrained(tmp_path / "teacher")
    reading = {key: value for key, value in CALLS.get(name, {}).items() if key == "max_sequence_length"}
    it = make_run(argv(teacher=tmp_path / "teacher", guidance_scale=3.0, **reading))
    images = target_images.draw_target_images(it.distillation, it.teacher, it.config, it.accelerator)
    if not it.teacher.schedule.is_flow:
        stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, set_alpha_to_one=True)
    numbers = [0, 1, 70]
    noise = images.prompts.draws.normal("target_image", numbers, it.distillation.latent_shape)
    call = {"output_type": "latent", **it.teacher.family.guided(3.0), **CALLS.get(name, {})}
    call |= {"sigmas": [1.0, 2 / 3, 1 / 3]} if it.teacher.schedule.is_flow else {"num_inference_steps": 3}
    prompts = [images.prompts.prompt(number) for number in numbers]
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * 3
    expected = stock(prompt=prompts, latents=noise, **call).images
    assert relative_error(images.latents[numbers], expected) < 2e-3


def test_images_and_target_are_made_once_and_an_interrupted_drawing_goes_on(
    argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make_run(argv())
    assert straight.networks.calls["target backward"] == 4 * 8
    parts = sorted((tmp_path / "cache" / target_images.FOLDER).rglob("0*.safetensors"))
    before = [part.read_bytes() for part in parts]
    again = make_run(argv("again"))
    assert again.networks.calls == {}
    assert all(torch.equal(a, b) for a, b in zip(*(predictions(it, TARGET) for it in (straight, again)), strict=True))

    fewer = make_run(argv("fewer", num_target_images=70))
    assert "teacher forward" in fewer.networks.calls and fewer.networks.calls["teacher forward"] == 2 * 3
    assert [part.read_bytes() for part in parts] == before

    write = shared_parts.write_part

    def interrupted(*part) -> None:
        write(*part)
        raise KeyboardInterrupt

    parts[0].unlink()
    parts[1].write_bytes(before[1][:-1] + bytes([before[1][-1] ^ 1]))
    with monkeypatch.context() as patch:
        patch.setattr(shared_parts, "write_part", interrupted)
        with (
            pytest.raises(KeyboardInterrupt),
            pytest.warns(UserWarning, match="that part is made anew"),
        ):
            make_run(argv("third"))
    assert parts[0].read_bytes() == before[0] and parts[1].read_bytes() != before[1]
    with pytest.warns(UserWarning, match="that part is made anew"):
        make_run(argv("fourth"))
    assert [part.read_bytes() for part in parts] == before


def test_the_teachers_images_are_written_as_files_which_an_evaluation_takes_as_its_reference(
    argv, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "pictures"
    make_run(argv("fewer", num_target_images=70, target_images_dir=folder))
    first = folder / "000000.png"
    before, written = first.read_bytes(), first.stat().st_mtime_ns
    (folder / f"{ASIDE}0.png").write_bytes(b"cut off")  # as a kill leaves it
    it = make_run(argv("more", target_images_dir=folder))
    assert first.read_bytes() == before and first.stat().st_mtime_ns == written

    images = target_images.draw_target_images(it.distillation, it.teacher, it.config, it.accelerator)
    files, prompts = list_images(folder), read_prompts(folder / "prompts.txt", "--prompts")
    assert [file.name for file in files] == [f"{i:06}.png" for i in range(IMAGES)]
    assert prompts == [images.prompts.prompt(i) for i in range(IMAGES)]
    shown = it.teacher.family.decode(it.teacher.pipeline, images.latents[77:78])[0]
    assert (shown * 255 - read_image(files[77])).abs().max() < 0.51

    evaluate = ["--images", str(folder), "--prompts", str(folder / "prompts.txt"), "--features", "tiny"]
    evaluate += ["--reference_teacher", str(folder), "--output_dir", str(tmp_path / "evaluated")]
    evaluation.main(evaluate)
    metrics = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())["metrics"]
    assert metrics["fd_to_teacher"]["value"] < 1e-6 and metrics["num_images"] == IMAGES

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.png").touch()
    for changes in ({"guidance_scale": 5.0}, {"num_target_images": 70}, {"target_images_dir": tmp_path / "mine"}):
        with pytest.raises(ValueError, match=r"^--target_images_dir .* holds other files, .* name another folder"):
            make_run(argv("other", **{"target_images_dir": folder, **changes}))
    assert len(list_images(folder)) == IMAGES and (tmp_path / "mine" / "000000.png").read_bytes() == b""


def test_resuming_changes_nothing(argv, tmp_path: Path) -> None:
    train_only(argv("straight", max_train_steps=2))
    train_only(argv("broken", max_train_steps=1))
    train_only(argv("broken", max_train_steps=2, resume_from_checkpoint="latest"))
    straight, broken = (read_state(tmp_path / name / "checkpoint-2") for name in ("straight", "broken"))
    assert straight.keys() == broken.keys()
    assert all(torch.equal(tensor, broken[name]) for name, tensor in straight.items())


def test_accumulated_batches_and_two_processes_learn_the_same_target(argv, tmp_path: Path) -> None:
    train_only(argv("one", train_batch_size=8))
    train_only(argv("accumulated", train_batch_size=4, gradient_accumulation_steps=2, cache_dir=tmp_path / "second"))
    pictures = tmp_path / "pictures"
    two = argv("two", train_batch_size=4, cache_dir=tmp_path / "third", target_images_dir=pictures)
    in_two_processes(lambda: train_only(two))
    assert len(list_images(pictures)) == IMAGES
    states = [read_state(tmp_path / name / "checkpoint-2") for name in ("one", "accumulated", "two")]
    for state in states[1:]:
        assert relative_error([state[name] for name in states[0]], list(states[0].values())) < 1e-4


@STUDENTS
def test_the_student_is_exported_without_the_target(student: str, argv, tmp_path: Path) -> None:
    train_only(argv(**own(student)), student)
    export.main([str(tmp_path / "run" / "checkpoint-2"), "--format", student, "--output_dir", str(tmp_path / "new")])
    weights = LORA_FILE if student == "lora" else "unet/diffusion_pytorch_model.safetensors"
    of_run, of_checkpoint = (load_file(tmp_path / name / weights) for name in ("run", "new"))
    assert of_run.keys() == of_checkpoint.keys()
    assert all(torch.equal(tensor, of_checkpoint[name]) for name, tensor in of_run.items())
    pipeline = RdmDistillationPipeline.from_pretrained(tmp_path / "run")
    assert not [name for name, _ in pipeline.unet.named_modules() if name.endswith(".target")]
    assert pipeline(PROMPTS[0], output_type="pt").images.isfinite().all()


def test_a_flag_of_the_target_is_refused_where_it_would_have_no_effect(capsys: pytest.CaptureFixture) -> None:
    for words in (["--num_target_images", "400"], ["--target_rank", "3"], ["--target_images_dir", "x"]):
        with pytest.raises(SystemExit):
            parse_args(["--teacher_target", "score", *words])
        assert f"{words[0]} would have no effect; leave it out, or add --teacher_target samples." in (
            capsys.readouterr().err
        )


def test_the_tiny_teachers_are_imitated_at_the_guidance_that_they_are_sampled_at_and_others_by_their_score() -> None:
    tiny, real = parse_args([]), parse_args(["--pretrained_model", "a/b"])
    assert (tiny.target.teacher_target, tiny.method.guidance_scale) == ("samples", 4.0)
    assert parse_args(["--teacher_target", "score"]).method.guidance_scale == 2.0
    assert real.target.teacher_target == "score"


def test_the_fake_score_of_a_tiny_teachers_target_learns_four_times_as_fast_as_the_student() -> None:
    for words in ([], ["--learning_rate", "1e-5"]):
        for student in ("lora", "full"):
            rates = parse_args(words, student=student).optimisation
            assert rates.fake_learning_rate == 4 * rates.learning_rate
    rates = parse_args(["--teacher_target", "score"]).optimisation
    assert rates.fake_learning_rate == rates.learning_rate


def test_a_run_counts_the_calls_of_images_and_target(argv) -> None:
    it = make_run(argv())
    calls = dict(it.networks.calls)
    assert calls["teacher forward"] == 2 * 3 * DRAWN + 2 * 4  # guided: the images, and the held-out loss
    change(it, "optimisation", max_train_steps=1)
    assert train_run(it) == 0
    assert it.networks.calls["teacher forward"] == calls["teacher forward"]


def test_a_checkpoint_from_before_there_were_targets_is_resumed_without_one_alone() -> None:
    now = parse_args(["--guidance_scale", "3", "--teacher_target", "score"]).as_arguments()
    older = {name: value for name, value in now.items() if "target" not in name}
    check_resumable(now, older)
    with pytest.raises(ValueError, match=r"--teacher_target \(was score, is samples\)"):
        check_resumable(parse_args(["--guidance_scale", "3", "--teacher_target", "samples"]).as_arguments(), older)


@STUDENTS
def test_runs_of_all_seeds_share_one_target(student: str, argv, tmp_path: Path) -> None:
    runs = [make_run(argv(f"run-{seed}", seed=seed, **own(student)), student) for seed in (1, 2)]
    first, second = ([p.detach() for p in it.networks.parameters(TARGET)] for it in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (folder,) = (tmp_path / "cache").rglob("target-*")
    folder.rename(folder.with_name("away"))
    again = make_run(argv("again", seed=3, **own(student)), student).networks.parameters(TARGET)
    assert all(torch.equal(a, b.detach()) for a, b in zip(first, again, strict=True))
