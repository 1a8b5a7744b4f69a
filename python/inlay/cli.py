"""The ``inlay`` command: ``info``, ``inspect`` and ``demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from inlay._console import CommandError, first_line
from inlay._info import info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 the demo's numbers disagree, 2 a mistake in the call."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except CommandError as error:
        print(f"inlay {options.command}: {error}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inlay", description="Fused C++/CUDA ops for Hugging Face models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    show = commands.add_parser("info", help="what is installed: libraries, build, CPU kernels, GPUs, ops")
    show.set_defaults(run=_info)

    inspect = commands.add_parser("inspect", help="what inlay.patch would replace in a model, without its weights")
    inspect.add_argument("model", metavar="MODEL_ID_OR_PATH", help="a Hugging Face model id or a local folder")
    inspect.set_defaults(run=_inspect)

    demo = commands.add_parser(
        "demo",
        help="train and generate with and without Inlay, and compare",
        description="Trains a Qwen3.5 hybrid model on Python's own documentation and generates text with it, with and "
        "without Inlay, and compares losses, tokens, speed and memory. Nothing is downloaded. Exit status 1 if the "
        "numbers disagree.",
    )
    which = demo.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="ID_OR_PATH", help="generate with this checkpoint, and train nothing")
    which.add_argument("--moe", action="store_true", help="a mixture of experts: Qwen3.5-MoE instead of Qwen3.5")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    demo.add_argument("--steps", type=_positive, help="training steps")
    demo.add_argument("--batch-size", type=_positive, help="sequences in a training step")
    demo.add_argument("--sequence-length", type=_positive, help="tokens in a training sequence")
    demo.add_argument("--prompt", help="text to continue; default: a passage of the documentation")
    demo.add_argument("--new-tokens", type=_positive, help="tokens to generate")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--ops", metavar="OP[,OP...]", help="replace only these; default: all that Inlay has")
    demo.add_argument("--quick", action="store_true", help="a very small model for a few steps: seconds, for tests")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), metavar="FOLDER", help="default: %(default)s")
    demo.set_defaults(run=_demo)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _info(options: argparse.Namespace) -> int:
    print(info())
    return 0


def _inspect(options: argparse.Namespace) -> int:
    _need_transformers()
    _need_folder(options.model)
    from inlay.hf.inspect import inspect_model

    try:
        print(inspect_model(options.model))
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(
            f"{options.model}: {first_line(error)}",
            "give the folder of a saved model, or a model id that can be reached from here",
        ) from error
    return 0


def _demo(options: argparse.Namespace) -> int:
    _need_transformers()
    if options.model is not None:
        _need_folder(options.model)
    from inlay.demo.run import run

    return run(options)


def _need_transformers() -> None:
    if find_spec("transformers") is None:
        raise CommandError("the package transformers is not installed", "pip install 'inlay[demo]'")


def _need_folder(model: str) -> None:
    """Refuse what can only be a path, not a model id ("name" or "owner/name"), where no folder has that path."""
    path = Path(model)
    if (path.is_absolute() or model.startswith(".") or len(path.parts) > 2) and not path.is_dir():
        raise CommandError(f"there is no folder {model}", "give the folder of a saved model, or a model id")
