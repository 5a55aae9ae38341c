"""Prompts from text files, and from the captions of datasets."""

from .caption_columns import DATA_FILES, read_captions
from .text_files import read_prompts

__all__ = ["DATA_FILES", "read_captions", "read_prompts"]
