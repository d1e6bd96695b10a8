"""The command line: help, mistakes as one line with status 2, never a traceback."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from cae_fast import __version__
from cae_fast.cli import COMMANDS, main
from cae_fast.config import ClassifyConfig, PretrainConfig, TrainTokenizerConfig, UserError
from cae_fast.settings import field_docs, load_config


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A config of a tiny run on the bundled images."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model: {size: tiny, image_size: 28}\nmask: {min_block: 4}\ndata: {path: bundled:photographs}\n"
        "optim: {epochs: 1, warmup_epochs: 0}\ntrain: {global_batch_size: 2, precision: float32}\n"
    )
    return str(config)


def test_module_and_program_are_the_same():
    out = subprocess.run([sys.executable, "-m", "cae_fast", "--version"], capture_output=True, text=True, check=True)
    assert out.stdout == f"cae-fast {__version__}\n"


def test_import_needs_no_optional_package():
    code = (
        "import sys, cae_fast.commands.pretrain\n"
        "names = {'timm', 'torchvision', 'deepspeed', 'xformers', 'nvidia.dali', 'wandb', 'matplotlib'}\n"
        "found = names & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_lists_every_command_and_setting(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in field_docs(PretrainConfig))
    assert "Weight of the squared error" in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.learning_rate=1"], "unknown setting optim.learning_rate; the nearest valid one is optim."),
        (["modle.size=base"], "unknown setting modle"),
        (["optim.lr=fast"], "optim.lr"),
        (["optim.lr"], "section.field=value"),
        (["model.image_size=30"], "model.image_size=32"),
        (["model.size=giant"], "tiny, small, base"),
        (["mask.ratio=0"], "mask.ratio is 0"),
        (["mask.ratio=1"], "mask.ratio is 1"),
        (["mask.kind=blocks"], "mask.kind is 'blocks'"),
        (["mask.min_block=60"], "mask.min_block is 60"),
        (["train.global_batch_size=10", "train.micro_batch_size=4"], "multiple"),
        (["train.global_batch_size=1000"], "train.global_batch_size=1000"),
        (["train.precision=fp8"], "train.precision is 'fp8'"),
        (["train.device=tpu"], "train.device is 'tpu'"),
        (["train.init_from=none.safetensors"], "none.safetensors"),
        (["train.resume=yes"], "train.resume"),
        (["data.path=/no/such/folder"], "/no/such/folder"),
        (["data.path="], "data.path is empty"),
        (["data.path=bundled:cats"], "fashion-mnist/train"),
        (["data.crop_scale=[0.5,2]"], "data.crop_scale"),
        (["data.std=[0,1,1]"], "data.std"),
        (["data.num_workers=-1"], "data.num_workers"),
        (["data.index=nowhere"], "set one of them"),
        (["data.path=", "data.index=nowhere"], "nowhere"),
        (["optim.warmup_epochs=1"], "optim.warmup_epochs"),
        (["optim.lr=.inf"], "optim.lr"),
        (["target.kind=codes"], "target.kind"),
        (["log.every_steps=0"], "log.every_steps"),
        (["log.profile=[3]"], "log.profile"),
        (["probe.train=bundled:photographs"], "probe.test"),
        (["checkpoint.every_epochs=0"], "checkpoint.every_epochs"),
        (["train.max_steps=0"], "train.max_steps"),
        (["train.zero=4"], "train.zero"),
        (["train.offload_optimizer=true"], "train.zero=1, 2 or 3"),
        (["train.timeout_seconds=0"], "train.timeout_seconds"),
    ],
)
def test_mistakes_are_one_line(images, overrides, said, capsys):
    assert main(["pretrain", images, *overrides]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cae-fast pretrain: ")]
    assert len(errors) == 1
    assert said in errors[0]


def test_a_launcher_is_refused_where_one_process_trains(tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "a.yaml").write_text("data: {path: bundled:photographs}")
    assert main(["train-tokenizer", str(tmp_path / "a.yaml")]) == 2
    assert "4 processes were started, but train-tokenizer runs in one" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["attention=fast", "attention=triton", "speed=triton"])
def test_impossible_kernels_are_named(images, monkeypatch, capsys, setting):
    monkeypatch.setenv("CAE_KERNELS", setting)
    assert main(["pretrain", images, "train.device=cpu"]) == 2
    assert "CAE_KERNELS" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "said"), [(["pretain"], "'pretrain'"), (["pretrain", "none.yaml"], "none.yaml")])
def test_wrong_words(argv, said, capsys):
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_broken_yaml(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("model: [")
    assert main(["pretrain", str(tmp_path / "bad.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_config_is_valid(pytestconfig):
    files = sorted((pytestconfig.rootpath / "configs").rglob("*.yaml"))
    assert files
    schemas = {"tokenizer": TrainTokenizerConfig, "classify": ClassifyConfig}
    for file in files:
        schema = schemas.get(file.parent.name, PretrainConfig)
        config = load_config(schema, str(file), [])
        assert OmegaConf.structured(config) is not None
        assert file.read_text().startswith("# "), f"{file} has no header"


def test_every_setting_is_documented():
    plain = {"model.patch_size", "model.embed_dim", "model.depth", "model.num_heads", "model.decoder_num_heads"}
    plain |= {"model.layer_scale_init", "data.std", "train.seed", "probe.test"}
    plain |= {f"optim.{name}" for name in ("min_lr", "epochs", "warmup_epochs", "betas", "eps")}
    plain |= {"augment.label_smoothing"}
    docs = field_docs(PretrainConfig) | field_docs(ClassifyConfig)
    undocumented = {name for name, (_, text) in docs.items() if not text}
    assert undocumented <= plain


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.5, epochs: 7}")
    config = load_config(PretrainConfig, str(tmp_path / "a.yaml"), ["optim.lr=0.25", "optim.betas=[0.9,0.95]"])
    assert (config.optim.lr, config.optim.epochs, config.optim.betas) == (0.25, 7, [0.9, 0.95])
    with pytest.raises(UserError, match=r"optim\.epochs"):
        load_config(PretrainConfig, str(tmp_path / "a.yaml"), ["optim.epochs=many"])
