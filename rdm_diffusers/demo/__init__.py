"""The page of `rdm-demo`: a student beside its teacher."""

from .comparison import Comparison, Drawing, load_comparison
from .examples import example_prompts
from .page import import_gradio, make_page
from .serving import serving

__all__ = [
    "Comparison",
    "Drawing",
    "example_prompts",
    "import_gradio",
    "load_comparison",
    "make_page",
    "serving",
]
