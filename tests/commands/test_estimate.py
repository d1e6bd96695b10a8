"""`cae-fast estimate`: its counts against the real model and torch's counter, its output, mistakes as one line."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cae_fast.cli import main
from cae_fast.commands.estimate import workload
from cae_fast.config import PretrainConfig
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.dalle import DalleEncoder
from cae_fast.settings import load_config

TINY = (
    "model: {size: tiny, image_size: 32}\nmask: {min_block: 4}\noptim: {epochs: 5, warmup_epochs: 1}\n"
    "train: {global_batch_size: 64, micro_batch_size: 8}\n"
)


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return str(tmp_path / "tiny.yaml")


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("overrides", [[], ["model.decoder_embed_dim=64"], ["target.alignment_weight=0"]])
def test_parameters_and_flops_are_the_models(tiny, overrides):
    config = load_config(PretrainConfig, tiny, overrides)
    work = workload(config, 1000, None)
    model = ContextAutoencoder(config.model, 48, False, config.target.alignment_weight)
    assert (work.parameters, work.tensors) == (
        sum(p.numel() for p in model.parameters()),
        sum(1 for _ in model.parameters()),
    )
    ids = torch.arange(64)[None]
    batch = torch.rand(1, 3, 32, 32), ids[:, 32:], ids[:, :32], torch.rand(1, 32, 48)
    assert flops_of(lambda: model(*batch).total.backward()) == work.model_flops
    assert work.steps == 5 * (1000 // 64)


def test_flops_of_the_tokenizer_in_a_file(tiny, tmp_path):
    torch.manual_seed(0)
    encoder = DalleEncoder(width=16, num_codes=32).requires_grad_(False)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_file(state, tmp_path / "dalle.safetensors", {"cae_fast": json.dumps({"kind": "dalle"})})
    overrides = ["target.kind=codes", f"target.tokenizer={tmp_path / 'dalle.safetensors'}"]
    work = workload(load_config(PretrainConfig, tiny, overrides), 1000, None)
    features = flops_of(lambda: encoder.features(torch.rand(1, 3, 64, 64)))
    assert work.targets_flops == features + 32 * 2 * encoder.output.weight.numel()  # 32 masked of 64 positions
    assert work.targets_weights == 2 * sum(p.numel() for p in encoder.parameters())


def test_a_recipe_without_its_tokenizer(pytestconfig, capsys):
    config = pytestconfig.rootpath / "configs/pretrain/vit_base_dalle.yaml"
    assert main(["estimate", str(config), "--gpus", "8", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "148,681,472 parameters" in text  # the paper's 148.68 M
    assert "target.tokenizer is empty: DALL-E's encoder" in text
    assert [line[:5] for line in text.splitlines() if line.startswith("| ")].count("| ---") == 2


def test_json_and_table_agree(tiny, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    options = ["--gpus", "8", "--images", "6400", "--data-rate", "10", "--device", "h200", "--json", str(out)]
    assert main(["estimate", tiny, "train.micro_batch_size=2", *options, "--markdown"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(out.read_text())
    assert [row["stage"] for row in facts["estimates"]] == [0, 1, 2, 3]
    assert facts["workload"]["steps"] == 5 * 100
    assert facts["workload"]["data_rate"] == 10
    assert facts["device"]["name"].startswith("H200")
    row = facts["estimates"][1]
    assert row["limit"] == "data"
    assert row["step_ms"] == pytest.approx(8 / 10 * 1e3)  # 64 images over 8 GPUs at 10 images/s each
    assert row["state"]["optimizer"] == -(-facts["workload"]["parameters"] * 12 // 8)
    assert f"| 8 | 1 | 2 x 4 | {row['peak'][0] / 1e9:.1f} |" in text
    assert all(note in text for note in facts["assumptions"])


def test_a_row_for_each_number_of_gpus(tiny, capsys):
    assert main(["estimate", tiny, "--gpus", "1", "8", "64", "--zero", "2", "--markdown"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[2:]] == [["| 1", "0", "8 x 8"], ["| 8", "2", "8"], ["| 64", "2", "1"]]
    assert main(["estimate", tiny, "--gpus", "1"]) == 0
    assert "GB on one GPU" in capsys.readouterr().out


def test_measured_rates(tiny, tmp_path, capsys):
    """In bfloat16, where the rate of linear layers counts."""
    rates = {"linears": 555e12, "convolutions": 333e12, "copy": 2.5e12, "cube": 8e14}
    (tmp_path / "peaks.json").write_text(json.dumps({"rates": rates, "device": "Some GPU"}))
    options = ["train.precision=bfloat16", "--gpus", "8", "--measured", str(tmp_path / "peaks.json")]
    assert main(["estimate", tiny, *options]) == 0
    text = capsys.readouterr().out
    assert "products 555 TFLOP/s, its targets' 333, other ops 2.50 TB/s" in text
    assert "on Some GPU" in text


def test_imagenet_22k_recipe(pytestconfig, capsys):
    """The header's hours are those of the command it names."""
    config = pytestconfig.rootpath / "configs/pretrain/vit_huge_in22k.yaml"
    assert main(["estimate", str(config), "--gpus", "8", "64", "512", "--images", "14197122", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "798,427,392 parameters, 150 epochs of 3,466 steps of 4096 images" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    hours = [row[rows[0].index("hours")] for row in rows[2:]]
    header = config.read_text()
    assert f"{float(hours[1]):.0f} on 64 H100" in header
    assert f"{float(hours[0]):.0f} on 8" in header


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus=0"),
        (["--gpus", "3"], "--gpus=3: train.global_batch_size 64"),
        (["--gpus", "128"], "--gpus=128"),
        (["--gpus", "8", "--device", "v100"], "--device=v100: choose one of h100, h200, a100"),
        (["--gpus", "8", "16", "--zero", "4"], "--zero=4"),
        (["--gpus", "8", "--images", "63"], "--images=63"),
        (["--gpus", "8", "--data-rate", "0"], "--data-rate=0"),
        (["--gpus", "8", "--data-rate", "nan"], "--data-rate=nan"),
        (["--gpus", "8", "--json", "no/such/folder/x.json"], "--json=no/such/folder/x.json"),
        (["--gpus", "8", "--measured", "none.json"], "--measured=none.json"),
        (["model.size=giant", "--gpus", "8"], "model.size is 'giant'"),
        (["mask.ratio=0", "--gpus", "8"], "mask.ratio is 0"),
        (["train.micro_batch_size=48", "--gpus", "8"], "train.micro_batch_size 48"),
        (["train.precision=fp8", "--gpus", "8"], "train.precision is 'fp8'"),
        (["target.kind=features", "--gpus", "8"], "target.tokenizer is empty"),
        (["target.kind=words", "--gpus", "8"], "target.kind is 'words'"),
        (["optim.warmup_epochs=5", "--gpus", "8"], "optim.warmup_epochs"),
    ],
)
def test_mistakes_are_one_line(tiny, arguments, said, capsys):
    assert main(["estimate", tiny, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("cae-fast estimate: ")
    assert said in lines[0]


@pytest.mark.parametrize(
    "text", ['{"device": "x"}', "[]", "{", '{"rates": {"linears": 0, "convolutions": 1, "copy": 1}, "device": "x"}']
)
def test_a_measurement_that_is_none(tiny, tmp_path, text, capsys):
    (tmp_path / "peaks.json").write_text(text)
    assert main(["estimate", tiny, "--gpus", "8", "--measured", str(tmp_path / "peaks.json")]) == 2
    assert "--measured=" in capsys.readouterr().err
