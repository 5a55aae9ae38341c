"""The licence of a base model, from its own card; a student comes under the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

from ..families import CARD, fetch
from ..tiny import is_tiny

MAX_CHARACTERS = 2**16  # of a card's beginning
MAX_BRACKETS = 500  # in its metadata; PyYAML's time grows with the square of their number
LICENSE_TAGS = ("license", "license_name", "license_link")


def license_of(name_or_path: str, revision: str | None = None) -> dict[str, str]:
    """Those of `LICENSE_TAGS` that a base model's card has; none if there is no readable card.

    Args:
        name_or_path: an embedded teacher's name, a folder, or a Hub id.
        revision: of a Hub repository.
    """
    if is_tiny(name_or_path):
        return {"license": "apache-2.0"}
    folder = Path(name_or_path)
    try:
        path = folder / CARD if folder.is_dir() else fetch("teacher", name_or_path, CARD, revision=revision)
        data = _metadata(path)
    except (ValueError, OSError, YAMLError, RecursionError):
        return {}
    tags = {tag: data[tag] for tag in LICENSE_TAGS if isinstance(data.get(tag), str)}
    link = tags.get("license_link", "")
    if "://" in link and not link.startswith(("https://", "http://")):
        del tags["license_link"]
    elif link and "://" not in link:  # a file beside the card
        del tags["license_link"]
        if not folder.is_dir():
            tags["license_link"] = f"https://huggingface.co/{name_or_path}/blob/main/{link}"
    return tags


def _metadata(card: Path) -> dict[str, Any]:
    """The metadata at the top of a card.

    It is parsed here and not by `ModelCard`, which would hang on a card that is deep, or that refers to parts of itself
    and so multiplies a few lines until no memory holds them; those raise an error, as unreadable cards do.
    """
    with open(card, encoding="utf-8") as file:
        lines = file.read(MAX_CHARACTERS).splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        raise ValueError("it has no metadata")
    head = "\n".join(lines[1 : lines.index("---", 1)])
    if head.count("[") + head.count("{") > MAX_BRACKETS:
        raise ValueError("its metadata are nested deep")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(head)):
        raise ValueError("its metadata refer to themselves")
    data = yaml.safe_load(head)
    return data if isinstance(data, dict) else {}
