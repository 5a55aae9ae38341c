"""The console scripts that put other rooms together."""
