"""Which teacher, from where, and at which sizes."""

from __future__ import annotations

from dataclasses import dataclass

from ..bounds import FOLDER_OR_ID, MODEL, REVISION, TOKENS, VARIANT, Text
from ..families import origin_of
from ..sizes import BUCKETS, RESOLUTION, read_buckets
from ..tiny import TINY_NAME
from .fields import flag

LORA = Text("a LoRA's file, folder or Hub id")


# fmt: off
@dataclass(frozen=True)
class TeacherConfig:
    """The teacher, and how its prompts are read."""

    pretrained_model_name_or_path: str = flag(
        TINY_NAME, "teacher: a folder, a Hub id, a single safetensors file (also as OWNER/REPOSITORY/FILE on the Hub), "
        "or `tiny`, `tiny-v` or `tiny-flow` for an embedded one", MODEL,
        "--pretrained_model", "--pretrained_teacher_model", is_path=True)
    pretrained_vae_model_name_or_path: str | None = flag(
        None, "another autoencoder than the teacher's: a folder or a Hub id", FOLDER_OR_ID, is_path=True)
    single_file_config: str | None = flag(
        None, "for a teacher that is a single file: the folder or Hub id of a pipeline with its configuration and with "
        "the networks that it lacks; by default what its keys say", FOLDER_OR_ID, is_path=True)
    revision: str | None = flag(None, "the teacher's Hub revision, or that of its --single_file_config", REVISION)
    variant: str | None = flag(None, "the teacher's weight variant, for example fp16", VARIANT)
    teacher_lora: tuple[str, ...] = flag(
        (), "PATH_OR_ID[:scale], repeatable: a LoRA that is added to the teacher's weights; a safetensors file, a "
        "folder, a Hub id, or a Hub id with /FILE.safetensors", LORA, is_path=True)
    max_sequence_length: int | None = flag(
        None, "tokens of a T5 text encoder; the stock pipeline's number by default", TOKENS)
    resolution: int | str | None = flag(
        None, "pixels per side, 1024 for example, or width x height, 1216x832; by default the first of "
        "--aspect_ratio_buckets, or else the teacher's own", RESOLUTION)
    aspect_ratio_buckets: str | None = flag(
        None, "sizes to train on, of which each rollout has one: HEIGHT,WIDTH pairs with semicolons between, as in "
        "diffusers' scripts, \"1024,1024;832,1216\", or WIDTHxHEIGHT, \"1024x1024;1216x832\"; what is drawn on the "
        "way and at the end has the size of --resolution", BUCKETS)

    @property
    def sizes(self) -> tuple[int | str | None, ...]:
        """The sizes that are trained on; None is the teacher's own."""
        return tuple(read_buckets(self.aspect_ratio_buckets)) if self.aspect_ratio_buckets else (self.resolution,)

    @property
    def configuration(self) -> str:
        """The folder or Hub id with the teacher's configuration. Raises ValueError as `SingleFile.of`."""
        return origin_of(self.pretrained_model_name_or_path, self.single_file_config)
# fmt: on
