"""What a card says of the method that distilled a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.discriminator import OF_RATIO
from ..config.pictures import OF_PICTURES

RDM = "2603.28460"


@dataclass(frozen=True)
class Paper:
    """A member of the family: its name, and the paper that it comes from."""

    name: str
    number: str
    title: str


IMPROVED = "Improved Distribution Matching Distillation for Fast Image Synthesis"
# fmt: off
PAPERS = {
    "gndm": Paper("GNDM", RDM, ""),
    "gndmr": Paper("GNDMR", RDM, ""),
    "dmd": Paper("DMD", "2405.14867", IMPROVED),
    "dmd2": Paper("DMD2", "2405.14867", IMPROVED),
    "f_distill": Paper("f-distill", "2502.15681", "One-step Diffusion Models with f-Divergence Distribution Matching"),
    "uni_instruct": Paper(
        "Uni-Instruct", "2505.20755",
        "Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction"),
    "sid": Paper("SiD", "2404.04057", "Score identity Distillation"),
    "sim": Paper("SIM", "2410.16794", "One-Step Diffusion Distillation through Score Implicit Matching"),
    "tdm": Paper("TDM", "2503.06674", "Learning Few-Step Diffusion Models by Trajectory Distribution Matching"),
    "snoopi": Paper(
        "SNOOPI", "2412.02687", "SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance"),
    "lcm": Paper("LCM", "2310.04378", "Latent Consistency Models"),
}
# fmt: on


def method_name(arguments: Mapping[str, Any]) -> str:
    """The method of a run by its arguments; R_dm where they name none that is known."""
    paper = PAPERS.get(str(arguments.get("algorithm")))
    return "R_dm" if paper is None else paper.name + (" with GNDM's correction" if _is_corrected(arguments) else "")


def paper_of(arguments: Mapping[str, Any]) -> Paper | None:
    """The paper of a run's method where it is another than R_dm's."""
    paper = PAPERS.get(str(arguments.get("algorithm")))
    return None if paper is None or paper.number == RDM else paper


def reads_images(arguments: Mapping[str, Any]) -> bool:
    """Whether the run's updates read images, the teacher's or others, and not prompts alone."""
    weight = arguments.get("gen_cls_loss_weight")
    return arguments.get("algorithm") in (*OF_PICTURES, *OF_RATIO) or bool(weight)


def _is_corrected(arguments: Mapping[str, Any]) -> bool:
    own = arguments.get("algorithm") in ("gndm", "gndmr")
    return not own and bool(arguments.get("gndm_lambda"))
