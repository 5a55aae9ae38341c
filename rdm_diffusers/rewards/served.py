"""Rewards that another process serves over HTTP: in an environment of its own, on another card or another machine.

A batch is one POST of JSON, `{"images": [...], "prompts": [...]}`, with the images as PNG files in base64. The answer
is `{"scores": [...]}`, a number for each image, or null where there is none.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests
import torch
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.util.retry import Retry

from .user_file import NamedReward

CONNECT, SCORE = 10, 600  # seconds to connect, and for the scores of one batch
RETRIES = Retry(total=4, backoff_factor=0.5, status_forcelist=(429, 502, 503, 504), allowed_methods=None)
PROTOCOL = "the protocol is in docs/rewards.md"


def is_address(spec: str) -> bool:
    """Whether a specification names a server."""
    return spec.startswith(("http://", "https://"))


def split_address(spec: str) -> tuple[str, str | None]:
    """The address and the weight behind its path, if there is one: `http://host:8000/score:0.5`.

    Raises:
        ValueError: if it is no address, or has a user, a query or a fragment, in which secrets tend to be.
    """
    try:
        parts = urlsplit(spec)
        well_formed = bool(parts.hostname) and parts.port != 0
    except ValueError:
        well_formed = False
    if not well_formed:
        raise ValueError("The address in --reward cannot be read; write http://host:port/path, and behind it :weight.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "The address in --reward may have no user, no query and no fragment, because it is written into the run's "
            f"files; write {parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}."
        )
    path, colon, weight = parts.path.rpartition(":")
    return (parts._replace(path=path).geturl(), weight) if colon else (spec, None)


def load_served(address: str) -> NamedReward:
    """The reward at an address, a black box, after it has scored one grey picture. Its name is made of the address.

    Raises:
        ValueError: if the server does not answer, or not with a number.
    """
    function = ServedScores(address)
    try:
        function(torch.full((1, 3, 64, 64), 0.5), ["a grey picture"])
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; start it, or mend it or the address.") from error
    return NamedReward(function, re.sub(r"\W+", "_", address.partition("://")[2]).strip("_"), False)


@dataclass
class ServedScores:
    """Asks a server for scores. One that is busy, restarts or breaks the connection is asked again, four times.

    It is asked directly: proxies and passwords of the environment (`HTTP_PROXY`, `.netrc`) are not used.

    Args:
        address: where batches are sent.
    """

    address: str
    session: requests.Session = field(default_factory=requests.Session, repr=False)

    def __post_init__(self) -> None:
        self.session.trust_env = False
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=RETRIES))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Images `[B, 3, H, W]` in [0, 1], which are rounded to 8 bits, and B prompts -> B scores; NaN for null.

        Raises:
            ValueError, OSError: if there is no answer, or if it does not have B scores.
        """
        question = {"images": [as_png(image) for image in images], "prompts": list(prompts)}
        try:
            response = self.session.post(self.address, json=question, timeout=(CONNECT, SCORE), allow_redirects=False)
        except requests.RequestException as error:
            raise ConnectionError(f"The reward server {self.address} does not answer ({_cause(error)})") from error
        if response.status_code != 200:
            raise ValueError(f"The reward server {self.address} answers {response.status_code} {response.reason}")
        return self._scores(response, len(images))

    def _scores(self, response: requests.Response, count: int) -> list[float]:
        try:
            scores: Any = response.json()["scores"]
            return [float(_number(score)) for score, _ in zip(scores, range(count), strict=True)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'The reward server {self.address} does not answer {count} images with {{"scores": [...]}}, a number '
                f"or null for each ({PROTOCOL})"
            ) from error


def as_png(image: Tensor) -> str:
    """An image `[3, H, W]` in [0, 1] as a PNG file, in base64."""
    levels, file = (image.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8), io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def _number(score: Any) -> float:
    """NaN for null; TypeError for what is no number."""
    if score is None:
        return math.nan
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise TypeError
    return score


def _cause(error: BaseException) -> str:
    """The first reason of a failed connection, without the layers around it."""
    while error.__context__ is not None or error.__cause__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error) or type(error).__name__
