"""The student's README.md, a model card."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..tiny import TINY_NAME

TEMPLATE = """---
{data}
---

# A {steps}-step student of {base}

![the teacher, the teacher at {steps} steps, and this student](samples.png)

Distilled with `rdm_diffusers` ({algorithm}; our reading of R_dm, arXiv 2603.28460). Sampling takes {steps} network
calls, without guidance.

```python
from rdm_diffusers import RdmDistillationPipeline

pipeline = RdmDistillationPipeline.from_pretrained({student!r})
pipeline({prompt!r}).images[0]
```

With stock diffusers:

```python
from diffusers import {scheduler_class}, {pipeline_class}
{base_import}
pipeline = {pipeline_class}.from_pretrained({base_argument})
pipeline.load_lora_weights({student!r})
pipeline.scheduler = {scheduler_class}.from_pretrained({student!r}, subfolder="scheduler")
pipeline({prompt!r}, num_inference_steps={steps}, guidance_scale=0.0).images[0]
```

{table}
"""


def write_card(folder: Path, pipeline_class: str, table: str, prompt: str, args) -> None:
    """Writes `README.md` into the student's folder.

    Args:
        folder: the student's folder.
        pipeline_class: the stock pipeline's name.
        table: the metrics, as plain text.
        prompt: an example.
        args: the run's arguments.
    """
    tiny = args.pretrained_model_name_or_path == TINY_NAME
    base = "the tiny teacher" if tiny else args.pretrained_model_name_or_path
    on_hub = not tiny and not Path(base).exists()
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "lora", "text-to-image", "distillation", "few-step", "rdm"],
    )
    text = TEMPLATE.format(
        data=data.to_yaml(),
        base=base,
        steps=args.num_student_steps,
        algorithm=args.algorithm,
        student=str(folder),
        prompt=prompt,
        pipeline_class=pipeline_class,
        scheduler_class=json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"],
        base_import="from rdm_diffusers.tiny import TINY_TEACHER\n" if tiny else "",
        base_argument="TINY_TEACHER" if tiny else repr(base),
        table=f"```\n{table}\n```" if table else "",
    )
    ModelCard(text).save(folder / "README.md")
