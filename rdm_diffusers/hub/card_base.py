"""What a card says of the base model: its name, its place on the Hub, and the code that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..families import FAMILIES, Lora, SingleFile, is_single_file
from ..families.weights import networks_of
from ..pipelines import StudentConfig
from ..tiny import is_tiny
from .card_text import Markdown, code, escaped, quoted
from .student_files import is_hub_id

DTYPE = "dtype=torch.float32"  # otherwise text encoders load as they were stored, perhaps in half precision
SHOWN_DIGITS = 16  # of a digest


def base_id(student: StudentConfig) -> str | None:
    """The Hub id that stands for a student's base model; None if nothing of it is on the Hub.

    That of a single file is the repository that has it, and for a local file the one that has its configuration.
    """
    teacher = student.teacher or ""
    config = student.file.config if student.file else student.arguments.get("single_file_config")
    if is_single_file(teacher.removesuffix(" (a local file)")):
        parts = teacher.split("/")
        on_hub = len(parts) > 2 and not Path(teacher).exists() and is_hub_id("/".join(parts[:2]))
        teacher = "/".join(parts[:2]) if on_hub else config or ""
    return teacher if teacher and not is_tiny(teacher) and is_hub_id(teacher) else None


def base_name(student: StudentConfig) -> str:
    """The name that a card calls the base model by, without folders of this machine."""
    teacher = student.teacher or "an unknown teacher"
    return teacher if base_id(student) == teacher else Path(teacher).name


def base_link(student: StudentConfig) -> Markdown:
    """The same name as a link, or as code; of a single file also where its configuration is from."""
    teacher, found = student.teacher or "", base_id(student)
    name = base_name(student)
    if found is None:
        return Markdown(f"{'the embedded teacher ' if is_tiny(teacher) else ''}{code(name)}")
    link = f"[{escaped(found)}](https://huggingface.co/{found})"
    if found == teacher:
        return Markdown(link)
    digest = f", SHA-256 {code(student.base_file['sha256'][:SHOWN_DIGITS] + '...')}" if student.base_file else ""
    is_in = Path(teacher).name != teacher and "/".join(teacher.split("/")[:2]) == found
    return Markdown(f"{code(name)} ({'in' if is_in else 'a single file with the configuration of'} {link}{digest})")


def base_code(student: StudentConfig, index: Mapping[str, Any], absent: Sequence[str], vae_class: str | None) -> str:
    """The code with which stock diffusers loads a LoRA's base model, from the class's method on.

    Args:
        student: its configuration.
        index: the `pipeline_config` of its base model, or of a single file's configuration.
        absent: arguments for components that it was saved without.
        vae_class: of an autoencoder that is not the base model's.
    """
    options = {"revision": student.revision, "variant": student.variant}
    given = [f"{name}={quoted(value)}" for name, value in options.items() if value]
    vae = [f"vae={vae_class}.from_pretrained({quoted(student.vae)})"] if vae_class else []
    if student.file is None:
        base = quoted(student.teacher)
        source = f"TINY_TEACHERS[{base}]" if is_tiny(student.teacher or "") else base
        return f"from_pretrained({', '.join([source, *given, *vae, *absent, DTYPE])})"
    config = quoted(student.file.config)
    if is_whole(student, index):
        return f"from_single_file({', '.join([_link(student.file), f'config={config}', *vae, *absent, DTYPE])})"
    name = FAMILIES[student.pipeline_class].denoiser_name
    network = f'{index[name][1]}.from_single_file({_link(student.file)}, config={config}, subfolder="{name}", {DTYPE})'
    return f"from_pretrained({', '.join([config, *given, f'{name}={network}', *vae, *absent, DTYPE])})"


def is_whole(student: StudentConfig, index: Mapping[str, Any]) -> bool:
    """Whether a student's base is a single file with all networks of its pipeline, which the pipeline's class loads."""
    optional = {"safety_checker", "image_encoder"}
    needed = networks_of(index).keys() - optional - ({"vae"} if student.vae else set())
    can_load = hasattr(FAMILIES[student.pipeline_class].pipeline_class, "from_single_file")
    return student.base_file is not None and can_load and needed <= set(student.base_file["parts"])


def imported(student: StudentConfig, index: Mapping[str, Any]) -> list[str]:
    """The classes that `base_code` needs beside the pipeline's."""
    if student.file is None or is_whole(student, index):
        return []
    return [index[FAMILIES[student.pipeline_class].denoiser_name][1]]


def _link(file: SingleFile) -> str:
    """A single file as diffusers takes it: a path, or an address on the Hub."""
    if file.repository is None:
        return quoted(file.name)
    inside = file.name.removeprefix(f"{file.repository}/")
    return quoted(f"https://huggingface.co/{file.repository}/blob/main/{inside}")


def lora_arguments(lora: Lora) -> Markdown:
    """The arguments with which stock diffusers loads a LoRA of the base model, as code."""
    place, file = lora.place
    return Markdown(f"{quoted(place)}, weight_name={quoted(file)}")


def adapter_arguments(loras: Sequence[Lora]) -> str:
    """The arguments of `set_adapters` for a base model's LoRAs and the student's."""
    names = [f"base_{i}" for i in range(len(loras))]
    return f"{[*names, 'student']}, {[*(lora.scale for lora in loras), 1.0]}"


def lora_sentence(student: StudentConfig) -> Markdown:
    """What the card says of the LoRAs that the teacher had; nothing if it had none."""
    if student.loras:
        named = (lora.name if is_hub_id(lora.place[0]) else Path(lora.name).name for lora in student.loras)
        shown = " and ".join(f"{code(name)} at {lora.scale:g}" for name, lora in zip(named, student.loras, strict=True))
        return Markdown(f" It needs its base model with the LoRA {shown}: load both, as below.")
    own = " and ".join(map(code, student.arguments.get("teacher_lora") or []))
    return Markdown(f" Its teacher had the LoRA {own}; this student includes that." if own else "")
