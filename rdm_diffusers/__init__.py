"""Few-step students of diffusers' text-to-image models, distilled by matching distributions as a reward (R_dm).

Names are imported when they are first used, so that `import rdm_diffusers` costs next to nothing.
"""

import sys
from importlib import import_module

__version__ = "0.2.0.dev0"

_HOMES = {
    "Callback": ".training.trainer",
    "RdmDistillationPipeline": ".pipelines",
    "RdmStableDiffusion3Pipeline": ".pipelines",
    "RdmStableDiffusionPipeline": ".pipelines",
    "RdmScheduler": ".schedulers",
    "RunConfig": ".config",
    "SeparateNetworks": ".networks",
    "SharedBase": ".networks",
    "Trainer": ".training.trainer",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv):
    import_module(".quiet", __name__)  # Python is looking for a program of this package (`python -m`)
