"""A quiet start: what other packages say of themselves, and concerns no user of a program of ours, is left out.

A program imports this module before those packages. What they say of a user's model or prompts is still shown, and so
are their errors; with the environment variable `RDM_VERBOSE` all is.
"""

from __future__ import annotations

import logging
import os

from .program import VERBOSE

CHATTY = ("bitsandbytes", "torchao", "torch.utils._pytree")  # whose warnings are about optional parts of their own
HARMLESS = (
    "requires torchvision (not installed)",  # pictures are read without it
    "Unable to import `torchao` Tensor objects",  # an older torch than torchao was built for
    "No LoRA keys associated to",  # our students have none for text encoders
)


def is_heard(record: logging.LogRecord) -> bool:
    """Whether a line of diffusers or transformers concerns a user."""
    return not any(part in record.getMessage() for part in HARMLESS)


def quieten() -> None:
    """Leaves those lines out in this process, and the bars that show how single files are read."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        for handler in library.get_logger().handlers:
            handler.addFilter(is_heard)
        library.disable_progress_bar()


if not os.environ.get(VERBOSE):
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    quieten()
