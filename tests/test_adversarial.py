"""DMD2's adversarial branch: its gradients are exact, its ratio is the true one, and a run learns it and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parts import (
    make_conditioning,
    make_estimate,
    make_run,
    make_shared,
    make_unet,
    randomise_adapters,
    relative_error,
    run_arguments,
    train_run,
)
from parts_float64 import ROUNDING
from test_resume import assert_resuming_changes_nothing
from torch import Tensor, nn

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.distillation import (
    GNDM,
    RunningMeans,
    Samples,
    ascent,
    density_ratio,
    discriminator_direction,
    estimate_reward,
    student_pull,
)
from rdm_diffusers.families.sd_unet import StableDiffusionFamily
from rdm_diffusers.networks import FAKE_SCORE, ROLES, STUDENT, Networks, SeparateNetworks
from rdm_diffusers.networks.discriminator import Discriminator, Features
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.discriminating import judge_pictures
from rdm_diffusers.training.memory_plan import plan_memory
from rdm_diffusers.training.updates import fake_score_update

COUNT = 4
PICTURES = dict(num_target_images=45, target_inference_steps=2)


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run with an adversarial branch, with a cache of this test."""

    def make(name: str = "run", **changes: Any) -> list[str]:
        options = dict(algorithm="dmd2", cache_dir=tmp_path / "cache", **PICTURES)
        return run_arguments(teacher_folder, prompts_file, tmp_path / name, **{**options, **changes})

    return make


def inputs(batch: int = COUNT) -> tuple[Tensor, Tensor, Any, Tensor]:
    """x_t, times, a conditioning and the student's steps."""
    x_t = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    return x_t, torch.tensor([20, 400, 700, 970])[:batch], make_conditioning(batch), torch.zeros(batch).long()


def make_networks(kind: str = "adapters") -> Networks:
    """Roles whose fake score has a discriminator that judges, not one that has yet to learn."""
    if kind == "full":
        unets = {role: make_unet(seed) for seed, role in enumerate(ROLES)}
        shared = make_shared()
        networks: Networks = SeparateNetworks(
            unets, family=StableDiffusionFamily(), schedule=shared.schedule, prediction_type="epsilon",
            null_conditioning=make_conditioning(1), guidance_scale=1.0,
        )  # fmt: skip
        unet: Any = unets[FAKE_SCORE]
    else:
        networks = make_shared(fold=kind == "folded", checkpointing=kind == "checkpointed")
        unet = networks.modules[0]
    x_t, t, *_ = inputs(1)
    networks.add_discriminator(networks.family.middle_block(unet), x_t, t)
    with torch.no_grad():
        for parameter in networks.discriminator.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return networks


every_kind = pytest.mark.parametrize("kind", ["adapters", "folded", "checkpointed", "full"])


def test_the_directions_are_the_gradients_of_dmd2s_losses() -> None:
    fake, real = (torch.randn(6, requires_grad=True) for _ in range(2))
    loss = 0.3 * (F.softplus(fake).mean() + F.softplus(-real).mean())
    expected = torch.autograd.grad(loss, (fake, real))
    directions = [discriminator_direction(fake, 0.3, 6)[0], discriminator_direction(real, 0.3, 6, pictures=True)[0]]
    assert all(torch.allclose(found, wanted) for found, wanted in zip(directions, expected, strict=True))
    weight = torch.rand(6)
    (expected_weighted,) = torch.autograd.grad(0.3 * (weight * F.softplus(fake)).mean(), fake)
    assert torch.allclose(discriminator_direction(fake, 0.3, 6, sample_weight=weight)[0], expected_weighted)


@every_kind
@pytest.mark.usefixtures("float64")
def test_x0_and_logit_of_one_forward_are_differentiated_exactly_to_weights_and_inputs(kind: str) -> None:
    networks, (x_t, t, conditioning, step) = make_networks(kind), inputs()
    down, side = torch.randn(COUNT, 4, 8, 8), torch.randn(COUNT)
    with networks.acting_as(FAKE_SCORE):
        leaf = x_t.clone().requires_grad_()
        x0, logit = networks.fake_score(leaf, t, conditioning, step)
        loss = (x0 * down).sum() + (logit * side).sum()
        wanted, *of_weights = torch.autograd.grad(loss, [leaf, *networks.parameters(FAKE_SCORE)], allow_unused=True)
    found = networks.pull_back(FAKE_SCORE, x_t, t, conditioning, down, step, side)
    assert relative_error(found, wanted) < ROUNDING
    assert all(parameter.grad is None for role in ROLES for parameter in networks.parameters(role))
    x0, logit = networks.fake_score(x_t, t, conditioning, step)
    networks.predict(STUDENT, x_t, t, conditioning)  # another role in between
    networks.backward(FAKE_SCORE, x0, down, (logit, side))
    pairs = zip(networks.parameters(FAKE_SCORE), of_weights, strict=True)
    assert all((p.grad is None) == (w is None) or relative_error(p.grad, w) < ROUNDING for p, w in pairs)
    assert all(parameter.grad is not None for parameter in networks.discriminator.parameters())


@every_kind
def test_a_discriminator_starts_at_one_half_and_costs_no_call(kind: str) -> None:
    networks, (x_t, t, conditioning, step) = make_networks(kind), inputs()
    with torch.no_grad():
        nn.init.zeros_(networks.discriminator.whole[-1].weight)
        plain = networks.predict(FAKE_SCORE, x_t, t, conditioning, step)
        x0, logit = networks.fake_score(x_t, t, conditioning, step)
    assert torch.equal(x0, plain)
    assert not logit.any()
    assert dict(networks.calls) == {"fake_score forward": 2 * COUNT}


@pytest.mark.usefixtures("float64")
def test_the_students_ascent_is_minus_the_gradient_of_r_dms_loss_and_its_adversarial_loss() -> None:
    networks, (x0, _, conditioning, step) = make_networks(), inputs()
    tau, noise = torch.tensor([40, 300, 700, 900]), torch.randn(COUNT, 4, 8, 8)
    samples = Samples(torch.randn_like(x0), torch.full((COUNT,), 999), x0, step, conditioning)
    estimate = estimate_reward(networks, samples, tau, noise, micro_batch_size=3)
    objective = GNDM(gndm_lambda=0.0, advantage_normalization="sample", group_size=1, gen_cls_loss_weight=0.7)
    advantage = objective.advantage(estimate, RunningMeans())
    found = ascent(networks, samples, estimate, advantage.pull, 3) / x0.numel()
    leaf = x0.clone().requires_grad_()
    _, logit = networks.fake_score(networks.schedule.add_noise(leaf, noise, tau), tau, conditioning, step)
    goal = x0 + estimate.reward / estimate.distance.view(-1, 1, 1, 1)
    loss = 0.5 * F.mse_loss(leaf, goal) + 0.7 * F.softplus(-logit).mean()
    with networks.acting_as(FAKE_SCORE):
        (expected,) = torch.autograd.grad(loss, leaf)
    assert relative_error(found, -expected) < ROUNDING
    assert relative_error(found, estimate.reward / estimate.distance.view(-1, 1, 1, 1) / x0.numel()) > 0.01


def test_a_discriminators_logit_tends_to_the_log_ratio_of_the_densities() -> None:
    block = nn.Sequential(nn.Linear(1, 64), nn.Tanh()).requires_grad_(False)
    block[0].weight *= 2
    discriminator = Discriminator(Features(block), 64)
    optimizer = torch.optim.Adam(discriminator.parameters(), 3e-3)
    for _ in range(400):
        fake, real = (block(mean + torch.randn(512, 1, 1)) for mean in (0.0, 1.0))
        for features, pictures in ((fake, False), (real, True)):
            logit = discriminator(features)
            logit.backward(discriminator_direction(logit, 1.0, 512, pictures=pictures)[0])
        optimizer.step()
        optimizer.zero_grad()
    x = torch.linspace(-1.5, 2.5, 9)
    with torch.no_grad():
        found = discriminator(block(x.view(-1, 1, 1)))
    assert (found - (x - 0.5)).abs().max() < 0.35  # log N(x; 1, 1) - log N(x; 0, 1)


def test_density_ratios_have_mean_one_over_the_samples_at_each_noise_level() -> None:
    statistics, tau = RunningMeans(), torch.rand(4000)
    logit = torch.randn(4000) + 3 * (tau > 0.5)
    ratio = density_ratio(logit, tau, statistics)
    assert all(abs(ratio[half].mean() - 1) < 1e-4 for half in (tau > 0.75, tau < 0.25))
    again = density_ratio(logit[:8], tau[:8], statistics)
    assert relative_error(again, ratio[:8]) < 0.1  # a small update hardly moves the running means
    assert density_ratio(torch.full((4,), 1e9), tau[:4], RunningMeans()).isfinite().all()


def test_the_students_pull_fades_where_it_is_taken_for_a_picture() -> None:
    pull = student_pull(torch.tensor([-30.0, 0.0, 30.0]), 0.5, 64)
    assert torch.allclose(pull, torch.tensor([32.0, 16.0, 0.0]), atol=1e-5)
    estimate = make_estimate(*torch.randn(3, 4, 4, 8, 8))
    plain = GNDM(group_size=4).advantage(estimate, RunningMeans()).pull
    judged = replace(estimate, logit=torch.zeros(4))
    assert plain.logit is None
    assert GNDM(group_size=4).advantage(judged, RunningMeans()).pull.logit is None  # without a weight


def test_a_run_moves_the_discriminator_whose_loss_falls(argv) -> None:
    it = make_run(argv(max_train_steps=12, train_batch_size=16, learning_rate=1e-3, guidance_cls_loss_weight=1.0))
    found = []
    it.state.monitor.observe = lambda health: found.append(health["discriminator/loss"]) or []
    train_run(it)
    assert len(found) == 12
    assert sum(found[-3:]) / 3 < 0.97 * found[0]


def test_an_update_counts_the_discriminators_calls(argv) -> None:
    it = make_run(argv(fake_updates_per_step=2))
    train_run(it)
    forwards = 1 + 1 + 2 * 2  # R_dm, the pull on the logit, and samples and pictures twice
    assert it.networks.calls["fake_score forward"] == 2 * 8 * forwards
    assert it.networks.calls["fake_score backward"] == 2 * 8 * (forwards - 1)


def test_pictures_depend_on_keys_and_purpose_alone(argv) -> None:
    run = make_run(argv()).distillation
    latents, conditioning = run.pictures.batch("a", [3, 8])
    assert latents.shape == (8, *run.latent_shape) and latents.dtype == torch.float32 and len(conditioning) == 8
    assert torch.equal(run.pictures.batch("a", [8])[0], latents[4:])
    assert not torch.equal(run.pictures.batch("b", [3, 8])[0], latents)


def test_the_prompt_of_a_picture_is_the_one_that_it_was_drawn_for(argv) -> None:
    run = make_run(argv()).distillation
    images = run.pictures.images
    chosen = images.chosen(run.draws.uniform("a", [0, 1]).cpu())
    expected = run.prompts.once([images.prompts.index(int(number)) for number in chosen])
    _, conditioning = run.pictures.batch("a", [0, 1])
    assert torch.equal(conditioning.tensors["prompt_embeds"], expected.tensors["prompt_embeds"])


def test_samples_and_pictures_are_read_at_the_same_times_and_steps(argv, monkeypatch: pytest.MonkeyPatch) -> None:
    it = make_run([*argv(), "--fake_score_steps"])
    run, batch, seen = it.distillation, collect(it.distillation, 0), []
    forward = Networks.fake_score

    def watched(networks: Networks, x_t: Tensor, t: Tensor, conditioning: Any, step: Tensor) -> Any:
        seen.append((t, step))
        return forward(networks, x_t, t, conditioning, step)

    monkeypatch.setattr(Networks, "fake_score", watched)
    fake_score_update(run, batch, 0)
    (times, steps), (other_times, other_steps) = seen
    assert torch.equal(times, other_times) and torch.equal(steps, other_steps)


@pytest.mark.usefixtures("float64")
def test_pictures_train_the_discriminator_alone_and_not_the_denoising(argv) -> None:
    it = make_run(argv())
    randomise_adapters(it.networks)
    run, batch = it.distillation, collect(it.distillation, 0)
    t = torch.full((8,), 500)
    judge_pictures(run, batch, t, 0)
    found = [parameter.grad for parameter in it.networks.parameters(FAKE_SCORE)]
    x0, conditioning = run.pictures.batch("picture/0", batch.keys)
    noise = run.draws.normal("picture_noise/0", batch.keys, run.latent_shape)
    x_t = run.networks.schedule.add_noise(x0, noise, t)
    _, logit = run.networks.fake_score(x_t, t, conditioning, batch.samples.step)
    with run.networks.acting_as(FAKE_SCORE):
        loss = 1e-2 * F.softplus(-logit).mean()
        wanted = torch.autograd.grad(loss, run.networks.parameters(FAKE_SCORE), allow_unused=True)
    pairs = list(zip(found, wanted, strict=True))
    assert all((f is None) == (w is None) for f, w in pairs)
    assert relative_error([f for f, _ in pairs if f is not None], [w for _, w in pairs if w is not None]) < ROUNDING


@pytest.mark.parametrize("algorithm", ["dmd2", "uni_instruct"])
def test_a_run_with_a_discriminator_resumes_exactly(algorithm: str, argv, tmp_path: Path) -> None:
    flags = ["--fake_score_steps"]
    assert_resuming_changes_nothing(argv, tmp_path, flags, algorithm=algorithm, fake_updates_per_step=1)


def test_any_member_may_have_the_adversarial_branch_and_the_correction(argv) -> None:
    it = make_run(argv(algorithm="gndm", gen_cls_loss_weight=0.01))
    assert it.distillation.objective.gen_cls_loss_weight == 0.01 and it.networks.discriminator is not None
    assert train_run(it) == 0


def test_the_plan_counts_the_discriminator(argv, teacher_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    plain = run_arguments(teacher_folder, prompts_file, tmp_path / "plain", algorithm="dmd")
    found = [plan_memory(parse_args(words)).sizes for words in (argv(), plain)]
    name = "the discriminator"
    networks = make_run(argv()).networks
    assert found[0][name] == 12 * sum(parameter.numel() for parameter in networks.discriminator.parameters())
    assert found[1][name] == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (dict(algorithm="dmd2", gen_cls_loss_weight=0), "dmd2 with --gen_cls_loss_weight 0 is --algorithm dmd"),
        (dict(guidance_cls_loss_weight=0.1), "--guidance_cls_loss_weight would have no effect without a discriminator"),
        (dict(algorithm="dmd2", fake_updates_per_step=0), "learns in the fake score's updates; raise --fake_updates"),
        (dict(f_divergence="jeffreys"), "--f_divergence would have no effect with --algorithm gndm; leave it out"),
        (dict(algorithm="dmd2", target_train_steps=5), "--target_train_steps would have no effect; .* --teacher_t"),
        (dict(algorithm="dmd2", center_crop=True), "--center_crop would have no effect; .* add --train_data_dir"),
        (dict(num_target_images=50), "--num_target_images would have no effect; .* add --teacher_target samples"),
    ],
)  # fmt: skip
def test_flags_without_an_effect_are_refused_in_a_sentence(flags: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RunConfig.of(**{"teacher_target": "score", **flags})


def test_a_discriminator_is_refused_in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="launch without FSDP"):
        RunConfig.of(algorithm="f_distill", teacher_target="score")


def test_the_defaults_follow_from_the_algorithm_and_survive_a_file(tmp_path: Path) -> None:
    for algorithm, weight, divergence in (
        ("gndm", 0.0, None), ("dmd2", 5e-3, None), ("f_distill", 5e-3, "jensen_shannon"),
        ("uni_instruct", 0.0, "reverse_kl"),
    ):  # fmt: skip
        config = RunConfig.of(algorithm=algorithm, teacher_target="score")
        assert (config.method.gen_cls_loss_weight, config.method.f_divergence) == (weight, divergence)
        path = tmp_path / f"{algorithm}.yaml"
        path.write_text(config.as_yaml())
        assert RunConfig.from_yaml(path) == config
        assert "f_divergence" not in path.read_text()
