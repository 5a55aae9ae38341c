"""`--dry_run`: real-size teachers are planned from their configurations alone, and the plan is what is then needed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from parts import TEXT_DIM, make_run, run_arguments, train_run
from parts_configs import SDXL_UNET, TEACHERS, write_configs
from parts_families import CALLS, MAKERS, make_pipeline
from parts_sd3 import JOINT_DIM, TEXT_DIMS, make_shared
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import FAMILIES, PromptOptions, Teacher
from rdm_diffusers.networks import STUDENT
from rdm_diffusers.tiny.captions import MAX_TOKENS
from rdm_diffusers.training.memory_plan import plan_memory

TRAINING = ("rollouts and R_dm", "forward and backward", "optimiser's step")


def dry_run(teacher: Path | str, *words: str, student: str = "lora", device_type: str = "cuda"):
    """The plan of a run in bfloat16."""
    args = parse_args(["--pretrained_model", str(teacher), "--mixed_precision", "bf16", *words], student=student)
    return plan_memory(args, device_type)


# --- real sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"]
)
def test_real_size_teachers_are_planned_without_weights(
    teacher: str, tmp_path: Path, prompts_file: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, (name, parts, denoiser, encoders) = write_configs(teacher, tmp_path / "teacher"), TEACHERS[teacher]
    family = FAMILIES[name]
    (train_rdm_lora if family.has_lora else train_rdm_full).main(
        ["--pretrained_model", str(folder), "--prompts_file", str(prompts_file), "--output_dir", str(tmp_path / "out"),
         "--mixed_precision", "bf16", "--use_8bit_adam", "--gradient_checkpointing", "--dry_run"]
    )  # fmt: skip
    said = capsys.readouterr().out
    counts = {part: float(count.replace(",", "")) / 1e3 for part, count in re.findall(r"(\w+) +([\d,.]+) M par", said)}
    sizes = {what.strip(): float(size) for what, size in re.findall(r"(.+?) {2,}([\d.]+) GiB", said)}
    assert counts[family.denoiser_name] == pytest.approx(denoiser, rel=0.01)
    assert sum(count for part, count in counts.items() if "encoder" in part) == pytest.approx(encoders, rel=0.01)
    assert set(counts) == {*parts, *(["lora"] if family.has_lora else [])}
    assert sizes[f"{family.denoiser_name}, frozen"] == pytest.approx(2 * denoiser * 1e9 / 2**30, rel=0.12)
    last = said.strip().splitlines()[-1]
    assert last.startswith("peak, estimated") and float(last.split()[-2]) == max(sizes.values())


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_configs("stabilityai/stable-diffusion-xl-base-1.0", tmp_path_factory.mktemp("sdxl") / "teacher")


def test_each_memory_flag_lowers_what_it_is_for(sdxl: Path) -> None:
    plain = dry_run(sdxl)
    light = dry_run(sdxl, "--gradient_checkpointing", "--use_8bit_adam", "--offload", "--base_quantization", "nf4")
    assert light.sizes["activations of 4 samples"] < plain.sizes["activations of 4 samples"] / 5
    assert light.sizes["two optimisers"] == pytest.approx(plain.sizes["two optimisers"] / 4, rel=0.05)
    assert light.phases["the last pictures"] < plain.phases["the last pictures"] - 2**30
    with torch.device("meta"):
        layers = UNet2DConditionModel(**SDXL_UNET).modules()
    linears = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    saved = plain.sizes["unet, frozen"] - light.sizes["unet, frozen"]
    assert saved == pytest.approx((2 - 0.516) * linears, rel=0.01)


def test_text_encoders_that_encode_on_the_fly_are_counted_while_they_stay(teacher_folder: Path) -> None:
    stays, reads = "rollouts and R_dm", "reading an update's prompts"
    cached = dry_run(teacher_folder, "--encode_batch_size", "64")
    on_the_fly = dry_run(teacher_folder, "--encode_prompts", "on_the_fly")
    offloaded = dry_run(teacher_folder, "--encode_prompts", "on_the_fly", "--offload")
    encoders, average = cached.sizes["text encoders"], cached.sizes["the student's moving average"]
    assert on_the_fly.phases[stays] == cached.phases[stays] + encoders
    assert offloaded.phases[stays] == cached.phases[stays] - average
    assert offloaded.phases[reads] == on_the_fly.phases[reads] - average > encoders and reads not in cached.phases
    assert cached.sizes["reading 64 prompts, at most"] > 7 * on_the_fly.sizes["reading 8 prompts, at most"]
    assert cached.prompt_size == 2 * MAX_TOKENS * TEXT_DIM


def test_sharding_divides_what_it_spreads(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = dry_run(teacher_folder, student="full")
    monkeypatch.setenv("WORLD_SIZE", "4")
    replicated = dry_run(teacher_folder, student="full")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = dry_run(teacher_folder, student="full")
    assert replicated == alone
    for name in ("student and fake score", "two optimisers", "unet, frozen"):
        assert sharded.sizes[name] == alone.sizes[name] // 4
    assert sharded.sizes["blocks gathered from all processes"] > 0


# --- measured -----------------------------------------------------------------------------------------------------


def medium_unet() -> dict[str, UNet2DConditionModel]:
    """A U-Net of 12 million parameters."""
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 256), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=TEXT_DIM,
        attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return {"unet": unet.eval()}


def medium_transformer() -> dict[str, SD3Transformer2DModel]:
    """A transformer of 12 million parameters, of the kind of Stable Diffusion 3."""
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=32,
        num_attention_heads=8, caption_projection_dim=256, joint_attention_dim=JOINT_DIM,
        pooled_projection_dim=sum(TEXT_DIMS), pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    return {"transformer": transformer.eval()}


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teachers of which the denoiser is most, on 16 x 16 latents, by the denoiser's name."""
    folders = {}
    for name, parts in (("StableDiffusionPipeline", medium_unet()), ("StableDiffusion3Pipeline", medium_transformer())):
        pipeline = make_pipeline(name)
        pipeline.register_modules(**parts)
        component = next(iter(parts))
        folders[component] = tmp_path_factory.mktemp("medium") / component
        pipeline.save_pretrained(folders[component])
    return folders


def plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that hold numbers, of those that wrap others, too."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from plain(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def bytes_before_training(it: SimpleNamespace) -> int:
    """Of networks and moving average."""
    tensors = [tensor for module in it.networks.modules for tensor in [*module.parameters(), *module.buffers()]]
    storages = [tensor.untyped_storage() for tensor in plain([*tensors, *it.state.ema.shadow_params])]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measured_peak(it: SimpleNamespace) -> int:
    """The most bytes that a run's training holds at once."""

    def run() -> None:
        assert train_run(it) == 0

    return bytes_before_training(it) + allocated_peak(run)


def allocated_peak(call: Callable[[], object]) -> int:
    """The most bytes that a call holds beside what was there before, of what torch's allocator says to its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def compare(folder: Path, prompts_file: Path, output: Path, student: str = "lora", **changes) -> None:
    """Trains for two updates, and holds the plan against what that took."""
    usual = {"rank": None if student == "full" else 16, "num_student_steps": 1, "train_batch_size": 4}
    changes = {**usual, **changes}
    changes["max_sequence_length"] = CALLS["StableDiffusion3Pipeline"]["max_sequence_length"]
    it = make_run(run_arguments(folder, prompts_file, output, **changes), student)
    plan = plan_memory(it.config, "cpu")
    measured, planned = measured_peak(it), max(plan.phases[phase] for phase in TRAINING)
    print(f"{folder.name} {student} {changes}: measured {measured / 2**20:.0f} MiB, planned {planned / 2**20:.0f} MiB")
    assert planned == pytest.approx(measured, rel=0.15)


CASES = [*itertools.product(["unet", "transformer"], ["lora"], [None, True], [4]), ("unet", "lora", None, 8)]
CASES += [("unet", "full", True, 8), ("transformer", "full", None, 4)]


@pytest.mark.parametrize("denoiser, student, checkpointing, batch", CASES)
def test_the_plan_is_what_training_takes(
    denoiser: str, student: str, checkpointing: bool | None, batch: int, medium, prompts_file: Path, tmp_path: Path
) -> None:
    changes = {"train_batch_size": batch, "gradient_checkpointing": checkpointing}
    compare(medium[denoiser], prompts_file, tmp_path, student, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16"},
        {"base_quantization": "int8"},
        {"base_quantization": "fp8", "gradient_checkpointing": True},
        {"fold_adapters": True},
        {"student": "full", "mixed_precision": "bf16"},
        {"algorithm": "sid"},
        {"algorithm": "sid", "student": "full", "gradient_checkpointing": True},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_so_it_is_with_each_memory_flag(changes: dict, medium, prompts_file: Path, tmp_path: Path) -> None:
    if "base_quantization" in changes:
        pytest.importorskip("torchao")
    compare(medium["unet"], prompts_file, tmp_path, **changes)


def kept_by_forward(teacher: Teacher, x_t: Tensor) -> int:
    """Bytes that the student's forward really keeps for its backward."""
    networks = make_shared(teacher)
    own = {parameter.untyped_storage()._cdata for parameter in teacher.denoiser.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    prompt = "a red seven on a blue background"
    if teacher.name in ("QwenImage21Pipeline", "Krea2Pipeline"):  # the longest prompt is planned
        missing = teacher.encode_prompts([prompt]).tensors["prompt_embeds_mask"].eq(0).sum()
        prompt += "!" * int(missing)
    conditioning = teacher.encode_prompts([prompt] * len(x_t))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        networks.predict(STUDENT, x_t, torch.full((len(x_t),), 500), conditioning)
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("name", [name for name in MAKERS if FAMILIES[name].has_lora])
def test_the_planned_activations_are_what_a_forward_keeps(name: str, tmp_path: Path) -> None:
    make_pipeline(name).save_pretrained(tmp_path)
    options = PromptOptions(CALLS.get(name, {}).get("max_sequence_length"), CALLS.get(name, {}).get("height"), 3.5)
    words = ["--pretrained_model", str(tmp_path), "--train_batch_size", "8", "--rank", "2", "--lora_alpha", "4"]
    for flag, value in (("max_sequence_length", options.max_sequence_length), ("resolution", options.resolution)):
        words += [f"--{flag}", str(value)] if value is not None else []
    planned = plan_memory(parse_args(words))
    teacher = Teacher(make_pipeline(name), FAMILIES[name], name, options)
    measured = kept_by_forward(
        teacher, torch.randn(8, *teacher.family.latent_shape(teacher.pipeline, options.resolution))
    )
    assert planned.sizes["activations of 8 samples"] == pytest.approx(measured, rel=0.15)


def test_a_dry_run_checks_the_arguments_and_trains_nothing(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train_rdm_lora.main([*run_arguments(teacher_folder, prompts_file, tmp_path), "--dry_run"])
    assert "two optimisers" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.safetensors"))
