"""The embedded tiny teachers: real pipelines that draw coloured handwritten digits.

`tiny` is a Stable Diffusion pipeline that predicts noise, `tiny-v` its fine-tune that predicts v, and `tiny-flow` a
Stable Diffusion 3 pipeline of flow matching.
"""

from pathlib import Path

TINY_NAME = "tiny"
TINY_V_NAME = "tiny-v"
TINY_FLOW_NAME = "tiny-flow"
TINY_SCENES_NAME = "tiny-scenes"
TINY_TEACHERS: dict[str, str] = {
    TINY_NAME: str(Path(__file__).parent / "teacher"),
    TINY_V_NAME: str(Path(__file__).parent / "teacher_v"),
    TINY_FLOW_NAME: str(Path(__file__).parent / "teacher_flow"),
}
TINY_TEACHER = TINY_TEACHERS[TINY_NAME]
# Of the training, where it is not the stock pipeline's default.
MAX_SEQUENCE_LENGTHS = {TINY_FLOW_NAME: 1, TINY_SCENES_NAME: 1}


def is_tiny(name_or_path: str) -> bool:
    """Whether this is the name of an embedded teacher."""
    return name_or_path in TINY_TEACHERS


def resolve_teacher(name_or_path: str) -> str:
    """The folder of an embedded teacher by its name; any other name or path unchanged."""
    return TINY_TEACHERS.get(name_or_path, name_or_path)
