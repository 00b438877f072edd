# SPDX-License-Identifier: Apache-2.0
"""The ``fastresnet`` command: its arguments, and one module with a ``run`` for each sub-command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from fastresnet import __version__
from fastresnet.data.datasets.registry import LAYOUTS
from fastresnet.train.recipes import RECIPES

# The modules that pip install "fastresnet[train]" brings.
_TRAIN_EXTRA = ("jinja2", "matplotlib", "rich", "safetensors", "torchmetrics")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="fastresnet", description="Train residual networks with fused kernels."
    )
    parser.add_argument("--version", action="version", version=f"fastresnet {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, evaluate and report one recipe")
    train.add_argument("recipe", choices=sorted(RECIPES), metavar="RECIPE", help=", ".join(RECIPES))
    train.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the run's files (default: runs/RECIPE-TIME)",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --output where it was saved last",
    )
    train.add_argument(
        "--pretrained",
        metavar="WEIGHTS",
        help="start from a file of weights, or from torchvision's, as in "
        "ResNet18_Weights.IMAGENET1K_V1",
    )
    _add_run_options(
        train,
        overrides="change a setting of the recipe, as in --set optim.lr=0.05; may be repeated",
        data="where the data set's files are, or go",
    )

    summary = commands.add_parser(
        "summary", help="show a network's layers, output shapes, parameters and operations"
    )
    summary.add_argument("model", metavar="MODEL", help="a factory of fastresnet.models")
    summary.add_argument(
        "--input",
        type=_image_shape,
        required=True,
        metavar="CxHxW",
        help="channels, height and width of an image, as in 3x32x32",
    )
    summary.add_argument(
        "--classes", type=_positive, metavar="N", help="width of the output (default: the model's)"
    )
    evaluation = commands.add_parser("eval", help="evaluate the best weights of a run")
    evaluation.add_argument(
        "run", type=Path, metavar="RUN|WEIGHTS", help="a run's folder, or its best.safetensors"
    )
    evaluation.add_argument(
        "--part",
        choices=("train", "validation", "test"),
        default="test",
        help="the part of the data set (default: test)",
    )
    evaluation.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for predictions and confusion matrix"
    )
    _add_run_options(
        evaluation,
        overrides="change a setting of the run, as in --set evaluation.flips=true",
        data="the data set's folder",
    )

    _add_dataset(commands.add_parser("dataset", help="check, describe or prepare a data set"))
    compare = commands.add_parser(
        "compare", help="set runs beside each other, or train a recipe with settings varied"
    )
    compare.add_argument(
        "runs", nargs="+", metavar="RUN|RECIPE", help="folders of runs, or one recipe to train"
    )
    compare.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=VALUE,VALUE",
        help="train the recipe with each value, as in --vary optim.lr=0.1,0.05; several --vary "
        "give every combination",
    )
    compare.add_argument(
        "--seeds", type=_positive, metavar="N", help="train each combination with N seeds"
    )
    compare.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the comparison and the runs trained for it; given again, what is "
        "finished is not repeated (default: runs/compare-RECIPE, or runs/compare-TIME)",
    )
    _add_run_options(
        compare,
        overrides="change a setting of all runs that are trained",
        data="where the data set's files are, or go",
    )

    commands.add_parser("info", help="show versions, what was built and which kernels are active")
    return parser


def _add_run_options(parser: argparse.ArgumentParser, *, overrides: str, data: str) -> None:
    """What every command has that loads images into a recipe's network; the texts say what for."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="overrides",
        help=overrides,
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help=data)
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads to use")


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        action.add_argument("data", metavar="DIR", help="the data set's folder")
        action.add_argument(
            "--layout",
            choices=sorted(LAYOUTS),
            metavar="LAYOUT",
            help=f"how it lies there (default: as it is recognised): {', '.join(LAYOUTS)}",
        )
        action.add_argument(
            "--threads", type=_positive, metavar="N", help="threads (default: one a processor)"
        )
        return action

    check = add("check", "look at every label, file and header, and list all problems")
    check.add_argument("--full", action="store_true", help="decode every image; find equal files")
    check.add_argument("--json", action="store_true", help="print the report as JSON")

    stats = add("stats", "count labels and sizes; compute class weights, mean and deviation")
    stats.add_argument(
        "--sample",
        type=_positive,
        metavar="N",
        help="training images whose pixels are looked at (default: 1000 files, or all in memory)",
    )
    stats.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    stats.add_argument("--plot", type=Path, metavar="PNG", help="draw the figures into this file")
    stats.add_argument("--json", action="store_true", help="print the figures as JSON")

    prepare = add("prepare", "write a copy at the size of training, once for all epochs")
    prepare.add_argument(
        "output", type=Path, metavar="OUT", help="folder for the copy; begun before: goes on"
    )
    prepare.add_argument(
        "--size", type=_positive, default=512, metavar="PX", help="what training sees (512)"
    )
    prepare.add_argument(
        "--headroom",
        type=float,
        default=1.25,
        metavar="X",
        help="the shorter side becomes size times this (1.25), to rotate and crop from",
    )
    prepare.add_argument(
        "--crop-border", action="store_true", help="cut the black frame off photographs of eyes"
    )
    prepare.add_argument(
        "--square", action="store_true", help="keep only the central square, as crop=center sees"
    )
    prepare.add_argument(
        "--local-average",
        action="store_true",
        help="subtract the local average colour of photographs of eyes (Graham 2015)",
    )
    prepare.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="bad images: fail at the end (raise), or leave them and their labels out (skip)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for a run that failed, 2 for bad input."""
    arguments = build_parser().parse_args(argv)
    try:
        command = importlib.import_module(f"fastresnet.cli.{arguments.command}")
        return command.run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _TRAIN_EXTRA:
            raise
        return _fail(2, f"expected the package {package}: pip install 'fastresnet[train]'")
    except ValueError as error:
        # ValueError is what configuration, data sets and checkpoints raise for bad input; its
        # message says what was expected. Anything else is a defect and keeps its traceback.
        return _fail(2, str(error))
    except FloatingPointError as error:
        return _fail(1, str(error))


def _fail(status: int, message: str) -> int:
    print(f"fastresnet: error: {message}", file=sys.stderr)
    return status


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _image_shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected CxHxW as in 3x32x32, got {text!r}")
    return tuple(map(int, sizes))
