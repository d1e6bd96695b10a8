from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "cae_fast" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

extras = {
    "gpu": ["triton>=3.6", "xformers>=0.0.35", "liger-kernel>=0.8.5"],
    "distributed": ["deepspeed>=0.19.8"],
    "data": ["nvidia-dali-cuda130>=2.2"],
    "eval": ["timm>=1.0.26", "torchmetrics>=1.8"],
    "tokenizer": ["vector-quantize-pytorch>=1.22"],
    "wandb": ["wandb>=0.22"],
    "dev": [
        'triton>=3.6; platform_system == "Linux"',
        "pytest>=8.4",
        "pytest-benchmark>=5.1",
        "scipy>=1.14",
        "ruff>=0.14",
        "mypy>=1.18",
        "vector-quantize-pytorch>=1.22",
        "timm>=1.0.26",
        "torchmetrics>=1.8",
        "attrs>=23.1",
        "requests>=2.32",
    ],
}

setup(
    name="cae-fast",
    version=version,
    description="Fast pretraining of context autoencoders (CAE, arXiv 2202.03026)",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["cae_fast", "cae_fast.*"]), *find_packages("kernels")],
    package_dir={"cae_fast": "cae_fast", "cae_kernels": "kernels/cae_kernels"},
    package_data={"cae_fast.data": ["bundled/**/*"]},
    install_requires=[
        "torch>=2.11",
        "fsspec>=2024.6.1",
        "numpy>=2.0",
        "omegaconf>=2.3",
        "safetensors>=0.5",
        "pillow>=11.3",
        "simplejpeg>=1.8",
        "rich>=13.9",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["cae-fast = cae_fast.cli:main"]},
)
