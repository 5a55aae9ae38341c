"""Console scripts: what a user calls."""
