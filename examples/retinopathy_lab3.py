# SPDX-License-Identifier: Apache-2.0
"""System B: the same photographs of eyes at two sizes, and a last layer that sees where things are.

The network of this report ends, on images of 512 x 512, in means over 7 x 7 places and a linear
layer of 51,200 inputs. It trains in batches of 4 on pixels in -1..1: a ResNet-18 for 10 epochs, at
a learning rate of 1e-4 from scratch and of 1e-5 from pretrained weights, or a ResNet-50 for 8.

Data: as in ``retinopathy.py``, also the stand-in.

Each size is a run in a folder of its own below ``--output``, with its ``report.html``;
``compare.html`` beside them has their curves and figures in one. Given again, the example goes on
where it was stopped.

    python examples/retinopathy_lab3.py --quick
    python examples/retinopathy_lab3.py --data DIR
    python examples/retinopathy_lab3.py --data DIR --pretrained ResNet18_Weights.IMAGENET1K_V1
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

QUICK = ("schedule.epochs=1", "data.batch_size=16", "timed_steps=0", "tensorboard=false")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--depth", type=int, choices=(18, 50), default=18, help="of the ResNet")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="PX", help="default: 512 128")
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: a stand-in")
    parser.add_argument("--pretrained", metavar="WEIGHTS", help="torchvision's name, or a file")
    parser.add_argument("--output", type=Path, default=Path("runs", "lab3"), metavar="DIR")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    arguments = parser.parse_args(argv)

    sizes = arguments.sizes or ((64, 32) if arguments.quick else (512, 128))
    settings = [*(QUICK if arguments.quick else ())]
    if arguments.pretrained:
        settings += [f"model.pretrained={arguments.pretrained}", "optim.lr=1e-5"]
    settings += arguments.settings
    data = arguments.data or stand_in("retinopathy", small=arguments.quick)

    folders = [arguments.output / f"{size}px" for size in sizes]
    for size, folder in zip(sizes, folders, strict=True):
        recipe = RECIPES[f"retinopathy-lab3-resnet{arguments.depth}"]()
        recipe = apply_overrides(recipe, [f"augment.size={size}", *settings])
        train_recipe(recipe, open_data(recipe, data), folder=folder, resume=is_resumable(folder))

    page = write_comparison(arguments.output, compare_runs([read_run(f) for f in folders]))
    print(f"both sizes: {page}")


if __name__ == "__main__":
    main()
