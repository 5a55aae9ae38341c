"""The student's README.md, a model card."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..families import absent_components, pipeline_config
from ..pipelines import StudentConfig
from ..tiny import is_tiny

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
{stock}
pipeline({prompt!r}, num_inference_steps={steps}, {arguments}).images[0]
```
{seeding}
{table}
"""

STOCK_LORA = """from diffusers import {scheduler_class}, {pipeline_class}
{base_import}
pipeline = {pipeline_class}.from_pretrained({base_arguments})
pipeline.load_lora_weights({student!r})
pipeline.scheduler = {scheduler_class}.from_pretrained({student!r}, subfolder="scheduler")"""

STOCK_FULL = """from diffusers import {pipeline_class}

pipeline = {pipeline_class}.from_pretrained({full_arguments})"""

SEEDING = """
`{scheduler_class}` gets no `generator` from the stock pipeline: for pictures that can be drawn again, call
`torch.manual_seed` before it. `RdmDistillationPipeline` needs its `generator` only.
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
    name, student = args.pretrained_model_name_or_path, StudentConfig.load(str(folder))
    absent = [f"{each}=None" for each in absent_components(pipeline_config(name, revision=args.revision))]
    tiny, is_lora = is_tiny(name), student.base_model_name_or_path is not None
    base = f"the embedded teacher `{name}`" if tiny else name
    on_hub = not tiny and not Path(base).exists()
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", *(["lora"] if is_lora else []), "text-to-image", "distillation", "few-step", "rdm"],
    )
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler_class = scheduler["_class_name"]
    stock = (STOCK_LORA if is_lora else STOCK_FULL).format(
        student=str(folder),
        pipeline_class=pipeline_class,
        scheduler_class=scheduler_class,
        base_import="from rdm_diffusers.tiny import TINY_TEACHERS\n" if tiny else "",
        base_arguments=", ".join([f"TINY_TEACHERS[{name!r}]" if tiny else repr(base), *absent]),
        full_arguments=", ".join([repr(str(folder)), *absent]),
    )
    text = TEMPLATE.format(
        data=data.to_yaml(),
        base=base,
        steps=args.num_student_steps,
        algorithm=args.algorithm,
        student=str(folder),
        prompt=prompt,
        stock=stock,
        seeding=SEEDING.format(scheduler_class=scheduler_class) if scheduler.get("stochastic_sampling") else "",
        arguments=", ".join(f"{key}={value}" for key, value in student.call_arguments.items()),
        table=f"```\n{table}\n```" if table else "",
    )
    ModelCard(text).save(folder / "README.md")
