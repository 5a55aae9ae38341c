# An image that trains and evaluates on NVIDIA GPUs; the wheels of torch bring CUDA with them (docs/clusters.md).
#   docker build -t rdm-diffusers .
#   docker run --gpus all --ipc host -v "$PWD/work:/work" rdm-diffusers accelerate launch -m train_rdm_lora --help
FROM python:3.11-slim

# torch.compile and Triton call a compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY setup.py pyproject.toml constraints.txt MANIFEST.in README.md LICENSE ./
COPY train_rdm_lora.py train_rdm_full.py ./
COPY rdm_diffusers ./rdm_diffusers
RUN pip install --no-cache-dir -c constraints.txt '.[8bit,quantization]'

RUN useradd --create-home --uid 1000 rdm && mkdir /work && chown rdm /work
USER rdm
WORKDIR /work
ENV HF_HOME=/work/huggingface
CMD ["accelerate", "launch", "-m", "train_rdm_lora", "--help"]
