"""`cae-fast convert cae`: every layout in and out, against the original's golden numbers and timm's own models."""

import argparse
import os
import re
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cae_fast import load_encoder
from cae_fast.cli import main
from cae_fast.commands.convert_cae import find_heads
from cae_fast.config import ModelConfig, UserError
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.training.checkpoint import save_model
from golden_model import NUM_CODES, TINY, split_mask

HEADS = ["--num-heads", "4", "--decoder-num-heads", "4"]
# Module names of mmpretrain's CAEPretrainViT, BEiTTransformerEncoderLayer, CAETransformerRegressorLayer and CAENeck.
MM_LAYER = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
MM_REGRESSOR = {"norm1_q": "norm1_q_cross", "norm1_k": "norm1_k_cross", "norm1_v": "norm1_v_cross"} | {
    "mlp_cross.fc1": "ffn.layers.0.0",
    "mlp_cross.fc2": "ffn.layers.1",
}
MM_OTHERS = {
    "encoder.cls_token": "backbone.cls_token",
    "encoder.pos_embed": "backbone.pos_embed",
    "encoder.patch_embed.proj": "backbone.patch_embed.projection",
    "encoder.norm": "backbone.ln1",
    "mask_token": "neck.mask_token",
    "regresser.norm": "neck.norm_regressor",
    "decoder.norm": "neck.norm_decoder",
    "decoder.head": "neck.head",
}


def mmpretrain_name(name: str) -> str:
    for path, new, parts in (
        (r"encoder\.blocks\.(\d+)\.", "backbone.layers", MM_LAYER),
        (r"decoder\.decoder_blocks\.(\d+)\.", "neck.decoders", MM_LAYER),
        (r"regresser\.regressor_blocks\.(\d+)\.", "neck.regressors", MM_REGRESSOR),
    ):
        if match := re.match(path, name):
            rest = name[match.end() :]
            part, _, leaf = rest.rpartition(".")
            return f"{new}.{match[1]}.{parts[part]}.{leaf}" if part in parts else f"{new}.{match[1]}.{rest}"
    part, _, leaf = name.rpartition(".")
    return f"{MM_OTHERS[part]}.{leaf}" if part in MM_OTHERS else MM_OTHERS[name]


@pytest.fixture(scope="module")
def original(golden):
    """The golden parameters as Atten4Vis/CAE saves them: with positions and the copy of the encoder."""
    state = {k.removeprefix("param."): v for k, v in golden("cae_tiny.safetensors").items() if k.startswith("param.")}
    positions = golden("pos_embed.safetensors")["pos_embed_64_6x6"]
    state |= {"rd_pos_embed": positions, "encoder.pos_embed": positions.clone()}
    return state | {k.replace("encoder.", "alignment_encoder.", 1): v for k, v in state.items() if "encoder." in k[:8]}


@pytest.fixture(scope="module")
def layouts(original, golden):
    lxtgh = dict(original)
    del lxtgh["rd_pos_embed"]  # computed anew there
    for theirs, older in golden("key_map_lxtGH.json")["atten4vis_prefix -> lxtGH_prefix"]:
        lxtgh = {older + k.removeprefix(theirs) if k.startswith(theirs) else k: v for k, v in lxtgh.items()}
    plain = {k: v for k, v in original.items() if not k.startswith(("alignment_encoder.", "rd_"))}
    mmpretrain = {mmpretrain_name(k): v for k, v in plain.items()}
    mmpretrain |= {k.replace("backbone", "teacher"): v for k, v in mmpretrain.items() if k.startswith("backbone.")}
    mmpretrain["target_generator.blocks.input.w"] = torch.zeros(4, 3, 7, 7)
    return {"Atten4Vis/CAE": original, "lxtGH/CAE": lxtgh, "mmpretrain": mmpretrain}


def checkpoint(state: dict[str, torch.Tensor], key: str) -> dict:
    """What training scripts save beside the weights."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    settings = argparse.Namespace(lr=1.5e-3, output=Path("runs"), sizes=[96, 96], device=torch.device("cpu"))
    logs = {"epoch": np.float64(3.0), "history": np.arange(4), "last": deque([1, 2], 2)}
    return {key: OrderedDict(state), "optimizer": optimizer.state_dict(), "epoch": 3, "args": settings, "log": logs}


def refused(argv, capsys) -> str:
    """The one line that a mistake gets."""
    assert main(["convert", "cae", *map(str, argv)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def convert(*argv) -> None:
    assert main(["convert", "cae", *map(str, argv)]) == 0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", ["Atten4Vis/CAE", "lxtGH/CAE", "mmpretrain"])
def test_converted_checkpoints_give_the_golden_outputs(tmp_path, golden, layouts, layout, zipped, capsys):
    content = checkpoint(layouts[layout], "state_dict" if layout == "mmpretrain" else "model")
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=zipped)
    convert(tmp_path / "in.pth", tmp_path / "model.safetensors", *HEADS)
    said = capsys.readouterr().out
    assert f"whole model in the names of {layout}" in said
    assert ("alignment_encoder.* left out" if layout == "Atten4Vis/CAE" else "teacher.* left out") in said
    model = ContextAutoencoder(TINY, NUM_CODES, predict_codes=True)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    tensors = golden("cae_tiny.safetensors")
    visible_ids, masked_ids = split_mask(tensors["in.mask"].flatten(1).bool())
    labels = tensors["in.labels"].view(3, -1).long()
    with torch.no_grad():
        visible = model.encoder.encode(model.encoder.tokens(tensors["in.image"], visible_ids, None)[0])
        latents = model.predict_latents(visible[:, 1:], visible_ids, masked_ids)
        logits = model.predict(tensors["in.image"], visible_ids, masked_ids).flatten(0, 1)
        losses = model(tensors["in.image"], visible_ids, masked_ids, labels)
    pairs = {"enc_visible": visible, "latent_predict": latents, "logits": logits, "loss": losses.total}
    for name, actual in pairs.items():
        expected = tensors[f"out.{name}"]
        assert (actual - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("layout", ["Atten4Vis/CAE", "mmpretrain"])
def test_an_encoder_alone(tmp_path, golden, layouts, layout, prefixed, capsys):
    prefix = "encoder." if layout == "Atten4Vis/CAE" else "backbone."
    state = {k: v for k, v in layouts[layout].items() if k.startswith(prefix)}
    state = {k if prefixed else k.removeprefix(prefix): v for k, v in state.items()}
    torch.save(state | {"head.weight": torch.zeros(2, 64)}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "encoder.safetensors", "--num-heads", "4")
    said = capsys.readouterr().out
    assert f"encoder in the names of {layout}" in said
    assert "head.* left out" in said
    tensors = golden("cae_tiny.safetensors")
    encoder = load_encoder(tmp_path / "encoder.safetensors")
    _, masked_ids = split_mask(tensors["in.mask"].flatten(1).bool())
    masked = encoder.tokens(tensors["in.image"], masked_ids, None)[0]
    expected = tensors["out.latent_target"]
    assert (encoder.encode(masked)[:, 1:] - expected).norm() < 1e-5 * expected.norm()
    assert "--to model needs a whole model" in refused(
        [tmp_path / "in.pth", tmp_path / "x.safetensors", "--to", "model"], capsys
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run's files: another decoder width, whose three heads of 9 do not fill its 28 channels; all weights moved."""
    torch.manual_seed(5)
    config = ModelConfig(
        size="tiny",
        image_size=24,
        embed_dim=48,
        depth=2,
        num_heads=4,
        decoder_embed_dim=28,
        decoder_num_heads=3,
        regressor_depth=3,
        decoder_depth=1,
    )
    model = ContextAutoencoder(config, 48, predict_codes=False)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("run")
    save_model(folder, model.state_dict(), {"config": {"model": vars(config), "data": {"mean": [0.5, 0.4, 0.3]}}})
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("to", ["original", "original-lxtgh"])
def test_round_trips_bit_for_bit(tmp_path, run_dir, to, suffix):
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.safetensors"
    convert(run_dir / "model.safetensors", there, "--to", to)
    heads = [] if suffix == ".safetensors" else ["--num-heads", "4", "--decoder-num-heads", "3"]
    convert(there, back, *heads)
    before, after = load_file(run_dir / "model.safetensors"), load_file(back)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert load_encoder(back).blocks[0].attn.num_heads == 4
    if suffix == ".safetensors":
        assert load_encoder(there).state_dict()["norm.weight"].equal(before["encoder.norm.weight"])
    assert not list(tmp_path.glob(".*"))


def test_encoders_round_trip_bit_for_bit(tmp_path, run_dir):
    convert(run_dir / "model.safetensors", tmp_path / "encoder.safetensors", "--to", "encoder")
    convert(run_dir / "encoder.safetensors", tmp_path / "beit.pth", "--to", "beit")
    convert(tmp_path / "beit.pth", tmp_path / "again.safetensors", "--num-heads", "4")
    expected = load_file(run_dir / "encoder.safetensors")
    for name in ("encoder", "again"):
        actual = load_file(tmp_path / f"{name}.safetensors")
        assert actual.keys() == expected.keys()
        assert all(actual[key].equal(expected[key]) for key in expected)


def test_prefixes_of_parallel_training_are_no_names(tmp_path, original):
    torch.save({"module": {f"module.{k}": v for k, v in original.items()}}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out.pth", "--to", "original", *HEADS)
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert written.keys() == original.keys()


@pytest.mark.parametrize(("to", "layout"), [("original", "Atten4Vis/CAE"), ("original-lxtgh", "lxtGH/CAE")])
def test_writes_the_names_that_the_original_loads(tmp_path, layouts, to, layout):
    """torch.load as the original's scripts call it, and every name that its strict loading wants."""
    torch.save({"model": layouts[layout]}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out.pth", "--to", to, *HEADS)
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert written.keys() == layouts[layout].keys()
    assert all(written[name].equal(tensor) for name, tensor in layouts[layout].items())


def images_of(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and what our encoder makes of them, read from another file than the one under test."""
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        return images, load_encoder(run / "model.safetensors").forward_features(images)


SHAPE = {"img_size": 24, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4, "init_values": 1.0}
BEIT = {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "global_pool": "token"}
TIMM = {
    "VisionTransformer": ("encoder", "vit_base_patch16_224", {}),
    "Beit": ("beit", "beit_base_patch16_224", BEIT),
    "Eva": ("beit", "eva_giant_patch14_224", {"global_pool": "token", "mlp_ratio": 4}),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_computes_the_same(tmp_path, run_dir, timm, name):
    to, architecture, options = TIMM[name]
    path = tmp_path / "weights.safetensors"
    convert(run_dir / "model.safetensors", path, "--to", to)
    model = timm.create_model(architecture, num_classes=0, checkpoint_path=str(path), **SHAPE, **options).eval()
    assert type(model).__name__ == name
    images, expected = images_of(run_dir)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(images), expected[:, 0], atol=1e-5, rtol=1e-5)


def test_a_run_writes_what_timm_loads(run_dir, timm):
    path = str(run_dir / "encoder.safetensors")
    model = timm.create_model("vit_base_patch16_224", num_classes=0, checkpoint_path=path, **SHAPE).eval()
    images, expected = images_of(run_dir)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-5)


def test_hugging_face_folder(tmp_path, run_dir, timm):
    folder = tmp_path / "cae-tiny"
    convert(run_dir / "model.safetensors", folder, "--to", "huggingface")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images, expected = images_of(run_dir)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-5)
        assert load_encoder(folder / "model.safetensors").forward_features(images).equal(expected)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 24, 24)
    assert tuple(data["mean"]) == (0.5, 0.4, 0.3)
    assert tuple(data["std"]) == (0.229, 0.224, 0.225)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        variables: dict = {}
        exec(code, variables)
    finally:
        os.chdir(here)
    assert variables["tokens"].shape == (1, 37, 48)
    parameters = sum(p.numel() for p in model.parameters()) - 2 * 48  # timm's biases of keys, all zero
    assert f"| {parameters:,} |" in card


HEAD_CASES = [
    ("Atten4Vis/CAE", 768, 768, 12),
    ("Atten4Vis/CAE", 1024, 1024, 16),
    ("Atten4Vis/CAE", 1024, 1020, 12),  # 12 heads x 85
    ("lxtGH/CAE", 384, 384, 12),
    ("timm", 384, 384, 6),
    ("Atten4Vis/CAE", 1280, 1280, 16),
    ("timm", 1280, 1280, 16),
]


@pytest.mark.parametrize(("layout", "width", "inner", "heads"), HEAD_CASES)
def test_heads_where_nobody_says_them(layout, width, inner, heads, capsys):
    """The published models': 12 heads but in L and H; timm's S has 6."""
    state = {"regressor.blocks.0.attn.proj.weight": torch.empty(width, inner, device="meta")}
    flag = "--decoder-num-heads"
    assert find_heads(Path("x.pth"), state, "regressor", layout, flag, None) == heads
    assert f"{heads} heads of width {inner // heads}; if not, give {flag}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--decoder-num-heads is 7"):
        find_heads(Path("x.pth"), state, "regressor", layout, flag, 7)


def test_heads_that_cannot_be_told():
    state = {"encoder.blocks.0.attn.proj.weight": torch.empty(1024, 1020, device="meta")}
    with pytest.raises(UserError, match="say how many heads of together 1020 a width of 1024 has"):
        find_heads(Path("x.pth"), state, "encoder", "timm", "--num-heads", None)
    assert find_heads(Path("x.pth"), state, "encoder", "timm", "--num-heads", 15) == 15


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["model", "args", "settings"])
def test_a_malicious_checkpoint_is_refused_without_running(tmp_path, original, place, zipped, capsys):
    marker = tmp_path / "marker"
    content = checkpoint(original, "model")
    if place == "settings":
        content["args"].hook = Malicious(marker)
    else:
        content[place] = Malicious(marker)
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=zipped)
    line = refused([tmp_path / "in.pth", tmp_path / "out.safetensors"], capsys)
    assert "system, which weights do not need: refused" in line
    assert not marker.exists()
    torch.load(tmp_path / "in.pth", weights_only=False)
    assert marker.exists()  # the file is what it claims to be
    assert not (tmp_path / "out.safetensors").exists()


def test_mistakes_get_one_line(tmp_path, original, run_dir, capsys):
    out, path = tmp_path / "out.safetensors", tmp_path / "in.pth"
    assert "there is no such file" in refused([path, out], capsys)
    path.write_bytes(b"<!DOCTYPE html><html>")
    assert "web page" in refused([path, out], capsys)
    (tmp_path / "in.safetensors").write_bytes(b"12345678 not safetensors")
    assert "not a safetensors file" in refused([tmp_path / "in.safetensors", out], capsys)
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "in.safetensors")
    assert "no CAE and no encoder with positions; its weights are fc.weight" in refused(
        [tmp_path / "in.safetensors", out], capsys
    )
    torch.save({"model": {k: v for k, v in original.items() if "fc1.bias" not in k}}, path)
    assert (
        'not a CAE (Error(s) in loading state_dict for ContextAutoencoder: Missing key(s) in state_dict: "enc'
        in refused([path, out, *HEADS], capsys)
    )
    torch.save({"model": original | {"encoder.rel_pos_bias.table": torch.zeros(2)}}, path)
    assert "encoder.rel_pos_bias.table" in refused([path, out, *HEADS], capsys)
    torch.save({"model": original}, path)
    assert "--num-heads is 5: in" in refused([path, out, "--num-heads", "5"], capsys)
    assert "out.txt: --to model writes .safetensors" in refused([path, tmp_path / "out.txt"], capsys)
    assert "--to original writes .safetensors or .pth" in refused([path, tmp_path / "out", "--to", "original"], capsys)
    assert "--to huggingface writes a folder" in refused([path, out, "--to", "huggingface"], capsys)
    convert(path, out, *HEADS)
    assert "the heads are together 64 wide" in refused([out, tmp_path / "b.safetensors", "--num-heads", "3"], capsys)


def test_timm_has_no_heads_that_leave_channels_over(tmp_path, capsys):
    config = ModelConfig(size="tiny", image_size=8, embed_dim=28, depth=1, num_heads=3, regressor_depth=1)
    save_model(tmp_path, ContextAutoencoder(config, 48, False).state_dict(), {"config": {"model": vars(config)}})
    line = refused([tmp_path / "encoder.safetensors", tmp_path / "folder", "--to", "huggingface"], capsys)
    assert "cannot have 3 heads in a width of 28" in line
    assert load_encoder(tmp_path / "encoder.safetensors").blocks[0].attn.head_dim == 9
