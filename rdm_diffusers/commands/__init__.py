"""Console scripts: what a user calls."""

from .. import quiet as quiet  # before the packages that it quietens
