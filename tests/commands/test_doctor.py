"""cae-fast doctor: versions, and every op with its backend and the reasons against the others."""

import sys

import pytest
import torch

from cae_fast.cli import main
from cae_fast.commands import doctor
from cae_kernels import dispatch
from cae_kernels.dispatch import BACKENDS


@pytest.fixture
def said(monkeypatch, capsys):
    """Lines that the command prints on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(dispatch, "_choices", {})

    def run():
        assert main(["doctor"]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def row(lines, op):
    (found,) = (line for line in lines if line.split("│")[1:2] and line.split("│")[1].strip() == op)
    return [cell.strip() for cell in found.strip("│").split("│")]


def test_versions_and_packages(said, monkeypatch):
    versions = {"torch": "1", "xformers": "0.0.99", "nvidia-dali-cuda120": "1.50.0"}

    def version(name):
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    lines = said()
    assert row(lines, "torch")[1] == torch.__version__
    assert row(lines, "python")[1].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert row(lines, "xformers")[1] == "0.0.99"
    assert row(lines, "dali")[1].startswith("1.50.0")
    assert row(lines, "timm")[1] == "not installed (evaluation)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_every_op_has_a_backend_and_reasons(said, monkeypatch):
    monkeypatch.delenv("CAE_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "HAVE_TRITON", True)
    monkeypatch.setattr(dispatch, "_missing_package", lambda op, package: f"{package} is not installed")
    lines = said()
    for op in BACKENDS:
        assert row(lines, op)[1] == "reference"
        assert row(lines, op)[2] == "triton: Triton kernels need a CUDA device, not cpu"
    text = "\n".join(lines)
    assert "xformers: xformers is not installed" in text
    assert "no CUDA device" in text


def test_a_choice_that_cannot_run_is_shown_and_not_fatal(said, monkeypatch):
    monkeypatch.setenv("CAE_KERNELS", "attention=xformers,layer_norm=reference")
    monkeypatch.setattr(dispatch, "_missing_package", lambda op, package: f"{package} is not installed")
    lines = said()
    assert row(lines, "attention")[1:] == [
        "nothing",
        "CAE_KERNELS wants attention=xformers, which cannot run: xformers is not installed",
    ]
    assert row(lines, "layer_norm")[1] == "reference"
    assert "CAE_KERNELS=attention=xformers,layer_norm=reference" in lines[-1]


def test_apex_of_pypi_is_called_by_its_name(said, monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError\n")
    (tmp_path / "apex-0.9.10.dev0.dist-info").mkdir()
    (tmp_path / "apex-0.9.10.dev0.dist-info" / "METADATA").write_text("Name: apex\nVersion: 0.9.10.dev0\n")
    monkeypatch.syspath_prepend(tmp_path)
    lines = said()
    assert "PyPI's unrelated project" in row(lines, "apex")[1]
    assert any("apex: the installed apex 0.9.10.dev0 is PyPI's" in line for line in lines)


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 575.57.08", "575.57.08"), ("echo no devices; exit 9", "nvidia-smi failed: no devices"), (None, "none:")],
)
def test_driver(script, expected, tmp_path, monkeypatch):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._driver().startswith(expected)
