"""The licence of a base model, as its own card tells it; a student comes under the same."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError

from ..families import CARD, fetch
from ..tiny import is_tiny

LICENSE_TAGS = ("license", "license_name", "license_link")


def license_of(name_or_path: str, revision: str | None = None) -> dict[str, str]:
    """The licence tags of a base model.

    Args:
        name_or_path: an embedded teacher's name, a folder, or a Hub id.
        revision: of a Hub repository.

    Returns:
        Those of `LICENSE_TAGS` that its card has; none where there is no card that can be read.
    """
    if is_tiny(name_or_path):
        return {"license": "apache-2.0"}
    folder = Path(name_or_path)
    try:
        path = folder / CARD if folder.is_dir() else fetch("teacher", name_or_path, CARD, revision=revision)
        data = ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, OSError, YAMLError):
        return {}
    tags = {tag: data[tag] for tag in LICENSE_TAGS if isinstance(data.get(tag), str)}
    link = tags.get("license_link", "")
    if link and "://" not in link:  # a file beside the card
        del tags["license_link"]
        if not folder.is_dir():
            tags["license_link"] = f"https://huggingface.co/{name_or_path}/blob/main/{link}"
    return tags
