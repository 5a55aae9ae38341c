"""`python -m rdm_diffusers.evaluation`, the same as `rdm-evaluate`."""

from .command import run

if __name__ == "__main__":
    run()
