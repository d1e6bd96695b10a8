"""`cae-fast classify` as a user runs it, on a small folder of images."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cae_fast.cli import main
from cae_fast.commands import classify
from cae_fast.config import ClassifyConfig, ModelConfig, UserError
from cae_fast.evaluation.augmentation import import_eval
from cae_fast.evaluation.task import check_settings, prepare_task
from cae_fast.files import file_sha256
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.encoder import load_encoder
from cae_fast.settings import field_docs, load_config
from cae_fast.training.checkpoint import save_model
from cae_fast.training.distributed import World
from running import metrics, same_tensors, start_processes

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(size="tiny", image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, regressor_depth=1)
SMALL = """
data: {num_workers: 0, crop_scale: [0.6, 1.0], mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
validation: {crop_pct: 1.0, every_epochs: 2}
optim: {lr: 0.5, min_lr: 0.0, epochs: 6, warmup_epochs: 1}
train: {global_batch_size: 40, micro_batch_size: 20, precision: float32, device: cpu, seed: 3}
log: {every_steps: 3, tensorboard: false}
"""
NUM_TRAIN, NUM_TEST, STEPS = 120, 60, 18
# LARS turns a weight by at most 0.1 % x lr of its size a step.
LEARNING = {"linear": ["optim.lr=5", "optim.epochs=24"], "attentive": [], "finetune": ["optim.lr=5e-3"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder of random weights, images of three kinds of stripes, and small.yaml."""
    pytest.importorskip("torchmetrics", reason="needs torchmetrics", exc_type=(ImportError, RuntimeError))
    folder = tmp_path_factory.mktemp("classify")
    random = np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        for i in range(count):
            rows, columns = np.indices((16, 16))
            wave = (rows, columns, rows + columns)[i % 3] + random.integers(8)
            pixels = 128 + 60 * np.sin(wave * 0.8)[..., None] + random.normal(0, 20, (16, 16, 3))
            pixels[..., i % 3] += 50
            out = folder / split / f"class{i % 3}" / f"{i:03}.png"
            out.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out)
    torch.manual_seed(0)
    model = ContextAutoencoder(MODEL, 48, predict_codes=False)
    save_model(folder, model.state_dict(), {"config": {"model": vars(MODEL)}, "step": 0})
    (folder / "small.yaml").write_text(SMALL)
    return folder


def run(place, head, name, *overrides, status=0):
    arguments = ["classify", "--head", head, str(place / "small.yaml")]
    arguments += [f"encoder.path={place / 'encoder.safetensors'}", f"data.path={place / 'train'}"]
    arguments += [f"validation.path={place / 'test'}", f"train.run_dir={place / 'runs' / name}", *overrides]
    assert main(arguments) == status
    return place / "runs" / name


@pytest.fixture(scope="module")
def runs(place):
    """Run folders of every trained head; the linear one only where timm is."""
    found = {}
    for head in LEARNING:
        try:
            import_eval("timm.optim")
        except UserError:
            if head == "linear":
                continue
        found[head] = run(place, head, head, *LEARNING[head])
    return found


@pytest.mark.parametrize("head", list(LEARNING))
def test_a_head_learns_and_says_so(place, runs, head):
    if head not in runs:
        pytest.skip("needs timm, with a torchvision made for this torch")
    folder = runs[head]
    result = json.loads((folder / "results.json").read_text())
    assert result["head"] == result["config"]["head"]["kind"] == head
    assert result["sha256"] == file_sha256(place / "encoder.safetensors")
    steps = {"linear": 4 * STEPS}.get(head, STEPS)
    assert (result["images"], result["train_images"], result["step"]) == (NUM_TEST, NUM_TRAIN, steps)
    assert result["config"]["optim"]["epochs"] == steps / 3
    assert result["top1"] > 0.6
    assert result["top5"] == 1.0  # of three classes
    lines = [json.loads(line) for line in (folder / "tests.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6, steps + 1, 6))
    assert lines[-1]["top1"] == result["top1"]
    logged = metrics(folder)
    assert sum(line["steps"] for line in logged) == steps
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert {"curves.png", "classifier.safetensors", "config.yaml", "environment.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("head", list(LEARNING))
def test_results_are_those_of_the_saved_weights(place, runs, head):
    """Counted by hand from classifier.safetensors, without torchmetrics and the loader."""
    if head not in runs:
        pytest.skip("needs timm, with a torchvision made for this torch")
    config = load_config(ClassifyConfig, str(place / "small.yaml"), [])
    config.head.kind, config.encoder.path = head, str(place / "encoder.safetensors")
    config.data.path, config.validation.path = str(place / "train"), str(place / "test")
    config.train.run_dir = str(place / "runs" / f"again_{head}")
    task = prepare_task(config, World(), torch.device("cpu"))
    model = classify.prepare(task).model.eval()
    state = load_file(runs[head] / "classifier.safetensors")
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    trained_encoder = any(name.startswith("encoder.blocks") for name in state)
    assert trained_encoder == (head == "finetune")
    files = sorted((place / "test").glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0) for path in files])
    with torch.no_grad():
        predicted = model((pixels / 255 - 0.5) / 0.25).argmax(1)
    hits = sum(int(path.parent.name[-1]) == guess for path, guess in zip(files, predicted.tolist(), strict=True))
    assert json.loads((runs[head] / "results.json").read_text())["top1"] == hits / NUM_TEST


@pytest.mark.parametrize("features_of", [None, "class_token", "patch_mean"])
def test_knn(place, features_of):
    overrides = [] if features_of is None else [f"head.features={features_of}"]
    folder = run(place, "knn", f"knn_{features_of}", "head.k=5", "train.global_batch_size=20", *overrides)
    result = json.loads((folder / "results.json").read_text())
    encoder = load_encoder(place / "encoder.safetensors")

    def features(split):
        files = sorted((place / split).glob("*/*.png"))
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0) for path in files])
        with torch.no_grad():
            tokens = encoder((pixels / 255 - 0.5) / 0.25).double()
        tokens = tokens[:, 0] if features_of == "class_token" else tokens[:, 1:].mean(1)
        return tokens / tokens.norm(dim=1, keepdim=True), [int(path.parent.name[-1]) for path in files]

    (known, labels), (queries, truth) = features("train"), features("test")
    hits = 0
    for query, label in zip(queries, truth, strict=True):
        near = sorted(((float(query @ x), y) for x, y in zip(known, labels, strict=True)), reverse=True)[:5]
        votes = [sum(np.exp(s / 0.07) for s, y in near if y == c) for c in range(3)]
        hits += int(np.argmax(votes)) == label
    assert result["top1"] == hits / NUM_TEST
    assert result["top1"] > 0.4
    assert result["images"] == NUM_TEST


@pytest.mark.parametrize(
    ("head", "overrides"),
    [
        ("attentive", ["train.precision=bfloat16"]),
        (
            "finetune",
            ["optim.lr=5e-3", "encoder.drop_path_rate=0.2", "augment.label_smoothing=0.1", "optim.layer_decay=0.7"],
        ),
    ],
)
def test_a_stopped_run_ends_the_same(place, head, overrides):
    whole = run(place, head, f"whole_{head}", *overrides)
    stopped = run(place, head, f"stopped_{head}", *overrides, "train.max_steps=7")
    assert json.loads((stopped / "results.json").read_text())["step"] == 7
    run(place, head, f"stopped_{head}", *overrides)
    assert same_tensors(whole / "classifier.safetensors", stopped / "classifier.safetensors")
    tests = [
        [json.loads(line) for line in (folder / "tests.jsonl").read_text().splitlines()] for folder in (whole, stopped)
    ]
    assert tests[0] == [line for line in tests[1] if line["step"] != 7]
    assert [line["step"] for line in metrics(stopped)][-1] == STEPS


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on(place):
    overrides = ["optim.epochs=40", "log.every_steps=1"]
    folder = place / "runs/terminated"
    arguments = ["--head", "attentive", str(place / "small.yaml"), f"encoder.path={place / 'encoder.safetensors'}"]
    arguments += [f"data.path={place / 'train'}", f"validation.path={place / 'test'}", f"train.run_dir={folder}"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "cae_fast", "classify", *arguments, *overrides],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not ((folder / "metrics.jsonl").exists() and metrics(folder)):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    step = json.loads((folder / "stopped.json").read_text())["step"]
    assert f"stopped by SIGTERM after step {step}" in errors
    assert 0 < step < 120
    assert not (folder / "results.json").exists()
    run(place, "attentive", "terminated", *overrides)
    assert not (folder / "stopped.json").exists()
    whole = run(place, "attentive", "not_terminated", *overrides)
    assert same_tensors(whole / "classifier.safetensors", folder / "classifier.safetensors")


def test_augmentation_continues_exactly(place, timm):
    overrides = ["optim.lr=5e-3", "augment.mixup=0.8", "augment.cutmix=1.0", "augment.random_erasing=0.3"]
    overrides += ["augment.rand_augment=rand-m9-mstd0.5-inc1", "optim.epochs=2"]
    whole = run(place, "finetune", "whole_augmented", *overrides)
    stopped = run(place, "finetune", "stopped_augmented", *overrides, "train.max_steps=4")
    run(place, "finetune", "stopped_augmented", *overrides)
    assert same_tensors(whole / "classifier.safetensors", stopped / "classifier.safetensors")
    assert "accuracy" not in metrics(whole)[0]  # a mixed image has no class


@pytest.mark.parametrize("head", ["attentive", "linear"])
def test_cached_features_train_the_same_head(place, head, request):
    if head == "linear":
        request.getfixturevalue("timm")
    whole = ["data.crop_scale=[1.0,1.0]", "data.crop_ratio=[1.0,1.0]", "data.horizontal_flip=0.0"]
    plain = run(place, head, f"uncached_{head}", *whole)
    cached = run(place, head, f"cached_{head}", *whole, "head.cache_features=true")
    expected = load_file(plain / "classifier.safetensors")
    for name, tensor in load_file(cached / "classifier.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    results = [json.loads((folder / "results.json").read_text()) for folder in (plain, cached)]
    assert results[0]["top1"] == results[1]["top1"]


def run_two(place, head, name, *overrides, status=0):
    """The same with two processes; returns the run folder and what process 0 said."""
    folder = place / "runs" / name
    command = ["-m", "cae_fast", "classify", "--head", head, str(place / "small.yaml")]
    command += [f"encoder.path={place / 'encoder.safetensors'}", f"data.path={place / 'train'}"]
    command += [f"validation.path={place / 'test'}", f"train.run_dir={folder}", *overrides]
    processes = start_processes(command, 2, place)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * 2, outputs
    return folder, outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "overrides"),
    [
        ("attentive", []),
        ("linear", ["optim.lr=5"]),
        (
            "finetune",
            ["optim.lr=5e-3", "encoder.drop_path_rate=0.2", "augment.mixup=0.8", "augment.random_erasing=0.3"],
        ),
    ],
)
def test_two_processes_train_what_one_does(place, timm, head, overrides):
    """Same micro-batches, draws and averages, running statistics of a BatchNorm among them."""
    alone = run(place, head, f"alone_{head}", *overrides)
    folder, output = run_two(place, head, f"two_{head}", *overrides)
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    expected = load_file(alone / "classifier.safetensors")
    for name, tensor in load_file(folder / "classifier.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
    results = [json.loads((each / "results.json").read_text()) for each in (alone, folder)]
    assert [result["images"] for result in results] == [NUM_TEST] * 2
    assert results[1]["top1"] == results[0]["top1"]
    assert output.count("top-5") == 4  # after epochs 2, 4 and 6, and the summary: of process 0 alone
    losses = [[line["loss"] for line in metrics(each)] for each in (alone, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_one_process_continues_what_two_began(place):
    alone = run(place, "finetune", "alone_to_end", "optim.lr=5e-3")
    folder, _ = run_two(place, "finetune", "begun_by_two", "optim.lr=5e-3", "train.max_steps=7")
    run(place, "finetune", "begun_by_two", "optim.lr=5e-3")
    expected = load_file(alone / "classifier.safetensors")
    for name, tensor in load_file(folder / "classifier.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_cached_features_are_for_one_process(place):
    _, output = run_two(place, "attentive", "two_cached", "head.cache_features=true", status=2)
    assert "2 processes were started, but head.cache_features works in one" in output


def test_knn_is_for_one_process(place, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    run(place, "knn", "two_knn", status=2)
    assert "2 processes were started, but --head knn works in one" in capsys.readouterr().err


def test_another_image_size_and_relative_positions(place):
    folder = run(place, "finetune", "larger", "encoder.image_size=24", "encoder.rel_pos_bias=true", "optim.epochs=2")
    state = load_file(folder / "classifier.safetensors")
    for block in range(MODEL.depth):
        table = state[f"encoder.blocks.{block}.attn.relative_position_bias_table"]
        assert table.shape == (11**2 + 3, 2)  # 6 x 6 patches
        assert table.abs().max() > 0
    assert "encoder.pos_embed" not in state  # the positions are frozen


def test_more_images_than_gradients_need_the_same_step(place):
    """Accumulation: micro-batches of 20 and of 40 make the same fine-tuning step."""
    small, large = (
        run(place, "finetune", f"micro_{size}", "optim.epochs=2", "optim.lr=1e-3", f"train.micro_batch_size={size}")
        for size in (20, 40)
    )
    expected = load_file(large / "classifier.safetensors")
    for name, tensor in load_file(small / "classifier.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("head", "overrides", "message"),
    [
        ("linear", ["encoder.path=nowhere.safetensors"], "nowhere.safetensors"),
        ("finetune", ["encoder.image_size=17"], "image_size is 17: set a multiple of the patch size, 4"),
        ("attentive", ["head.features=patch_mean"], "head.features is 'patch_mean'"),
        ("linear", ["head.features=mean"], "head.features is 'mean': class_token or patch_mean"),
        ("linear", ["encoder.drop_path_rate=0.1"], "encoder.drop_path_rate is 0.1: only --head finetune"),
        ("attentive", ["encoder.rel_pos_bias=true"], "encoder.rel_pos_bias is True: only --head finetune"),
        ("finetune", ["head.cache_features=true"], "head.cache_features is True: --head finetune"),
        ("linear", ["head.cache_features=true", "augment.mixup=0.8"], "cannot have augment.mixup"),
        ("linear", ["validation.crop_pct=0"], "validation.crop_pct is 0.0"),
        ("linear", ["validation.path="], "validation.path"),
        ("linear", ["optim.momentum=1.0"], "optim.momentum 1.0"),
        ("linear", ["optim.layer_decay=0"], "optim.layer_decay is 0.0"),
        ("linear", ["optim.momentun=1.0"], "unknown setting optim.momentun; the nearest valid one is optim.momentum"),
        ("linear", ["train.zero=1"], "train.zero"),
        ("linear", ["train.init_from=x"], "train.init_from is x: give the encoder as encoder.path"),
        ("linear", ["data.backend=dali"], "data.backend is 'dali'"),
        ("linear", ["train.global_batch_size=400"], "train.global_batch_size=400: must be 1 to 120"),
        ("knn", ["head.k=1000"], "head.k is 1000: give a number from 1 to 120"),
    ],
)
def test_mistakes(place, capsys, head, overrides, message):
    run(place, head, "mistake", *overrides, status=2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 or error.splitlines()[-1].startswith("cae-fast classify: ")


def test_images_without_labels_and_other_classes(place, capsys, tmp_path):
    run(place, "knn", "flat", f"validation.path={place / 'test' / 'class0'}", status=2)
    assert "validation.path" in capsys.readouterr().err
    for name in ("class0", "class1", "other"):
        (tmp_path / "odd" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "odd" / name / "0.png")
    run(place, "knn", "odd", f"validation.path={tmp_path / 'odd'}", status=2)
    assert "in one alone: class2, other" in capsys.readouterr().err


def test_another_encoder_or_setting_is_another_experiment(place, capsys, tmp_path):
    run(place, "attentive", "changed", "optim.epochs=2", "train.max_steps=2")
    run(place, "attentive", "changed", "optim.epochs=2", "optim.lr=0.1", status=2)
    assert "optim.lr was 0.5, is 0.1" in capsys.readouterr().err
    run(place, "finetune", "changed", "optim.epochs=2", status=2)
    assert "holds the results of --head attentive: choose another train.run_dir" in capsys.readouterr().err
    torch.manual_seed(1)
    save_model(tmp_path, ContextAutoencoder(MODEL, 48, False).state_dict(), {"config": {"model": vars(MODEL)}})
    run(place, "attentive", "changed", "optim.epochs=2", f"encoder.path={tmp_path / 'encoder.safetensors'}", status=2)
    assert "encoder.path (the file's content changed)" in capsys.readouterr().err


def test_a_missing_package_is_named(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)  # as if it were not installed
    run(place, "knn", "missing", status=2)
    assert "pip install 'cae-fast[eval]'" in capsys.readouterr().err


def test_every_setting_is_explained():
    docs = field_docs(ClassifyConfig)
    assert docs["optim.epochs"][0] == 300
    assert "timm's notation" in docs["augment.rand_augment"][1]
    assert docs["optim.lr"][1].startswith("Peak learning rate")  # inherited
    assert "as in the original" in docs["optim.clip_grad_norm"][1]  # said anew


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs/classify").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe):
    config = load_config(ClassifyConfig, str(recipe), [])
    head = recipe.stem.removeprefix("quickstart_").split("_")[0]
    assert f"--head {head} configs/classify/{recipe.name}" in recipe.read_text()
    config.head.kind = head
    check_settings(config)
    assert config.train.global_batch_size % (config.train.micro_batch_size or config.train.global_batch_size) == 0
