"""`rdm-evaluate`, whose command line is in `evaluation.command`."""

from ..evaluation.command import run as run
