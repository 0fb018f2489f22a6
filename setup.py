"""The package; lower bounds only, so that a container's own torch and Megatron-Core stay."""

from setuptools import find_packages, setup

setup(
    name="megatron_scalebio",
    version="0.1.0",
    description="Learn how much each fine-tuning source should count, and train the model, at once.",
    python_requires=">=3.12",
    packages=[
        *find_packages(include=["megatron_scalebio", "megatron_scalebio.*"], exclude=["megatron_scalebio.kernels"]),
        "megatron_scalebio.kernels",
    ],
    # The kernels stand beside the package in the repository and inside it when imported. The link in it is
    # for the type checker and editors.
    package_dir={"megatron_scalebio": "megatron_scalebio", "megatron_scalebio.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.19",
        "numpy>=1.26",
        "transformers>=5",
        "safetensors>=0.4",
        "omegaconf>=2.3",
        "pyyaml>=6",
        "rich>=13",
        "jinja2>=3.1",
        "sentencepiece>=0.2",
        "psutil>=5.9",  # megatron-core saves checkpoints with it and does not declare it
        "triton>=3.4; sys_platform == 'linux'",  # which torch brings along there, for CUDA and CPU alike
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.9"],
        "test": ["pyrefly>=1.4", "pytest>=8", "ruff>=0.9"],
        # Others' kernels, for tools/benchmark_kernels.py to compare with.
        "benchmark": ["liger-kernel>=0.8", "cut-cross-entropy>=25.1", "quack-kernels>=0.6"],
    },
)
