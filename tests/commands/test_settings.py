"""Settings as people write them: texts to the letter, ~, limits; no value gives a traceback."""

import itertools
import os

import pytest

from cae_fast.cli import main
from cae_fast.config import ClassifyConfig, PretrainConfig, TrainTokenizerConfig, UserError
from cae_fast.settings import PATHS, field_docs, is_text, load_config

SMALL = (
    "model: {size: tiny, image_size: 28, embed_dim: 32, depth: 1, num_heads: 2, regressor_depth: 1, decoder_depth: 1}\n"
    "mask: {min_block: 4}\n"
    "data: {path: 'bundled:fashion-mnist/test', num_workers: 0}\n"
    "optim: {epochs: 1, warmup_epochs: 0}\n"
    "train: {global_batch_size: 20, max_steps: 1, precision: float32, device: cpu}\n"
    "log: {tensorboard: false}\n"
)
TOKENIZER = (
    "tokenizer: {image_size: 16, width: 8, num_blocks: 0, num_codes: 64, code_dim: 8}\n"
    + SMALL.partition("\n")[2].partition("\n")[2]
)
ODD = ("-1", "0", "1e309", "nan", "abc", "", "null", "[]", "2147483648", "-0.5", "{}", "1e-320", "[1,2,3,4,5]")


@pytest.mark.parametrize(
    "text",
    [
        "*.tar",
        "{000..001}.tar",
        "d #2",
        "@x",
        "`x",
        "%x",
        "!r",
        "'x",
        '"x',
        "${oc.env:UNSET}",
        "a=b",
        "x: y",
        "20240131_1530",
    ],
)
def test_a_text_is_what_stands_there(text):
    assert load_config(PretrainConfig, None, [f"data.path={text}"]).data.path == text
    assert load_config(PretrainConfig, None, [f"train.run_dir={text}"]).train.run_dir == text


@pytest.mark.parametrize("text", ["007", "12:30:45", "1e3", "on", "true", "~x", " x"])
def test_what_yaml_would_change_stays(text):
    assert load_config(PretrainConfig, None, [f"log.wandb={text}"]).log.wandb == text


def test_null_empties_a_setting_that_may_be_empty():
    assert load_config(PretrainConfig, None, ["probe.train=null"]).probe.train is None
    assert load_config(PretrainConfig, None, ["train.zero=null"]).train.zero is None


@pytest.mark.parametrize(
    "override", ["optim.betas=[0.9,", "optim.lr={", "train.zero=[1", "optim=5", "data.crop_scale={}"]
)
def test_other_yaml_mistakes_are_one_line(override):
    with pytest.raises(UserError) as error:
        load_config(PretrainConfig, None, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"- 1\n- 2\n", b"just words", b"\xff\xfe\x00", b"a: b: c", b"data: {path: '${nowhere}'}"]
)
def test_a_file_of_something_else_is_one_line(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_config(PretrainConfig, str(tmp_path / "x.yaml"), [])
    assert "\n" not in str(error.value)


def test_the_home_folder_is_meant_in_every_path():
    home = os.path.expanduser("~")
    for schema in (PretrainConfig, ClassifyConfig, TrainTokenizerConfig):
        for name in set(PATHS) & set(field_docs(schema)):
            config = load_config(schema, None, [f"{name}=~/x"])
            section, key = name.split(".")
            assert getattr(getattr(config, section), key) == f"{home}/x", name
    assert set(PATHS) <= set().union(*(field_docs(s) for s in (PretrainConfig, ClassifyConfig)))


def test_every_path_setting_is_listed():
    """A text setting whose sentence speaks of a file, a folder or images is a path."""
    docs = field_docs(PretrainConfig) | field_docs(ClassifyConfig)
    for name, (_, text) in docs.items():
        schema = PretrainConfig if name in field_docs(PretrainConfig) else ClassifyConfig
        if is_text(schema, name) and any(word in name for word in ("path", "dir", "index", "init_from", "deepspeed")):
            assert name in PATHS, text


@pytest.mark.parametrize(
    ("name", "value"), [("optim.eps", "1e309"), ("data.crop_ratio", "[nan,1]"), ("train.seed", "-1")]
)
def test_numbers_have_limits(name, value):
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_config(PretrainConfig, None, [f"{name}={value}"])


def odd_settings(schema):
    return list(itertools.product(field_docs(schema), ODD))


def tried(command, tmp_path, text, pairs, capsys):
    """Every pair with one step; returns those that did not end with 0 or one line of the program's own."""
    (tmp_path / "small.yaml").write_text(text)
    wrong = []
    for number, (name, value) in enumerate(pairs):
        if name in ("train.run_dir", "log.wandb") or (name, value) in (("train.device", "cuda"),):
            continue
        arguments = [command, str(tmp_path / "small.yaml"), f"{name}={value}", f"train.run_dir={tmp_path}/run{number}"]
        try:
            status = main(arguments)
        except BaseException as error:
            wrong.append((name, value, repr(error)[:200]))
            continue
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"cae-fast {command}: ")]
        if status not in (0, 2, 3) or (status == 2 and len(lines) != 1):
            wrong.append((name, value, status))
    return wrong


def test_some_odd_values(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tried("pretrain", tmp_path, SMALL, odd_settings(PretrainConfig)[::29], capsys) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "train-tokenizer"])
def test_no_odd_value_gives_a_traceback(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    pairs, text = odd_settings(PretrainConfig), SMALL
    if command == "train-tokenizer":  # what it has beyond pretrain
        pairs, text = [p for p in odd_settings(TrainTokenizerConfig) if p[0].startswith("tokenizer.")], TOKENIZER
    assert tried(command, tmp_path, text, pairs, capsys) == []
