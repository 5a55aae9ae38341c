"""The parts of the page that show pictures, as HTML. Pictures travel inside it, so that none is written to the disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from .comparison import SMALL, Drawing

THUMBNAIL = 320  # pixels a side, of larger pictures in a strip
WIDEST = 170  # pixels of a strip's columns


def title(student: str, steps: int, teacher: str | None) -> str:
    """The head of the page; teacher None if it is not shown."""
    beside = f", beside its teacher <b>{escape(teacher)}</b> from the same seed" if teacher else ""
    words = f"A <b>{steps}-step</b> student{beside}."
    return f'<div class="rdm-title"><h1>{escape(student)}</h1><p>{words}</p></div>'


def heading(text: str) -> str:
    """The heading of a section."""
    return f'<h2 class="rdm-heading">{escape(text)}</h2>'


def cost(drawing: Drawing) -> str:
    """`4 network calls · 0.02 s`, for one picture."""
    return f"{drawing.calls} network call{'s' if drawing.calls > 1 else ''} · {drawing.seconds:.2f} s"


def card(name: str, note: str, prompt: str, drawing: Drawing) -> str:
    """One picture with what it cost."""
    (picture,) = drawing.pictures
    return _card(name, note, f"{_image(picture, prompt)}<figcaption><b>{cost(drawing)}</b></figcaption>")


def empty_card(name: str, note: str, says: str) -> str:
    """The place of a picture that is not there yet; an ellipsis at the end of what it says makes it pulse."""
    kind = "rdm-empty rdm-waiting" if says.endswith("…") else "rdm-empty"
    return _card(name, note, f'<div class="{kind}">{escape(says)}</div><figcaption>&nbsp;</figcaption>')


def _card(name: str, note: str, content: str) -> str:
    head = f"<header><b>{escape(name)}</b><span>{escape(note)}</span></header>"
    return f'<div class="rdm-card">{head}<figure>{content}</figure></div>'


def strip(prompts: Sequence[str], rows: Sequence[tuple[str, Drawing]]) -> str:
    """A column of pictures for each prompt, and a row for each name."""
    parts = []
    for name, drawing in rows:
        parts.append(f"<header><b>{escape(name)}</b><span>{cost(drawing)} each</span></header>")
        parts += [_image(_thumbnail(each), prompt) for each, prompt in zip(drawing.pictures, prompts, strict=True)]
    parts += [f"<p>{escape(prompt)}</p>" for prompt in prompts]
    columns = f"grid-template-columns: repeat({len(prompts)}, minmax(0, {WIDEST}px))"
    return f'<div class="rdm-card"><div class="rdm-strip" style="{columns}">{"".join(parts)}</div></div>'


def _thumbnail(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))  # which enlarges nothing
    return small


def _image(picture: Image.Image, prompt: str) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    kind = ' class="rdm-small"' if max(picture.size) <= SMALL else ""
    return f'<img{kind} src="data:image/png;base64,{data}" alt="{escape(prompt)}">'
