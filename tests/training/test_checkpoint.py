"""Files of a run: atomic, pruned, readable by others."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cae_fast import files
from cae_fast.config import ModelConfig, UserError
from cae_fast.files import remove_leftovers
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.training.checkpoint import FOLDER, load_state, save_model, save_state, state_files


def state(value: float) -> dict[str, torch.Tensor]:
    return {"param/a": torch.full((3,), value), "step/a": torch.tensor(2.0)}


def test_round_trip(tmp_path):
    path = save_state(tmp_path, 7, state(1.5), {"step": 7, "config": {"x": [1, 2]}}, keep=set())
    tensors, facts = load_state(path)
    assert torch.equal(tensors["param/a"], torch.full((3,), 1.5))
    assert facts == {"step": 7, "config": {"x": [1, 2]}}


def test_pruning_keeps_the_newest_and_the_chosen(tmp_path):
    for step in range(1, 6):
        save_state(tmp_path, step, state(step), {"step": step}, keep={2})
    assert [step for step, _ in state_files(tmp_path)] == [2, 5]


def test_a_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    save_state(tmp_path, 1, state(1.0), {"step": 1}, keep=set())

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, 2, state(2.0), {"step": 2}, keep=set())
    assert [step for step, _ in state_files(tmp_path)] == [1]
    assert list((tmp_path / "checkpoints").iterdir()) == [tmp_path / "checkpoints" / "step_00000001.safetensors"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in (".model.safetensors.1.tmp", "checkpoints/.step_00000009.safetensors.1.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    remove_leftovers(tmp_path, tmp_path / FOLDER)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["model.safetensors"]
    assert state_files(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x04N.", None])
def test_a_foreign_file_is_named(tmp_path, content):
    path = tmp_path / "step_00000001.safetensors"
    if content is None:
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"step_00000001\.safetensors(: not a safetensors| is not a training state)"):
        load_state(path)


def test_encoder_file_computes_what_the_encoder_does(tmp_path):
    """Read back under timm's names by an independent forward pass written from timm's VisionTransformer."""
    torch.manual_seed(0)
    model = ContextAutoencoder(ModelConfig(size="tiny", image_size=16), 48, predict_codes=False)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    save_model(tmp_path, model.state_dict(), {"step": 3})
    w = load_file(tmp_path / "encoder.safetensors")
    images = torch.randn(2, 3, 16, 16)
    x = torch.nn.functional.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)
    x = torch.cat((w["cls_token"].expand(2, -1, -1), x.flatten(2).transpose(1, 2)), 1) + w["pos_embed"]
    norm = torch.nn.functional.layer_norm
    linear = torch.nn.functional.linear
    for i in range(4):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        h = norm(x, (96,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        qkv = linear(h, b["attn.qkv.weight"], b["attn.qkv.bias"]).view(2, 17, 3, 3, 32).permute(2, 0, 3, 1, 4)
        attention = ((qkv[0] @ qkv[1].transpose(-1, -2)) * 32**-0.5).softmax(-1) @ qkv[2]
        h = linear(attention.transpose(1, 2).flatten(2), b["attn.proj.weight"], b["attn.proj.bias"])
        x = x + b["ls1.gamma"] * h
        h = norm(x, (96,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        h = torch.nn.functional.gelu(linear(h, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + b["ls2.gamma"] * linear(h, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    x = norm(x, (96,), w["norm.weight"], w["norm.bias"], 1e-6)
    torch.testing.assert_close(model.encoder(images), x, atol=2e-5, rtol=1e-4)
    assert json.loads(safe_open(tmp_path / "model.safetensors", "pt").metadata()["cae_fast"]) == {"step": 3}


def test_files_follow_the_umask(tmp_path):
    path = save_state(tmp_path, 1, state(1.0), {"step": 1}, keep=set())
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
