"""How the page looks. Its fonts are the system's, so that a browser asks no other host for one."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container { max-width: 980px !important; margin: 0 auto !important; padding: 28px 20px 48px !important; }
.gradio-container .html-container { padding: 0 !important; }
.rdm-title h1 { font-size: 2.1rem; font-weight: 700; letter-spacing: -0.02em; margin: 0; line-height: 1.2; }
.rdm-title p { color: var(--body-text-color-subdued); font-size: 1.02rem; margin: 6px 0 0; }
.rdm-title b { color: var(--body-text-color); font-weight: 600; }
.rdm-heading { font-size: 1.2rem; font-weight: 650; letter-spacing: -0.01em; margin: 20px 0 0; }
#random, #draw-strip { border: 1px solid var(--border-color-primary); font-weight: 500; }
.rdm-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 16px; padding: 14px; box-shadow: 0 1px 2px rgb(0 0 0 / 5%); }
.rdm-card:has(figure) { max-width: 480px; margin: 0 auto; }
.rdm-card header { display: flex; justify-content: space-between; align-items: baseline; padding: 0 4px 10px; }
.rdm-card header b { font-size: 1.02rem; font-weight: 650; }
.rdm-card header span, .rdm-card figcaption { color: var(--body-text-color-subdued); font-size: 0.92rem; }
.rdm-card figure { margin: 0; }
.rdm-card figcaption { text-align: center; padding: 12px 0 2px; font-variant-numeric: tabular-nums; }
.rdm-card figcaption b { color: var(--body-text-color); font-weight: 650; }
.rdm-card img, .rdm-strip img { display: block; width: 100%; border-radius: 10px; margin: 0; }
img.rdm-small { image-rendering: pixelated; }
.rdm-empty { aspect-ratio: 1; border-radius: 10px; display: grid; place-items: center; text-align: center;
  color: var(--body-text-color-subdued); background: var(--background-fill-secondary); }
.rdm-waiting { animation: rdm-pulse 1.2s ease-in-out infinite; }
@keyframes rdm-pulse { 50% { opacity: 0.45; } }
.rdm-strip { display: grid; gap: 10px; padding-top: 2px; }
.rdm-strip header { grid-column: 1 / -1; display: flex; justify-content: space-between; padding: 8px 4px 0;
  color: var(--body-text-color-subdued); font-size: 0.92rem; font-variant-numeric: tabular-nums; }
.rdm-strip header b { color: var(--body-text-color); font-weight: 650; }
.rdm-strip p { margin: 0; color: var(--body-text-color-subdued); font-size: 0.8rem; line-height: 1.3;
  text-align: center; overflow-wrap: anywhere; }
"""
FONTS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
PLAIN_LABELS = {
    "block_title_background_fill": "none", "block_title_background_fill_dark": "none", "block_title_padding": "0",
    "block_title_text_color": "*body_text_color", "block_title_text_color_dark": "*body_text_color",
    "block_title_text_weight": "500", "block_shadow": "none", "block_border_width": "1px", "block_radius": "12px",
    "input_border_color": "*border_color_primary", "input_shadow": "none",
    "button_primary_shadow": "none", "button_primary_shadow_hover": "none", "button_secondary_shadow": "none",
    "button_secondary_shadow_hover": "none",
}  # fmt: skip


def make_theme(gradio: Any) -> Any:
    """The theme, for `launch`."""
    fonts = {kind: [gradio.themes.Font(name) for name in names] for kind, names in FONTS.items()}
    return gradio.themes.Soft(primary_hue="indigo", neutral_hue="slate", radius_size="lg", **fonts).set(**PLAIN_LABELS)
