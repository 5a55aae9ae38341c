"""What rewards hold, and when: their graphs, their decoder, their networks, and what a plan says of them."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from parts import PROMPTS, change, make_run, relative_error, run_arguments, train_run
from parts_families import make_pipeline, make_vae
from parts_float64 import ROUNDING
from parts_rewards import SAVE, clip_config
from safetensors.torch import save_file
from test_memory_plan import TRAINING, allocated_peak, measured_peak
from torch import Tensor
from transformers import CLIPModel

from rdm_diffusers.config import RunConfig
from rdm_diffusers.distillation import RunningMeans, differentiable_gradients, reward_values
from rdm_diffusers.families import FAMILIES, Teacher, rebuilt
from rdm_diffusers.rewards import load_reward, reward_networks
from rdm_diffusers.tiny.captions import CAPTIONS
from rdm_diffusers.training import trainer as trainer_module
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.devices import prepare_vae
from rdm_diffusers.training.external_rewards import join_rewards, load_rewards
from rdm_diffusers.training.memory_model import LivePeak, nbytes
from rdm_diffusers.training.memory_plan import plan_memory
from rdm_diffusers.training.memory_table import MemoryPlan
from rdm_diffusers.training.reward_memory import measure_rewards
from rdm_diffusers.training.run_folder import check_resumable
from rdm_diffusers.training.teacher_checks import check_with_teacher, checked_tiny_vae

GNDMR = {"algorithm": "gndmr", "reward": "tiny_bold"}
NETWORK = """
import torch


class Network(torch.nn.Module):
    differentiable = True
    sent = []  # where it was sent to

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def to(self, device):
        self.sent.append(str(device))
        return super().to(device)

    def forward(self, images, prompts):
        return self.layer(images.float()).mean((1, 2, 3))


class BlackBox(Network):
    differentiable = False
    sent = []


def leave(images, prompts):
    raise SystemExit
"""


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run with a reward."""
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path / "student", **{**GNDMR, **changes})


def make_tiny_vae(folder: Path, channels: int = 4, blocks: int = 3, width: int = 8, **changes) -> AutoencoderTiny:
    """An untrained one for the tests' teachers, saved into a folder."""
    sizes = dict(
        encoder_block_out_channels=(width,) * blocks, decoder_block_out_channels=(width,) * blocks,
        num_encoder_blocks=(1,) * blocks, num_decoder_blocks=(1,) * blocks, latent_channels=channels,
    )  # fmt: skip
    vae = AutoencoderTiny(**sizes, **changes).eval()
    vae.save_pretrained(folder)
    return vae


# --- graphs -------------------------------------------------------------------------------------------------------


def contrast(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).std(1)


contrast.name, contrast.differentiable = "contrast", True  # type: ignore[attr-defined]
REWARDS = [load_reward("tiny_prompt", "cpu").reward, contrast]


def graph_peak(rewards: list, count: int, micro_batch_size: int) -> int:
    """Bytes that the gradients of some pictures take beside the decoder's weights."""
    pipeline = make_pipeline("StableDiffusionPipeline")
    vae = pipeline.vae.requires_grad_(False).to("meta")
    decode = partial(FAMILIES["StableDiffusionPipeline"].decode, pipeline)
    with LivePeak(vae) as live:
        differentiable_gradients(
            rewards, decode, torch.empty(count, 4, 8, 8, device="meta"), CAPTIONS[:count], micro_batch_size
        )
    return live.peak


def test_one_decoder_graph_lives_at_a_time_however_many_micro_batches_and_rewards_there_are() -> None:
    alone = graph_peak([contrast], 2, 2)
    assert graph_peak([contrast, contrast, contrast], 8, 2) < 1.3 * alone
    assert graph_peak([contrast], 4, 4) > 1.9 * alone


def test_gradients_are_bit_for_bit_those_of_one_whole_graph() -> None:
    pipeline = make_pipeline("StableDiffusionPipeline")
    pipeline.vae.requires_grad_(False)
    x0, prompts = torch.randn(4, 4, 8, 8), CAPTIONS[:4]
    decode = partial(FAMILIES["StableDiffusionPipeline"].decode, pipeline)
    found = differentiable_gradients(REWARDS, decode, x0, prompts, 4)
    latents = x0.clone().requires_grad_()
    images = decode(latents)
    for reward, part in zip(REWARDS, found, strict=True):
        values = reward(images, prompts)
        (whole,) = torch.autograd.grad(values.sum(), latents, retain_graph=True)
        assert torch.equal(part.values, values) and torch.equal(part.gradient, whole)
        assert whole.abs().max() > 0


@pytest.mark.usefixtures("float64")
def test_a_batch_of_its_own_for_decoding_changes_no_result(argv) -> None:
    run = make_run(argv(decode_batch_size=3, reward=["tiny_bold", "tiny_prompt_black_box"])).distillation
    assert run.rewards.micro_batch_size == 3 and run.micro_batch_size == 8
    batch, results = collect(run, 0), []
    for size in (3, 8):
        rewards, statistics = replace(run.rewards, micro_batch_size=size), RunningMeans()
        tilted, _ = rewards.tilt(batch.samples, batch.sample_prompts, statistics)
        ascent = torch.ones_like(batch.samples.x0)
        results.append([tilted.weight, rewards.join(ascent, tilted, batch.sample_prompts, statistics)[0] - ascent])
    assert relative_error(*results) < ROUNDING


# --- the decoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["SanaPipeline", "QwenImagePipeline", "QwenImage21Pipeline", "StableDiffusionPipeline"]
)
def test_gradient_checkpointing_is_for_the_autoencoders_that_support_it_and_the_others_are_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pipeline = make_pipeline(name)
    pipeline.save_pretrained(tmp_path)
    config = RunConfig.of(
        pretrained_model=str(tmp_path), gradient_checkpointing=True, num_student_steps=4, resolution=32, **GNDMR
    )
    check_with_teacher(config)
    supports = name == "StableDiffusionPipeline"
    assert ("has no gradient checkpointing" in capsys.readouterr().out) == (not supports)
    cpu, teacher = torch.device("cpu"), Teacher(pipeline, FAMILIES[name], name)
    rewards = join_rewards(load_rewards(config, cpu), teacher, cpu, config)
    assert any(getattr(module, "gradient_checkpointing", False) for module in pipeline.vae.modules()) == supports
    latents = torch.randn(1, *teacher.family.latent_shape(pipeline, 32))
    (found,) = differentiable_gradients(rewards.rewards, rewards.decode, latents, PROMPTS[:1], 1)
    assert found.gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_a_tiny_autoencoder_decodes_as_in_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    vae = make_tiny_vae(tmp_path, scaling_factor=0.7, shift_factor=0.2)
    stock, family = make_pipeline(name), FAMILIES[name]
    latents = torch.randn(1, *family.latent_shape(stock, 32))
    shift = 0.2 if name != "StableDiffusionPipeline" else 0.0
    expected = vae.decode(latents / 0.7 + shift).sample / 2 + 0.5
    decoded = family.decode(rebuilt(family.pipeline_class, stock, vae=vae), latents)
    torch.testing.assert_close(decoded, expected.clamp(0, 1))
    assert stock.vae is not vae


def test_a_stock_pipeline_with_a_tiny_autoencoder_shows_the_pictures_that_the_rewards_see(tmp_path: Path) -> None:
    pipeline: StableDiffusionPipeline = make_pipeline("StableDiffusionPipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae = make_tiny_vae(tmp_path)
    call = partial(pipeline, PROMPTS[0], num_inference_steps=1, guidance_scale=1.0)
    latents = call(generator=torch.Generator().manual_seed(0), output_type="latent").images
    shown = call(generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(FAMILIES["StableDiffusionPipeline"].decode(pipeline, latents), shown)


def test_the_rewards_alone_decode_with_the_tiny_autoencoder(argv, tmp_path: Path) -> None:
    make_tiny_vae(tmp_path / "vae")
    it = make_run(argv(max_train_steps=1, reward_vae=tmp_path / "vae"))
    decoded: list[int] = []
    it.teacher.pipeline.vae.decoder.register_forward_hook(lambda *args: decoded.append(1))
    assert train_run(it) == 0 and not decoded
    assert type(it.distillation.rewards.decode.args[0].vae) is AutoencoderTiny
    change(it, "rewards", reward_vae=None)
    assert trainer_module.validation_picture(it.distillation, it.state, it.teacher, it.texts) and decoded


def test_tiny_autoencoders_that_do_not_fit_are_refused_in_a_sentence(tmp_path: Path) -> None:
    family = FAMILIES["StableDiffusionPipeline"]
    for folder, sizes in {"wide": {"channels": 16}, "small": {"blocks": 2}, "lacking": {}, "fits": {}}.items():
        make_tiny_vae(tmp_path / folder, **sizes)
    make_vae().save_pretrained(tmp_path / "large")
    (tmp_path / "empty").mkdir()
    (file,) = (tmp_path / "lacking").glob("*.safetensors")
    save_file({"no": torch.zeros(1)}, file)
    complaints = {
        "wide": "latents of 16 channels into pictures 4 times as wide; this teacher's have 4 channels and become 4",
        "small": "latents of 4 channels into pictures 2 times as wide; this teacher's have 4 channels and become 4",
        "lacking": "its network lacks ",
        "large": "holds a network of the class AutoencoderKL; give an AutoencoderTiny.",
        "empty": "cannot be read: ",
        "nowhere": "is neither a local folder nor",
    }
    for folder, said in complaints.items():
        with pytest.raises(ValueError, match=r"vae|autoencoder") as caught:
            checked_tiny_vae(str(tmp_path / folder), family, 4, 4)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert checked_tiny_vae(str(tmp_path / "fits"), family, 4, 4)
    with pytest.raises(ValueError, match="a QwenImagePipeline takes no AutoencoderTiny; leave it out"):
        checked_tiny_vae(str(tmp_path / "fits"), FAMILIES["QwenImagePipeline"], 4, 4)
    with pytest.raises(ValueError, match="--reward_vae decodes pictures for rewards alone; add --reward"):
        RunConfig.of(reward_vae=str(tmp_path / "fits"))


def test_a_run_of_before_there_were_tiny_autoencoders_resumes_without_one_only() -> None:
    arguments = RunConfig.of().as_arguments()
    new = ("reward_vae", "decode_batch_size", "enable_vae_slicing", "enable_vae_tiling")
    saved = {name: value for name, value in arguments.items() if name not in new}
    assert RunConfig.from_record(saved).as_arguments() == arguments
    assert check_resumable({**arguments, "decode_batch_size": 1, "enable_vae_tiling": True}, saved) is None
    with pytest.raises(ValueError, match=r"--reward_vae \(was None, is taesd\)"):
        check_resumable({**arguments, "reward_vae": "taesd"}, saved)


def test_tiles_and_slices_are_turned_on_where_they_are_and_refused_elsewhere(argv) -> None:
    it = make_run(argv(enable_vae_tiling=True, enable_vae_slicing=True))
    assert it.teacher.pipeline.vae.use_tiling and it.teacher.pipeline.vae.use_slicing
    with pytest.raises(ValueError, match="--enable_vae_tiling does not work here, because AsymmetricAutoencoderKL has"):
        prepare_vae(AsymmetricAutoencoderKL(norm_num_groups=4), it.config.memory)


@pytest.mark.usefixtures("float64")
def test_gradients_are_exact_through_tiles() -> None:
    vae = make_vae(sample_size=16)
    vae.enable_tiling()
    z, direction = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 4, 8, 8)
    (gradient,) = torch.autograd.grad(vae.decode(z).sample.square().sum(), z)
    ahead, behind = (vae.decode(z.detach() + h * direction).sample.square().sum() for h in (1e-5, -1e-5))
    assert (gradient * direction).sum() == pytest.approx(((ahead - behind) / 2e-5).item(), rel=1e-5)


# --- where networks are -------------------------------------------------------------------------------------------


def test_with_offload_rewards_and_autoencoder_are_on_the_device_only_while_they_work(argv, tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text(NETWORK)
    names = [f"{tmp_path / 'network.py'}:{name}" for name in ("Network", "BlackBox")]
    it = make_run(argv(max_train_steps=1, reward=names, offload=True))
    vae, sent = it.teacher.pipeline.vae, []
    vae_to = vae.to
    vae.to = lambda device: sent.append(str(device)) or vae_to(device)
    networks = reward_networks(it.distillation.rewards.rewards)
    for network in networks:
        network.sent.clear()
    assert train_run(it) == 0
    once = ["cpu", "cpu"]  # to the device and back
    assert [network.sent for network in networks] == [once, once]
    assert sent == once * 2  # the decoder works for the black box, and again for the other


def test_rewards_are_freed_before_the_last_pictures_are_drawn(argv, tmp_path: Path, monkeypatch) -> None:
    SAVE["clip_score"](tmp_path / "clip")
    it = make_run(argv(reward=f"clip_score={tmp_path / 'clip'}"))
    network = weakref.ref(it.rewards[0].reward)
    freed = []
    monkeypatch.setattr(trainer_module, "draw_and_measure", lambda *args: freed.append(network() is None))
    it.evaluate()
    assert freed == [True]


# --- plans --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pipeline whose decoder's graph is most of what a run needs; small rewards and a tiny autoencoder are beside."""
    monkeypatch.chdir(tmp_path)
    for name in ("clip_score", "hpsv2", "image_reward"):
        SAVE[name](tmp_path / name)
    make_tiny_vae(tmp_path / "vae", width=64)
    pipeline = make_pipeline("StableDiffusionPipeline")
    pipeline.register_modules(vae=make_vae(block_out_channels=(64, 64, 64)).requires_grad_(False))
    return pipeline


def test_a_plan_is_what_a_run_with_rewards_takes(wide, prompts_file: Path, tmp_path: Path) -> None:
    wide.save_pretrained(tmp_path / "teacher")
    changes = {"reward": ["clip_score=clip_score", "hpsv2=hpsv2"], "algorithm": "gndmr", "decode_batch_size": 3}
    it = make_run(run_arguments(tmp_path / "teacher", prompts_file, tmp_path / "student", **changes))
    plan = plan_memory(it.config, "cpu", [weighted.reward for weighted in it.rewards])
    held = sum(plan.sizes[name] for name in ("autoencoder", "rewards"))
    measured, planned = measured_peak(it) + held, plan.phases["external rewards"]
    assert planned > 2 * max(plan.phases[phase] for phase in TRAINING)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": True}, {"reward_vae": "vae"}, {"reward": ("tiny_prompt_black_box",)},
     {"reward": ("image_reward=image_reward",)}],
    ids=lambda changes: " ".join(changes),
)  # fmt: skip
def test_the_planned_peak_of_scoring_is_what_it_takes(changes: dict, wide) -> None:
    config = RunConfig.of(
        **{"algorithm": "gndmr", "reward": ("clip_score=clip_score",), "fold_adapters": False, **changes}
    )
    config = config.changed("memory", decode_batch_size=6)
    family, cpu = FAMILIES["StableDiffusionPipeline"], torch.device("cpu")
    run = join_rewards(load_rewards(config, cpu), Teacher(wide, family, "wide"), cpu, config)
    score = reward_values if "tiny" in run.rewards[0].name else differentiable_gradients
    x0, prompts = torch.randn(6, 4, 8, 8), CAPTIONS[:6]
    measured = allocated_peak(lambda: score(run.rewards, run.decode, x0, prompts, 6))
    planned = measure_rewards(config, run.rewards, family, wide, (4, 8, 8))
    assert planned.peak == pytest.approx(measured, rel=0.1) and not planned.not_counted


@pytest.fixture(scope="module")
def plans(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryPlan, MemoryPlan]:
    """Of a run with three rewards, without and with `--offload`."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "network.py").write_text(NETWORK)
    SAVE["clip_score"](folder / "clip")
    names = [f"clip_score={folder / 'clip'}", *(f"{folder / 'network.py'}:{name}" for name in ("Network", "leave"))]
    teacher = {"pretrained_model": str(teacher_folder), "algorithm": "gndmr", "reward": names}
    configs = [RunConfig.of(**teacher, offload=offload) for offload in (False, True)]
    loaded = [weighted.reward for weighted in load_rewards(configs[0], torch.device("cpu"))]
    return tuple(plan_memory(config, rewards=loaded) for config in configs)


def test_a_plan_counts_weights_and_names_what_it_cannot_know(plans: tuple[MemoryPlan, MemoryPlan]) -> None:
    plan, clip = plans[0], CLIPModel(clip_config())
    assert plan.sizes["rewards"] == nbytes(clip) + 4 * (9 + 3)
    assert plan.not_counted == ("the activations of the reward Network", "the reward leave")
    assert "kernels' workspaces, the activations of the reward Network, the reward leave\n" in plan.as_table()


def test_rewards_that_are_not_loaded_are_named_and_their_decoder_is_counted(teacher_folder: Path) -> None:
    config = RunConfig.of(pretrained_model=str(teacher_folder), algorithm="gndmr", reward=["hpsv2", "a.py:b:-1"])
    family = FAMILIES["StableDiffusionPipeline"]
    found = measure_rewards(config, None, family, make_pipeline("StableDiffusionPipeline"), (4, 8, 8))
    assert found.not_counted == ("the reward hpsv2", "the reward a.py:b:-1")
    assert found.weights == 0 and found.peak > 1e5


def test_offload_takes_the_rewards_out_of_all_phases_but_their_own(plans: tuple[MemoryPlan, MemoryPlan]) -> None:
    stays, leaves = plans
    held = stays.sizes["rewards"] + stays.sizes["autoencoder"]
    average = stays.sizes["the student's moving average"]
    for phase, freed in {"external rewards": average, "forward and backward": average + held}.items():
        assert stays.phases[phase] - leaves.phases[phase] == freed
