"""The paper's whole path on bundled images: train a tokenizer, then pretrain a CAE on its codes."""

import json

import pytest
import torch
from safetensors import safe_open

from cae_fast.cli import main
from cae_fast.models.targets import load_tokenizer

TOKENIZER = (
    "tokenizer: {image_size: 32, width: 16, num_blocks: 1, num_codes: 64, code_dim: 16, loss: squared_error,\n"
    "  temperature_steps: 60, kl_weight: 0.1, kl_warmup_steps: 30}\n"
    "data: {path: 'bundled:photographs', crop_scale: [0.1, 1.0]}\n"
    "optim: {lr: 3.0e-3, epochs: 60, warmup_epochs: 2}\n"
    "train: {run_dir: runs/tokenizer, global_batch_size: 12, precision: float32}\n"
    "log: {tensorboard: false}\n"
)
CAE = (
    "model: {size: tiny, image_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, regressor_depth: 1,\n"
    "  decoder_depth: 1}\n"
    "target: {kind: codes, tokenizer: runs/tokenizer/tokenizer.safetensors}\n"
    "mask: {min_block: 2}\n"
    "data: {path: 'bundled:photographs', crop_scale: [0.1, 1.0]}\n"
    "optim: {epochs: 150, warmup_epochs: 10}\n"
    "train: {run_dir: runs/cae, global_batch_size: 12, precision: float32}\n"
    "log: {tensorboard: false}\n"
)


@pytest.mark.slow
def test_tokenizer_training_then_pretraining_on_its_codes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.yaml").write_text(TOKENIZER)
    (tmp_path / "cae.yaml").write_text(CAE)
    assert main(["train-tokenizer", "tokenizer.yaml"]) == 0
    tokenizer = load_tokenizer("runs/tokenizer/tokenizer.safetensors")
    images = torch.randint(0, 256, (2, 3, tokenizer.token_size(4), tokenizer.token_size(4)), dtype=torch.uint8)
    codes = tokenizer.encode(images, torch.arange(16).expand(2, -1))
    assert codes.shape == (2, 16)
    assert 0 <= codes.min() <= codes.max() < 64
    assert main(["pretrain", "cae.yaml"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "runs/cae/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_main"] < 0.9 * lines[0]["loss_main"]
    assert lines[-1]["accuracy"] > 2 / 64
    with safe_open(tmp_path / "runs/cae/model.safetensors", "pt") as file:
        assert file.get_slice("decoder.head.weight").get_shape() == [64, 32]
    assert (tmp_path / "runs/cae/reconstructions.png").exists()
