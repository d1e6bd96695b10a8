"""The rule of dispatch: what runs where, what can be forced, and what is said when it cannot run."""

import sys
import warnings

import pytest
import torch

from cae_kernels import dispatch
from cae_kernels.dispatch import BACKENDS, backend, why_not

CPU = torch.ones(1)
META = torch.ones(1, device="meta")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("CAE_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_choices", {})


def force(monkeypatch, setting):
    monkeypatch.setenv("CAE_KERNELS", setting)


def package(folder, monkeypatch, *files):
    """A package tree on sys.path that fails when it is imported."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("raise ImportError('this package must not be imported')\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("op", BACKENDS)
def test_the_reference_runs_where_triton_cannot(op):
    assert backend(op, CPU) == backend(op, META) == "reference"


@pytest.mark.parametrize("op", BACKENDS)
def test_triton_runs_on_cuda_and_in_the_interpreter(op, monkeypatch):
    monkeypatch.setattr(dispatch, "HAVE_TRITON", True)
    assert dispatch._chosen(op, "cuda", "") == "triton"
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert backend(op, CPU) == "triton"


def test_without_triton_the_reference_runs_on_cuda(monkeypatch):
    monkeypatch.setattr(dispatch, "HAVE_TRITON", False)
    assert dispatch._chosen("attention", "cuda", "") == "reference"
    assert why_not("attention", "triton", "cuda") == "triton is not installed"
    with pytest.raises(ValueError, match="attention=triton, which cannot run: triton is not installed"):
        dispatch._chosen("attention", "cuda", "attention=triton")


def test_a_choice_is_forced_for_one_op(monkeypatch):
    monkeypatch.setattr(dispatch, "HAVE_TRITON", True)
    setting = " attention=reference ,linear_gelu=triton,"
    assert dispatch._chosen("attention", "cuda", setting) == "reference"
    assert dispatch._chosen("linear_gelu", "cuda", setting) == "triton"
    assert dispatch._chosen("residual_norm", "cuda", setting) == "triton"


def test_all_forces_every_op_that_has_the_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "HAVE_TRITON", True)
    monkeypatch.setattr(dispatch, "_missing_package", lambda op, package: None)
    setting = "all=liger,linear_cross_entropy=reference"
    assert dispatch._chosen("layer_norm", "cuda", setting) == "liger"
    assert dispatch._chosen("linear_cross_entropy", "cuda", setting) == "reference"
    assert dispatch._chosen("attention", "cuda", setting) == "triton"


def test_changing_the_setting_changes_the_choice(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(dispatch, "HAVE_TRITON", True)
    assert backend("attention", CPU) == "triton"
    force(monkeypatch, "attention=reference")
    assert backend("attention", CPU) == "reference"


def test_forced_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "HAVE_TRITON", True)
    force(monkeypatch, "all=triton")
    with pytest.raises(ValueError, match=r"attention=triton, which cannot run: .* need a CUDA device, not cpu"):
        backend("attention", CPU)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("attension=triton", r"'attension=triton'.*ops are all, adamw, attention"),
        ("attention=liger", r"'attention=liger'.*backends of attention are triton, reference, sdpa_flash"),
        ("attention", r"'attention'.*backends of attention are"),
        ("all=fast", r"'all=fast'.*backends of all are triton, reference, apex"),
        ("triton", r"'triton'.*write op=backend"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(setting, text, monkeypatch):
    force(monkeypatch, setting)
    with pytest.raises(ValueError, match=text):
        backend("gather_tokens", CPU)


@pytest.mark.parametrize(("op", "name", "package_name"), [("attention", "xformers", "xformers")])
def test_missing_packages_are_named(op, name, package_name, monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert why_not(op, name, "cuda") == f"{package_name} is not installed"


@pytest.mark.parametrize(
    ("op", "name", "folder"),
    [("attention", "xformers", "xformers"), ("linear_cross_entropy", "liger", "liger_kernel")],
)
def test_installed_packages_run_on_cuda_only(op, name, folder, tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, f"{folder}/__init__.py")
    assert why_not(op, name, "cuda") is None
    assert why_not(op, name, "cpu") == "it needs a CUDA device, not cpu"


def test_apex_of_pypi_is_recognized_without_importing_it(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, "apex/__init__.py", "apex/models.py")
    (tmp_path / "apex-0.9.10.dev0.dist-info").mkdir()
    (tmp_path / "apex-0.9.10.dev0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n"
    )
    reason = why_not("adamw", "apex", "cuda")
    assert reason == (
        "the installed apex 0.9.10.dev0 is PyPI's unrelated project; NVIDIA's apex is built from its source"
    )
    assert "apex" not in sys.modules
    force(monkeypatch, "layer_norm=apex")
    with pytest.raises(ValueError, match="layer_norm=apex, which cannot run: .* PyPI's unrelated project"):
        backend("layer_norm", CPU)


@pytest.mark.parametrize(("op", "extension"), [("adamw", "amp_C"), ("layer_norm", "fused_layer_norm_cuda")])
def test_apex_of_nvidia_needs_its_extensions(op, extension, tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, "apex/__init__.py", "apex/normalization/__init__.py")
    assert why_not(op, "apex", "cuda") == f"NVIDIA's apex was built without its CUDA extension {extension}"
    package(tmp_path, monkeypatch, f"{extension}.py")
    assert why_not(op, "apex", "cuda") is None


def test_every_backend_of_every_op_has_an_answer():
    for op, names in BACKENDS.items():
        assert names[:2] == ("triton", "reference")
        for name in names:
            for device_type in ("cuda", "cpu"):
                reason = why_not(op, name, device_type)
                assert reason is None or len(reason) > 10


@pytest.mark.parametrize("setting", ["", "attention=reference", "all=reference"])
def test_torch_compile_takes_the_choice_as_a_constant(setting, monkeypatch):
    force(monkeypatch, setting)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return x + 1 if backend("attention", x) == "reference" else x

    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        assert compiled(CPU).item() == 2.0


def test_torch_compile_looks_for_forced_packages(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, "apex/__init__.py", "apex/normalization/__init__.py", "amp_C.py")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + (dispatch._chosen("adamw", "cuda", "adamw=apex") == "apex"), fullgraph=True, backend="aot_eager"
    )
    assert compiled(CPU).item() == 2.0


def test_torch_compile_shows_why_a_forced_backend_cannot_run(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, "xformers/__init__.py")
    force(monkeypatch, "attention=xformers")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="attention=xformers, which cannot run: it needs a CUDA device, not cpu"):
        torch.compile(lambda x: backend("attention", x), fullgraph=True, backend="aot_eager")(CPU)
