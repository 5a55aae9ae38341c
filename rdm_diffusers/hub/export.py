"""Writes a student in files that stock diffusers loads, and that our pipeline upgrades."""

from __future__ import annotations

from pathlib import Path

from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict

from ..families import Teacher
from ..networks import ADAPTERS, STUDENT, SharedBase
from ..pipelines import StudentConfig
from ..schedulers import RdmScheduler
from ..tiny import is_tiny


def export_lora(folder: Path, teacher: Teacher, networks: SharedBase, scheduler: RdmScheduler, **origin) -> None:
    """Writes `pytorch_lora_weights.safetensors`, `scheduler/` and `rdm_config.json`.

    Args:
        folder: an existing folder.
        teacher: the teacher that the LoRA belongs to.
        networks: the roles; the student's current weights are exported, in float32.
        scheduler: the student's sampler with its trained grid.
        origin: `revision` and `variant` of the teacher, if any.
    """
    denoiser, component = networks.denoiser, teacher.family.denoiser_name
    weights = get_peft_model_state_dict(denoiser, adapter_name=ADAPTERS[STUDENT])
    teacher.family.pipeline_class.save_lora_weights(
        folder,
        **{f"{component}_lora_layers": {name: tensor.detach().float().cpu() for name, tensor in weights.items()}},
        **_collate_lora_metadata({component: denoiser}),
    )
    steps = len(scheduler.timesteps)
    stock = teacher.family.stock_scheduler(teacher.pipeline.scheduler, steps, scheduler.config.eta)
    stock.save_pretrained(folder / "scheduler")
    is_folder = Path(teacher.name).is_dir() and not is_tiny(teacher.name)
    StudentConfig(
        base_model_name_or_path=str(Path(teacher.name).resolve()) if is_folder else teacher.name,
        pipeline_class=teacher.family.pipeline_class.__name__,
        scheduler={name: value for name, value in scheduler.config.items() if not name.startswith("_")},
        num_inference_steps=steps,
        vae=teacher.vae,
        call_arguments={**teacher.family.unguided(teacher.pipeline, teacher.options), **teacher.call_options},
        **origin,
    ).save(folder)
