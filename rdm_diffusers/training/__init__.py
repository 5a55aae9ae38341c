"""Arguments, prompts, the loop, checkpoints and validation."""
