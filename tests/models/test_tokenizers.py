"""Targets: what files load, which settings contradict each other, and pretraining with codes as a user runs it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from cae_fast.cli import main
from cae_fast.config import TargetConfig, TokenizerConfig, UserError
from cae_fast.files import file_sha256, write_safetensors
from cae_fast.models.dalle import DalleDecoder, DalleEncoder, DalleTokenizer
from cae_fast.models.dvae import DiscreteVAE, dvae_facts, resolve_tokenizer
from cae_fast.models.targets import PixelTargets, load_tokenizer, make_encode, make_targets
from cae_fast.training.checkpoint import load_state, state_files

CPU = torch.device("cpu")
SMALL = (
    "model: {size: tiny, image_size: 28, embed_dim: 32, depth: 2, num_heads: 2, regressor_depth: 1, decoder_depth: 1}\n"
    "mask: {min_block: 4}\n"
    "target: {kind: codes}\n"
    "data: {path: 'bundled:fashion-mnist/test', crop_scale: [0.5, 1.0], num_workers: 0}\n"
    "optim: {epochs: 4, warmup_epochs: 1}\n"
    "train: {global_batch_size: 40, micro_batch_size: 20, precision: float32, seed: 3}\n"
    "log: {every_steps: 3, tensorboard: false}\n"
)


def write_dalle(path: Path, seed: int, decoder: bool = True) -> str:
    """A tiny tokenizer of DALL-E's shape with random weights. Codes of a random one hardly differ: spread them."""
    torch.manual_seed(seed)
    encoder = DalleEncoder(width=8, num_codes=64)
    with torch.no_grad():
        logits = encoder(0.1 + 0.8 * torch.rand(16, 3, 1, 1).expand(-1, -1, 32, 32))
        encoder.output.bias.sub_(logits.mean((0, 2, 3)))
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    if decoder:
        weights = DalleDecoder(width=8, input_width=16, num_codes=64).state_dict()
        state |= {f"decoder.{name}": tensor for name, tensor in weights.items()}
    save_file(state, path, {"cae_fast": json.dumps({"kind": "dalle"})})
    return str(path)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a config and a tokenizer, the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    write_dalle(tmp_path / "dalle.safetensors", seed=1)
    return tmp_path


def pretrain(*overrides: str) -> int:
    return main(["pretrain", "small.yaml", "train.run_dir=runs/codes", *overrides])


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_pretrains_on_codes_resumes_and_refuses_another_tokenizer(workplace, capsys):
    run, tokenizer = workplace / "runs/codes", "target.tokenizer=dalle.safetensors"
    assert pretrain(tokenizer, "train.max_steps=6") == 0
    lines = metrics(run)
    assert [line["step"] for line in lines] == [3, 6]
    assert all(0 <= line["accuracy"] <= 1 for line in lines)
    assert 0 < lines[0]["loss_main"] < 2 * torch.tensor(64.0).log()
    assert load_file(run / "model.safetensors")["decoder.head.weight"].shape == (64, 32)
    _, facts = load_state(state_files(run)[-1][1])
    assert facts["tokenizer"] == file_sha256("dalle.safetensors")
    assert (run / "reconstructions.png").stat().st_size > 1000

    write_dalle(workplace / "other.safetensors", seed=2)
    assert pretrain("target.tokenizer=other.safetensors", "train.max_steps=9") == 2
    assert "target.tokenizer (the file's content changed)" in capsys.readouterr().err

    (workplace / "dalle.safetensors").rename(workplace / "moved.safetensors")
    assert pretrain("target.tokenizer=moved.safetensors", "train.max_steps=9") == 0
    assert [line["step"] for line in metrics(run)] == [3, 6, 9]


def test_resuming_changes_nothing(workplace):
    tokenizer = "target.tokenizer=dalle.safetensors"
    assert pretrain(tokenizer, "train.max_steps=3") == 0
    assert pretrain(tokenizer, "train.max_steps=5") == 0
    assert pretrain(tokenizer, "train.max_steps=5", "train.run_dir=runs/whole") == 0
    parts, whole = (load_file(workplace / "runs" / name / "model.safetensors") for name in ("codes", "whole"))
    assert all(parts[name].equal(whole[name]) for name in whole)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler, which torch.compile uses on a CPU")
def test_a_compiled_tokenizer_gives_the_same_codes(workplace):
    tokenizer = "target.tokenizer=dalle.safetensors"
    assert pretrain(tokenizer, "train.max_steps=2", "target.compile=true", "log.every_steps=1") == 0
    assert pretrain(tokenizer, "train.max_steps=2", "train.run_dir=runs/eager", "log.every_steps=1") == 0
    compiled, eager = (metrics(workplace / "runs" / name) for name in ("codes", "eager"))
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in eager], rel=1e-3)


def test_compiling_pixels_is_refused(workplace, capsys):
    assert pretrain("target.kind=pixels", "target.compile=true") == 2
    assert "target.compile is true, but target.kind pixels" in capsys.readouterr().err


def test_codes_are_learned(workplace):
    """The codes follow from the image, so that their cross-entropy falls below that of their frequencies."""
    assert pretrain("target.tokenizer=dalle.safetensors", "train.max_steps=60", "optim.warmup_epochs=0") == 0
    lines = metrics(workplace / "runs/codes")
    assert lines[-1]["loss_main"] < 0.8 * lines[0]["loss_main"]
    assert lines[-1]["accuracy"] > lines[0]["accuracy"]


def test_without_a_decoder_there_is_no_picture(workplace, caplog):
    path = write_dalle(workplace / "encoder.safetensors", seed=1, decoder=False)
    with caplog.at_level("INFO"):
        assert pretrain(f"target.tokenizer={path}", "train.max_steps=1") == 0
    assert "no reconstructions.png" in caplog.text
    assert not (workplace / "runs/codes/reconstructions.png").exists()


def test_a_checkpoint_of_pixels_is_not_one_of_codes(workplace, capsys):
    assert pretrain("target.kind=pixels", "train.max_steps=1") == 0
    assert pretrain("target.tokenizer=dalle.safetensors", "train.max_steps=2") == 2
    assert "target.kind was pixels, is codes" in capsys.readouterr().err


def test_pixel_targets_need_no_tokenizer():
    targets = make_targets(TargetConfig(kind="pixels"), 28, 4, CPU)
    assert isinstance(targets, PixelTargets)
    assert targets.token_size(7) is None


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (TargetConfig(kind="codes"), "target.tokenizer is empty"),
        (TargetConfig(kind="tokens"), "target.kind is 'tokens'"),
        (TargetConfig(kind="pixels", tokenizer="a.safetensors"), "set target.kind=codes"),
        (TargetConfig(kind="codes", tokenizer="none.safetensors"), "there is no such file"),
        (TargetConfig(kind="codes", alignment_weight=-1), "target.alignment_weight is -1"),
    ],
)
def test_contradictions(target, said):
    with pytest.raises(UserError) as error:
        make_targets(target, 28, 4, CPU)
    assert said in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = str(tmp_path / "file.safetensors")
    cases = [
        ({}, "not a tokenizer"),
        ({"cae_fast": json.dumps({"kind": "vqgan"})}, "kind 'vqgan'"),
        ({"cae_fast": json.dumps({"kind": "dalle"})}, "do not make a tokenizer"),
    ]
    for metadata, said in cases:
        save_file({"encoder.input.weight": torch.zeros(8, 3, 7, 7)}, path, metadata)
        with pytest.raises(UserError) as error:
            load_tokenizer(path)
        assert said in str(error.value)
    Path(path).write_text("<html>")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_tokenizer(path)


def test_sizes_come_from_the_file(tmp_path):
    tokenizer = load_tokenizer(write_dalle(tmp_path / "dalle.safetensors", seed=1))
    assert isinstance(tokenizer, DalleTokenizer)
    assert (tokenizer.num_codes, tokenizer.token_size(14), tokenizer.token_size(16)) == (64, 112, 128)
    assert tokenizer.decode(torch.zeros(1, 4, 4, dtype=torch.int64)).shape == (1, 3, 32, 32)


def test_a_dvae_plugs_in(tmp_path):
    config = resolve_tokenizer(TokenizerConfig(width=8, num_blocks=1, num_codes=32, image_size=32))
    model = DiscreteVAE(config).eval()
    path = tmp_path / "dvae.safetensors"
    write_safetensors(path, model.state_dict(), dvae_facts(config, {}))
    tokenizer = load_tokenizer(str(path))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    ids = torch.arange(16).expand(2, -1)
    codes = tokenizer.encode(images, ids)
    assert codes.equal(model.encode(images, ids))
    assert (tokenizer.num_codes, tokenizer.token_size(4), tokenizer.has_decoder) == (32, 32, True)
    with FlopCounterMode(display=False) as counter:
        tokenizer.encode(images[:1], ids[:1, :5])
    assert tokenizer.encode_flops(4, 5) == counter.get_total_flops()
    picture = tokenizer.decode(codes.unflatten(1, (4, 4)))
    assert picture.shape == (2, 3, 32, 32)
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_a_batch_is_encoded_in_equal_parts_of_at_most_64(workplace):
    tokenizer = load_tokenizer("dalle.safetensors")
    seen: list[int] = []

    def encode(images: torch.Tensor, masked_ids: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return original(images, masked_ids)

    original, tokenizer.encode = tokenizer.encode, encode
    images = torch.randint(256, (130, 3, 16, 16), dtype=torch.uint8)
    ids = torch.tensor([[0, 2]]).expand(130, -1)
    codes = make_encode(tokenizer, compiled=False)(images, ids)
    assert torch.equal(codes, original(images, ids))
    assert seen == [44, 44, 42]
