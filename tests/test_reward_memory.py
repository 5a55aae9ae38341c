"""What rewards hold, and when: their graphs, their decoder, their networks, and what a plan says of them."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from parts import PROMPTS, change, make_run, relative_error, run_arguments, train_run
from parts_families import make_pipeline, make_vae
from parts_rewards import SAVE
from safetensors.torch import save_file
from test_memory_plan import TRAINING, bytes_before_training, measured_peak
from torch import Tensor

from rdm_diffusers.config import RunConfig
from rdm_diffusers.distillation import differentiable_gradients
from rdm_diffusers.families import FAMILIES, Teacher, rebuilt
from rdm_diffusers.networks import STUDENT
from rdm_diffusers.rewards import load_reward, reward_networks
from rdm_diffusers.tiny.captions import CAPTIONS
from rdm_diffusers.training import trainer as trainer_module
from rdm_diffusers.training.devices import prepare_vae
from rdm_diffusers.training.external_rewards import join_rewards, load_rewards
from rdm_diffusers.training.memory_model import LivePeak
from rdm_diffusers.training.memory_plan import plan_memory
from rdm_diffusers.training.teacher_checks import check_with_teacher, checked_tiny_vae

GNDMR = {"algorithm": "gndmr", "reward": "tiny_bold"}
NETWORK = '''
import torch


class Network(torch.nn.Module):
    """The mean of a convolution; it says where it was sent."""

    differentiable = {differentiable}
    sent = []

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def to(self, device):
        self.sent.append(str(device))
        return super().to(device)

    def forward(self, images, prompts):
        return self.layer(images.float()).mean((1, 2, 3))
'''


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run with a reward."""
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path / "student", **{**GNDMR, **changes})


def make_tiny_vae(folder: Path, channels: int = 4, blocks: int = 3, **changes) -> AutoencoderTiny:
    """An untrained one for the tests' teachers, saved into a folder."""
    sizes = dict(
        encoder_block_out_channels=(8,) * blocks, decoder_block_out_channels=(8,) * blocks,
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
    assert graph_peak([contrast], 8, 2) < 1.05 * alone
    assert graph_peak([contrast, contrast, contrast], 8, 2) < 1.3 * alone  # the decoder's backward keeps its inputs
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
def test_a_batch_of_its_own_for_decoding_trains_the_same_student(argv, tmp_path: Path) -> None:
    trained = []
    for size in (None, 3):
        it = make_run(argv(decode_batch_size=size, reward=["tiny_bold", "tiny_prompt_black_box"]))
        assert it.distillation.rewards.micro_batch_size == (size or 8)
        train_run(it)
        trained.append([parameter.detach().clone() for parameter in it.networks.parameters(STUDENT)])
    assert relative_error(*trained) < 1e-9


# --- the decoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SanaPipeline", "QwenImagePipeline", "StableDiffusionPipeline"])
def test_gradient_checkpointing_is_for_the_autoencoders_that_support_it_and_the_others_are_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pipeline = make_pipeline(name)
    pipeline.save_pretrained(tmp_path)
    config = RunConfig.of(pretrained_model=str(tmp_path), gradient_checkpointing=True, num_student_steps=4, **GNDMR)
    check_with_teacher(config)
    supports = name == "StableDiffusionPipeline"
    assert ("has no gradient checkpointing" in capsys.readouterr().out) == (not supports)
    cpu, teacher = torch.device("cpu"), Teacher(pipeline, FAMILIES[name], name)
    rewards = join_rewards(load_rewards(config, cpu), teacher, cpu, config)
    assert any(getattr(module, "gradient_checkpointing", False) for module in pipeline.vae.modules()) == supports
    latents = torch.randn(1, *teacher.family.latent_shape(pipeline, 32 if name != "SanaPipeline" else 16))
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
    it = make_run(argv(reward_vae=tmp_path / "vae"))
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


@pytest.mark.parametrize("differentiable", [True, False])
def test_with_offload_rewards_and_autoencoder_are_on_the_device_only_while_they_work(
    differentiable: bool, argv, tmp_path: Path
) -> None:
    (tmp_path / "network.py").write_text(NETWORK.replace("{differentiable}", str(differentiable)))
    it = make_run(argv(reward=f"{tmp_path / 'network.py'}:Network", offload=True))
    (network,), sent = reward_networks(it.distillation.rewards.rewards), []
    vae_to = it.teacher.pipeline.vae.to
    it.teacher.pipeline.vae.to = lambda device: sent.append(str(device)) or vae_to(device)
    network.sent.clear()
    assert train_run(it) == 0
    assert sent == network.sent == ["cpu", "cpu"] * 2  # to the device and back, in each of two updates


def test_rewards_are_freed_before_the_last_pictures_are_drawn(argv, tmp_path: Path, monkeypatch) -> None:
    SAVE["clip_score"](tmp_path / "clip")
    it = make_run(argv(reward=f"clip_score={tmp_path / 'clip'}"))
    network = weakref.ref(it.rewards[0].reward)
    freed = []
    monkeypatch.setattr(trainer_module, "draw_and_measure", lambda *args: freed.append(network() is None))
    it.evaluate()
    assert freed == [True]


# --- plans --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_with_wide_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose decoder's graph is most of what a run needs."""
    pipeline, folder = make_pipeline("StableDiffusionPipeline"), tmp_path_factory.mktemp("wide")
    pipeline.register_modules(vae=make_vae(block_out_channels=(64, 64, 64)))
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [{}, {"decode_batch_size": 3}, {"gradient_checkpointing": True}, {"reward_vae": "vae"},
     {"reward": ["tiny_prompt_black_box"]}, {"reward": ["clip_score=clip", "hpsv2=hpsv2"]}],
    ids=lambda changes: " ".join(changes),
)  # fmt: skip
def test_a_plan_is_what_rewards_take(
    changes: dict, teacher_with_wide_decoder: Path, prompts_file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in (("clip_score", "clip"), ("hpsv2", "hpsv2")):
        SAVE[name](tmp_path / folder)
    make_tiny_vae(tmp_path / "vae")
    changes = {"reward": ["clip_score=clip"], "algorithm": "gndmr", "max_train_steps": 2, **changes}
    it = make_run(run_arguments(teacher_with_wide_decoder, prompts_file, tmp_path / "student", **changes))
    plan = plan_memory(it.config, "cpu", [weighted.reward for weighted in it.rewards])
    networks = [it.distillation.rewards.decode.args[0].vae, *reward_networks(it.distillation.rewards.rewards)]
    extra = sum(tensor.nbytes for each in networks for tensor in [*each.parameters(), *each.buffers()])
    measured = measured_peak(it) + extra
    most = max(TRAINING, key=plan.phases.__getitem__)
    planned = max(plan.phases["external rewards"], plan.phases[most])
    print(f"{changes}: measured {measured / 2**20:.2f} MiB, planned {planned / 2**20:.2f} MiB, {plan.phases}")
    assert bytes_before_training(it) + extra < planned == pytest.approx(measured, rel=0.1)
    assert not plan.not_counted


def test_a_plan_names_the_rewards_that_it_cannot_know(argv, tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text(NETWORK.replace("{differentiable}", "True") + "\n\ndef f(images, prompts):\n"
                                         "    raise SystemExit  # no plan calls it\n")  # fmt: skip
    names = [f"{tmp_path / 'network.py'}:Network", f"{tmp_path / 'network.py'}:f"]
    config = make_run(argv(reward=names)).config
    loaded = [weighted.reward for weighted in load_rewards(config, torch.device("cpu"))]
    plan, unloaded = plan_memory(config, rewards=loaded), plan_memory(config)
    assert plan.not_counted == ("the activations of the reward Network", "the reward f")
    assert plan.as_table().count("kernels' workspaces, the activations of the reward Network, the reward f") == 1
    assert plan.sizes["rewards"] == 4 * (9 + 3) and unloaded.sizes["rewards"] == 0
    assert unloaded.not_counted == tuple(f"the reward {name}" for name in names)
    assert unloaded.phases["external rewards"] > unloaded.sizes["autoencoder"]


def test_offload_takes_the_rewards_out_of_all_phases_but_their_own(argv, tmp_path: Path) -> None:
    SAVE["clip_score"](tmp_path / "clip")
    plans = []
    for offload in (None, True):
        config = make_run(argv(reward=f"clip_score={tmp_path / 'clip'}", offload=offload)).config
        plans.append(plan_memory(config, rewards=[each.reward for each in load_rewards(config, torch.device("cpu"))]))
    held, (stays, leaves) = plans[0].sizes["rewards"] + plans[0].sizes["autoencoder"], plans
    average = stays.sizes["the student's moving average"]
    for phase, freed in {"external rewards": average, "forward and backward": average + held}.items():
        assert stays.phases[phase] - leaves.phases[phase] == freed
