"""A LoRA student as one file for ComfyUI, and for U-Nets also for kohya's tools and the AUTOMATIC1111 web UI.

U-Nets' files have kohya's names, `lora_unet_<path with _>.lora_down.weight`, `.lora_up.weight` and `.alpha`. The path
is diffusers' for Stable Diffusion 1 and 2, and Stability's for SDXL, because kohya's tools and the web UI expect these.
Transformers' files have diffusers' names, with the alpha multiplied into the second matrix. diffusers itself loads all
three kinds. Lumina 2's have ComfyUI's names (`joint_matrices.py`), which diffusers does not load.

Stability's names are those of SDXL's original checkpoint. diffusers counts blocks, and layers inside them. Stability
counts in the order of execution: `input_blocks` are the first convolution, each layer on the way down, and each
downsampling; `output_blocks` are the layers on the way up. In each of these the residual block is 0 and the attention
1; an upsampling is 2 in the output block that it ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..families import FAMILIES, LORA_FILE, Family, fetch, pipeline_config
from ..pipelines import StudentConfig, stock_grid
from ..pipelines.student_config import REMEDY
from ..schedulers import RdmScheduler
from ..tiny import resolve_teacher
from ..untrusted import read_object
from .joint_matrices import DOWN, UP, as_joint

logger = logging.get_logger(__name__)

LEAST_SIGNAL = 4.8973451890853435e-08**0.5  # of ComfyUI's schedules of zero terminal SNR
DISCRETE = {"v_prediction": "v_prediction", "sample": "x0"}  # ComfyUI's names of predictions, if not epsilon
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
IN_RESIDUAL_BLOCKS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
DOWN_BLOCKS, UP_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D"}, {"UpBlock2D", "CrossAttnUpBlock2D"}
MIDDLE_BLOCKS = {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None}
MAX_BLOCKS = 10  # diffusers' own loader confuses `input_blocks_10` with a part of `input_blocks_1`


def has_comfyui(pipeline_class: str) -> bool:
    """Whether ComfyUI reads LoRAs for a stock pipeline, given by its name."""
    return FAMILIES[pipeline_class].comfyui_keys is not None


def check_comfyui(pipeline_class: str) -> None:
    """Raises ValueError, with the formats that exist, for a stock pipeline whose LoRAs ComfyUI does not read."""
    if not has_comfyui(pipeline_class):
        others = "lora or full" if FAMILIES[pipeline_class].has_lora else "full"
        raise ValueError(f"ComfyUI reads no LoRAs of students of {pipeline_class}; export them with --format {others}.")


def comfyui_name(folder: Path) -> str:
    """The file's name, after the student's folder, but never one that diffusers would load as its own."""
    name = folder.resolve().name or "student"
    return f"{name}-comfyui.safetensors" if f"{name}.safetensors".endswith(LORA_FILE) else f"{name}.safetensors"


def write_comfyui(
    folder: Path,
    target: Path,
    pipeline_class: str,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes the LoRA of a student's folder as one file.

    Args:
        folder: a LoRA student's.
        target: the file; its folder is made.
        pipeline_class: the stock pipeline's name.
        dtype: of the weights; unchanged by default. Alphas are float32.
        config: of the base model's network; if it is needed and not given, it is read from the base model.

    Raises:
        ValueError: if ComfyUI reads no LoRAs of this family, or if a file is missing or damaged.
    """
    check_comfyui(pipeline_class)
    family, student = FAMILIES[pipeline_class], StudentConfig.load(str(folder))
    weights, header = read_lora(folder)
    alpha = json.loads(header[LORA_ADAPTER_METADATA_KEY])[f"{family.denoiser_name}.lora_alpha"]
    if family.comfyui_keys in ("stability", "joint") and config is None:
        config = _network_config(student)
    tensors = as_comfyui(weights, alpha, family, config or {})
    rank = max(tensor.shape[0] for name, tensor in weights.items() if name.endswith(DOWN))
    has_alphas = any(name.endswith(".alpha") for name in tensors)
    metadata = _metadata(target.stem, family, student, weights)
    metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(alpha if has_alphas else rank))}
    if dtype is not None:  # alphas stay as they are, because bfloat16 cannot represent every one of them
        tensors = {name: each if name.endswith(".alpha") else each.to(dtype) for name, each in tensors.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: each.contiguous() for name, each in tensors.items()}, target, {"format": "pt", **metadata})


def read_lora(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA student's weights, by their names in diffusers, and the header of their file.

    Raises:
        ValueError: if the file is missing or damaged, or its header describes no adapter.
    """
    path = folder / LORA_FILE
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        json.loads(header[LORA_ADAPTER_METADATA_KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); {REMEDY}.") from error
    return weights, header


def _network_config(student: StudentConfig) -> dict[str, Any]:
    """The configuration of the base model's network."""
    base = student.base_configuration
    pipeline_config(base, revision=student.revision)  # reports in one sentence what is wrong with a base model
    path, folder = f"{FAMILIES[student.pipeline_class].denoiser_name}/config.json", Path(resolve_teacher(base))
    file = folder / path if folder.is_dir() else fetch("teacher", base, path, revision=student.revision)
    return read_object(file, "save or download the base model again", finite=False)


def as_comfyui(
    weights: Mapping[str, Tensor], alpha: float, family: Family, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A LoRA's weights under the names that ComfyUI reads.

    `unet.a.b.lora_A.weight` becomes `lora_unet_a_b.lora_down.weight`, for SDXL with Stability's path, and every module
    has an alpha. Transformers' names stay; their second matrices are multiplied by `alpha / rank`, because readers
    take a missing alpha to be the rank.

    Args:
        weights: `[rank, ...]` and `[..., rank]` by their names in diffusers, which begin with the component.
        alpha: the LoRA's, for all modules.
        family: the teacher's.
        config: of the teacher's network; used only for Stability's names and joint matrices.
    """
    if family.comfyui_keys == "joint":
        return as_joint(weights, alpha, config)
    if family.comfyui_keys == "diffusers":
        return {
            name: tensor * (alpha / weights[name.removesuffix(UP) + DOWN].shape[0]) if name.endswith(UP) else tensor
            for name, tensor in weights.items()
        }
    split = {name: name.removeprefix(f"{family.denoiser_name}.").rpartition(".lora_") for name in weights}
    paths = _paths({path for path, _, _ in split.values()}, family, config)
    tensors = {}
    for name, tensor in weights.items():
        path, _, matrix = split[name]
        module = f"lora_unet_{paths[path].replace('.', '_')}"
        tensors[f"{module}.{'lora_down' if matrix == 'A.weight' else 'lora_up'}.weight"] = tensor
        tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _paths(modules: Iterable[str], family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """The modules' paths in the file, by those in diffusers."""
    if family.comfyui_keys == "stability":
        try:
            return stability_names(modules, config)
        except ValueError as reason:
            logger.warning(
                f"The file for ComfyUI keeps diffusers' block names, which ComfyUI reads, but kohya's tools and the "
                f"AUTOMATIC1111 web UI do not, because this U-Net is not laid out as Stability's: {reason}."
            )
    return {path: path for path in modules}


def stability_names(paths: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Stability's path of each module: `input_blocks.4.1.proj_in` for `down_blocks.1.attentions.0.proj_in`.

    Args:
        paths: of the modules in diffusers' network.
        config: the network's configuration.

    Raises:
        ValueError: if a module has no such name, or none that diffusers reads; the message completes a sentence.
    """
    _check_layout(config)
    parts = {**OUTSIDE_BLOCKS, **_block_names(config["layers_per_block"], len(config["down_block_types"]))}
    names = {}
    for path in paths:
        part = next((part for part in parts if f"{path}.".startswith(f"{part}.")), None)
        if part is None:
            raise ValueError(f"its {path} has no such name")
        inside = path.removeprefix(part).removeprefix(".")
        names[path] = f"{parts[part]}.{IN_RESIDUAL_BLOCKS.get(inside, inside)}".removesuffix(".")
    return names


def _check_layout(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a layout other than SDXL's."""
    layers, down, up = (config.get(name) for name in ("layers_per_block", "down_block_types", "up_block_types"))
    if not (isinstance(down, list | tuple) and isinstance(up, list | tuple)):
        raise ValueError("its configuration names no blocks")
    if not isinstance(layers, int):
        raise ValueError(f"its layers_per_block are {layers}, not one number")
    kinds = [*sorted(set(down) - DOWN_BLOCKS), *sorted(set(up) - UP_BLOCKS)]
    if kinds or config.get("mid_block_type", "UNetMidBlock2DCrossAttn") not in MIDDLE_BLOCKS:
        raise ValueError(f"it has blocks of another kind, {', '.join(kinds) or config['mid_block_type']}")
    if "UpBlock2D" in up[:-1]:
        raise ValueError("it has an upsampling after a block without attention")
    if len(down) * (layers + 1) > MAX_BLOCKS:
        raise ValueError(f"it has {len(down)} blocks of {layers} layers, more than such names can distinguish")


def _block_names(layers: int, blocks: int) -> dict[str, str]:
    """Stability's paths of all residual blocks, attentions and samplings on the way down and up."""
    names = {}
    for block in range(blocks):
        first = block * (layers + 1)
        for kind, index in {"resnets": 0, "attentions": 1}.items():
            for layer in range(layers):
                names[f"down_blocks.{block}.{kind}.{layer}"] = f"input_blocks.{first + layer + 1}.{index}"
            for layer in range(layers + 1):
                names[f"up_blocks.{block}.{kind}.{layer}"] = f"output_blocks.{first + layer}.{index}"
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        names[f"up_blocks.{block}.upsamplers.0"] = f"output_blocks.{first + layers}.2"
    return names


def _metadata(title: str, family: Family, student: StudentConfig, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The file's metadata, in the terms of ModelSpec and of kohya's tools."""
    widths = [tensor.shape[1] for name, tensor in weights.items() if name.endswith(f"attn2.to_k{DOWN}")]
    prediction_type, guidance = student.scheduler["prediction_type"], student.call_arguments.get("guidance_scale")
    sigmas = ", ".join(f"{sigma:.6g}" for sigma in comfyui_sigmas(student))
    hints = (  # in ComfyUI's terms, where a CFG of 1 is off
        f"{student.num_inference_steps} steps, CFG 1, sampler {comfyui_sampler(student)}",
        f"ManualSigmas {sigmas}" if sigmas else "",
        (comfyui_node(student) or "").replace("*", ""),
        f"embedded guidance {guidance}" if guidance else "",
    )
    architecture = family.architecture(widths[0] if widths else None, prediction_type)
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": f"A few-step student of a {student.pipeline_class}, distilled with rdm_diffusers.",
        "modelspec.usage_hint": ", ".join(filter(None, hints)),
        "ss_output_name": title,
        "ss_network_module": "networks.lora",
    }
    if prediction_type in ("epsilon", "v_prediction"):
        metadata["modelspec.prediction_type"] = prediction_type.removesuffix("_prediction")
        metadata["ss_v2"] = str("-v2-" in architecture)
    if student.call_arguments.keys() >= {"width", "height"}:
        metadata["modelspec.resolution"] = "{width}x{height}".format_map(student.call_arguments)
    return metadata | ({"ss_base_model_version": family.kohya_base_version} if family.kohya_base_version else {})


def comfyui_node(student: StudentConfig) -> str | None:
    """The node that makes ComfyUI use the student's prediction type and times; None if it needs none."""
    sampling = DISCRETE.get(student.scheduler.get("prediction_type", ""))
    if sampling is None:
        return None if comfyui_sigmas(student) else FAMILIES[student.pipeline_class].comfyui_shift
    zsnr = "on" if student.scheduler.get("rescale_betas_zero_snr") else "off"
    return f"*ModelSamplingDiscrete* with {sampling} and zsnr {zsnr}"


def comfyui_sigmas(student: StudentConfig) -> list[float]:
    """The noise levels, 0 at the end, that ComfyUI must be told; empty where its scheduler `simple` has the same.

    They are flow's sigmas, or else `sqrt((1 - a^2) / a^2)`, the noise of a sample of unscaled signal.
    """
    scheduler = RdmScheduler.from_config(student.scheduler)
    if not stock_grid(scheduler, FAMILIES[student.pipeline_class]):
        return []
    alpha, sigma = scheduler.schedule.alpha(scheduler.timesteps), scheduler.sigmas[:-1]
    levels = sigma if scheduler.schedule.is_flow else sigma / alpha.clamp(min=LEAST_SIGNAL)
    return [*levels.tolist(), 0.0]


def comfyui_sampler(student: StudentConfig) -> str:
    """ComfyUI's sampler that steps as the student was trained to: with fresh noise, or without."""
    return "lcm" if student.scheduler["eta"] else "euler"
