# SPDX-License-Identifier: Apache-2.0
"""System A: how far diabetic retinopathy has gone, from photographs of eyes, with a ResNet.

Data: Kaggle's Diabetic Retinopathy Detection (2015) in one folder, the photographs ``NAME.jpeg``
anywhere in it, with ``train_img.csv``, ``train_label.csv``, ``test_img.csv``, ``test_label.csv`` or
with Kaggle's own ``trainLabels.csv``. Photographs of full size are best made small once, by
``fastresnet dataset prepare DIR OUT --crop-border``. Without ``--data``: photographs of solar cells
with the grade of their defects, a stand-in (``stand_ins.py``).

Three quarters of the eyes are healthy, so that accuracy says little. What is printed at the end is
therefore quadratic weighted kappa, which is 0 for calling everything one grade, and the recall of
each grade. ``--output`` gets the best weights, curves, both confusion matrices and ``report.html``;
given again, the run goes on where it was saved last.

    python examples/retinopathy.py --quick
    python examples/retinopathy.py --data DIR --pretrained ResNet18_Weights.IMAGENET1K_V1
    python examples/retinopathy.py --data DIR --recipe retinopathy-kappa --pretrained FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from stand_ins import stand_in

from fastresnet.runs import open_data, train_recipe
from fastresnet.train import RECIPES, apply_overrides
from fastresnet.train.run_directory import is_resumable

QUICK = ("schedule.epochs=1", "augment.size=64", "timed_steps=0", "tensorboard=false")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--recipe",
        choices=("retinopathy-resnet18", "retinopathy-resnet50", "retinopathy-kappa"),
        default="retinopathy-resnet18",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: a stand-in")
    parser.add_argument("--pretrained", metavar="WEIGHTS", help="torchvision's name, or a file")
    parser.add_argument("--output", type=Path, default=Path("runs", "retinopathy"), metavar="DIR")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the recipe, as in --set optim.lr=0.01",
    )
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    arguments = parser.parse_args(argv)

    settings = [*(QUICK if arguments.quick else ()), *arguments.settings]
    if arguments.pretrained:
        settings.append(f"model.pretrained={arguments.pretrained}")
    recipe = apply_overrides(RECIPES[arguments.recipe](), settings)
    folder = arguments.data or stand_in("retinopathy", small=arguments.quick)
    dataset = open_data(recipe, folder)
    for part, files in dataset.parts.items():
        counts = torch.bincount(files.labels, minlength=len(dataset.classes)).tolist()
        grades = ", ".join(
            f"{count} {name}" for name, count in zip(dataset.classes, counts, strict=True)
        )
        print(f"{part}: {grades}")

    output = arguments.output
    result = train_recipe(recipe, dataset, folder=output, resume=is_resumable(output))

    evaluation = result.evaluation
    kappa = "undefined" if evaluation.kappa is None else f"{evaluation.kappa:.4f}"
    print(f"quadratic weighted kappa {kappa}; accuracy {evaluation.accuracy:.2%}, of calling")
    print(f"everything the most frequent grade {evaluation.majority:.2%}")
    for name, recall in zip(dataset.classes, evaluation.recalls, strict=True):
        print(f"  recall of {name}: {'no images' if recall is None else f'{recall:.2%}'}")


if __name__ == "__main__":
    main()
