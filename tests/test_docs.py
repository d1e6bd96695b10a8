"""README and docs say what is true: the commands parse, the recipes load, the files and names exist."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cae_fast.cli import COMMANDS
from cae_fast.commands import classify, pretrain, train_tokenizer
from cae_fast.settings import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md")]
PAGES += sorted(ROOT.glob("docs/*.md"))
SCHEMAS = {"pretrain": pretrain.PretrainConfig, "classify": classify.ClassifyConfig}
SCHEMAS |= {"train-tokenizer": train_tokenizer.TrainTokenizerConfig, "estimate": pretrain.PretrainConfig}


def code_lines(page: Path) -> list[str]:
    """Lines of fenced and indented blocks, continued lines joined, without comments."""
    text = page.read_text().replace("\\\n", " ")
    fenced = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    indented = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in fenced + indented]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every call of the program, also through a launcher."""
    found = []
    for page in PAGES:
        inline = re.findall(r"`(cae-fast [^`]+)`", page.read_text())
        for line in code_lines(page) + inline:
            for part in re.split(r"&&", line):
                match = re.search(r"(?:cae-fast|(?:-m|--module) cae_fast) (.*)", part)
                if match:
                    found.append((str(page.relative_to(ROOT)), shlex.split(match[1].replace("...", ""))))
    return found


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_a_command_has_known_names_and_settings(page, words):
    name, arguments = words[0], words[1:]
    if name == "COMMAND" or name.startswith("--"):
        return
    assert name in COMMANDS, page
    if name in SCHEMAS:
        recipes = [word for word in arguments if word.endswith(".yaml")]
        assert all((ROOT / recipe).is_file() for recipe in recipes), page
        overrides = [word for word in arguments if re.match(r"[a-z_]+\.[a-z_]+=", word)]
        load_config(SCHEMAS[name], str(ROOT / recipes[0]) if recipes else None, overrides)
    for flag in (word for word in arguments if word.startswith("--")):
        assert (
            f'"{flag}"'
            in (ROOT / f"cae_fast/commands/{name.replace('-', '_')}.py").read_text()
            + (ROOT / "cae_fast/commands/convert_cae.py").read_text()
            or flag == "--help"
        ), (page, flag)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:cae_fast|kernels|benchmarks|configs|docs|tests)/[\w./-]+)", text):
        path = path.rstrip(".").partition(":")[0]
        assert re.search(r"DEVICE|my_op", path) or (ROOT / path).exists(), path
    for module in re.findall(r"python -m (benchmarks(?:\.\w+)+|cae_kernels\.\w+)", text):
        assert importlib.util.find_spec(module), module
    for anchor_file, anchor in re.findall(r"\]\(([\w/.]+\.md)#([\w-]+)\)", text):
        headings = re.findall(r"^#+ (.*)$", (page.parent / anchor_file).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


def test_names_in_backquotes_exist():
    """`module.py:name` in the pages of developers."""
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs/architecture.md"):
        for path, name in re.findall(r"`((?:[\w]+/)*\w+\.py):(\w+)`", page.read_text()):
            texts = [file.read_text() for folder in ("cae_fast", "kernels") for file in (ROOT / folder).rglob(path)]
            if (ROOT / path).is_file():
                texts.append((ROOT / path).read_text())
            assert any(re.search(rf"^\s*(?:def|class) {name}\b", text, re.MULTILINE) for text in texts), (path, name)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 125


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_every_command_works(name):
    done = subprocess.run([sys.executable, "-m", "cae_fast", name, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: cae-fast {name}")
