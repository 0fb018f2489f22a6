# megatron_scalebio on NVIDIA's PyTorch image, whose torch, Transformer Engine, Apex, flash-attn and triton stay.
# Needs Docker 23 or newer, and neither a GPU nor a driver: docker build -t megatron_scalebio .
# Another release: --build-arg NGC_TAG=26.09-py3. Further packages: --build-arg EXTRA_PACKAGES="nltk".
# examples/ngc.sh runs a command of the repository in it.
ARG NGC_TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}
WORKDIR /opt/megatron_scalebio

# What the image has is listed, at its versions: pip may add packages, and change none of these. (The image's own
# /etc/pip/constraint.txt may list fewer.) Then comes what setup.py asks for but for torch, triton and numpy, which the
# image has, maybe under a name or a version that pip does not take for these. Transformers 4 writes other configs than 5
# and marks chat turns differently; Megatron-Core is the release whose internals this package adapts.
ARG EXTRA_PACKAGES=""
# hadolint ignore=DL3013,SC2086
RUN python3 -m pip list --disable-pip-version-check --format=freeze >image-packages.txt \
    && export PIP_CONSTRAINT="$PWD/image-packages.txt" \
    && python3 -m pip install --no-cache-dir \
        "transformers>=5,<6" \
        "safetensors>=0.4" \
        "omegaconf>=2.3" \
        "pyyaml>=6" \
        "rich>=13" \
        "jinja2>=3.1" \
        "sentencepiece>=0.2" \
        "psutil>=5.9" \
        ${EXTRA_PACKAGES} \
    && python3 -m pip install --no-cache-dir --no-deps "megatron-core==0.19.2"

# Readable for every user: the container may run as any. Editable, so that a repository mounted here takes its place.
COPY --chmod=755 setup.py pyproject.toml ./
COPY --chmod=755 megatron_scalebio megatron_scalebio
COPY --chmod=755 kernels kernels
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation --editable .
COPY --chmod=755 tools tools
COPY --chmod=755 examples examples

RUN python3 -W ignore - <<'EOF'
import importlib
import importlib.metadata
import sys
from pathlib import Path

before = [line.split("==") for line in Path("image-packages.txt").read_text().split()]
changed = [name for name, version in before if importlib.metadata.version(name) != version]
if changed:
    sys.exit(f"error: packages of the image were changed: {', '.join(changed)}")
importlib.import_module("torch")  # whose libraries the others need

# Without a driver some of these are there but cannot be imported; then Megatron-Core must not try, since it only
# expects that they are missing.
for name in ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda", "flash_attn", "nltk"):
    try:
        found = importlib.import_module(name)
        print(f"{name}: {getattr(found, '__version__', 'found')}")
    except ModuleNotFoundError as error:
        print(f"{name}: {'not found' if error.name == name else error}")
        sys.modules[name] = None
    except Exception as error:
        print(f"{name}: found; not imported on this machine: {error}")
        sys.modules[name] = None

for name in ("psutil", "sentencepiece", "transformers", "triton", "megatron.core", "megatron_scalebio.trainer"):
    importlib.import_module(name)
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core", "transformers", "numpy")))
EOF
