"""Passwords and tokens in text: whether there are any, and the text without them."""

from __future__ import annotations

import re

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
ADDRESS = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s'\"`<>]+")
LOGIN = re.compile(r"(?<=://)[^/?#@]*(?:@[^/?#@]*)*@")  # `user:password@`; a password may hold an @ itself
SECRET = re.compile(
    r"(?<=[?&#;])(?:[\w.-]*[_.-])?"
    r"(?:token|passw(?:or)?d|pwd|secret|key|apikey|sig|signature|credential|auth|authorization|jwt)=[^&#;]*[&;]?",
    re.IGNORECASE,
)
INSTEAD = "leave it out, and log in with `hf auth login` or set HF_TOKEN"


def without_secrets(text: str) -> str:
    """A text whose addresses name no user, password or token, and in which no token of the Hub stands."""
    return TOKEN.sub("...", ADDRESS.sub(lambda address: SECRET.sub("", LOGIN.sub("", address[0])), text))


def has_secret(text: str) -> bool:
    """Whether `without_secrets` would take something out."""
    return without_secrets(text) != text
