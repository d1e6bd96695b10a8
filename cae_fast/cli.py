"""The `cae-fast` program: one subcommand per file of cae_fast/commands."""

import argparse
import difflib
import importlib
import logging
import sys

from cae_fast import __version__
from cae_fast.config import UserError

COMMANDS = {
    "pretrain": "pretrain a context autoencoder on a folder of images",
    "train-tokenizer": "train a discrete VAE whose codes can be a target of pretraining",
    "classify": "what an encoder knows: linear or attentive probe, k-NN, fine-tuning on labelled images",
    "convert": "turn weights of other code bases into ours and back, without running code from them",
    "index": "scan a folder of images once and write its index",
    "estimate": "memory, time and GPU-hours of a pretraining recipe on N GPUs, without a GPU",
    "doctor": "show what this machine has and which kernels run on it",
}


class LateStderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: a progress bar puts itself there, to keep below the messages."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def usage() -> str:
    rows = "\n".join(f"  {name:16s} {text}" for name, text in COMMANDS.items())
    return f"usage: cae-fast COMMAND ...\n\n{rows}\n\n`cae-fast COMMAND --help` tells more. Version {__version__}."


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 done, 2 a mistake of the user, 3 diverged, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2

    name = argv[0]
    if name == "--version":
        print(f"cae-fast {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        print(f"cae-fast: no command {name!r}; did you mean {near!r}? `cae-fast --help` lists all", file=sys.stderr)
        return 2

    # Only now its imports: `cae-fast --help` need not wait for torch.
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[LateStderr()])
    command = importlib.import_module(f"cae_fast.commands.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"cae-fast {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)

    try:
        return command.run(parser.parse_args(argv[1:]))
    except UserError as error:
        print(f"cae-fast {name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a place that may not be written or read
        logging.getLogger(__name__).debug("where it came from", exc_info=True)
        what = f"{error.filename}: " if error.filename else ""
        print(f"cae-fast {name}: {what}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cae-fast {name}: interrupted", file=sys.stderr)
        return 130
