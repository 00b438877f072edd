# SPDX-License-Identifier: Apache-2.0
"""System C: 100 kinds of butterflies and moths, a VGG19 against a ResNet-50.

The VGG19 has batch norm; the ResNet-50 has a projection in every block. Both train for 50 epochs
with SGD at a learning rate of 1e-3, on images of 224 x 224 that are flipped and turned by right
angles now and then.

Data: Kaggle's set of 100 classes, either as ``train/CLASS/NAME.jpg``, ``valid/...``, ``test/...``
or with the CSV file that lists those. Without ``--data``: ten kinds of clothes, a stand-in
(``stand_ins.py``).

Each network is a run in a folder of its own below ``--output``, with its ``report.html``;
``compare.html`` beside them has their curves and best accuracies in one. What the report compares
is a ``--set`` away:

    python examples/butterflies.py --quick
    python examples/butterflies.py --data DIR
    python examples/butterflies.py --data DIR --output runs/adam --set optim.kind=adam
    python examples/butterflies.py --data DIR --output runs/slow --set optim.lr=0.0008
    python examples/butterflies.py --data DIR --output runs/plain --set augment.hflip=0 \
        --set augment.vflip=0 --set augment.right_angles=0,0,0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from stand_ins import stand_in

from fastresnet.runs import open_data, train_recipe
from fastresnet.train import RECIPES, apply_overrides
from fastresnet.train.compare import compare_runs, write_comparison
from fastresnet.train.run_directory import is_resumable, read_run

NETWORKS = ("vgg19", "resnet50")
QUICK = ("schedule.epochs=1", "augment.size=32", "timed_steps=0", "tensorboard=false")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: a stand-in")
    parser.add_argument("--output", type=Path, default=Path("runs", "butterflies"), metavar="DIR")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    arguments = parser.parse_args(argv)

    settings = [*(QUICK if arguments.quick else ()), *arguments.settings]
    data = arguments.data or stand_in("butterflies", small=arguments.quick)

    folders = [arguments.output / name for name in arguments.networks]
    accuracies = {}
    for name, folder in zip(arguments.networks, folders, strict=True):
        recipe = apply_overrides(RECIPES[f"butterflies-{name}"](), settings)
        dataset = open_data(recipe, data)
        result = train_recipe(recipe, dataset, folder=folder, resume=is_resumable(folder))
        accuracies[name] = result.evaluation.accuracy

    for name, accuracy in accuracies.items():
        print(f"{name}: {accuracy:.2%} of the test images")
    page = write_comparison(arguments.output, compare_runs([read_run(f) for f in folders]))
    print(f"side by side: {page}")


if __name__ == "__main__":
    main()
