"""Serves the page for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .page import import_gradio
from .style import CSS, make_theme


@contextmanager
def serving(page: Any, name: str = "127.0.0.1", port: int | None = None, share: bool = False) -> Iterator[list[str]]:
    """Serves a page of `make_page`; inside, it is at these addresses: on this machine, and with `share` for everybody.

    The page asks no other host for anything: its fonts are the system's.

    Args:
        page: the page.
        name: the address of this machine that it listens on; 0.0.0.0 is all of them.
        port: by default GRADIO_SERVER_PORT, or the first free one from 7860 on.
        share: whether Gradio's servers hand it on to the internet.

    Raises:
        OSError: if the port is taken.
    """
    look = {"theme": make_theme(import_gradio()), "css": CSS, "footer_links": []}
    without: dict[str, Any] = {"ssr_mode": False, "pwa": False, "max_file_size": 1}
    try:
        addresses = page.launch(
            share=share, server_name=name, server_port=port, quiet=True, prevent_thread_lock=True, **look, **without
        )[1:]
        yield [address for address in addresses if address]
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise OSError(f"Port {port or 7860} of {name} is taken; choose another with --server_port.") from error
    finally:
        page.close(verbose=False)
