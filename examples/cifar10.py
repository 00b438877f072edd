# SPDX-License-Identifier: Apache-2.0
"""System E: CIFAR-10, first with two convolutions, then with a ResNet-18.

Data: ``cifar-10-python.tar.gz`` or ``cifar-10-binary.tar.gz``, packed or unpacked, in one folder.
Without ``--data``: Fashion-MNIST in CIFAR-10's files, a stand-in (``stand_ins.py``).

Both tasks of the laboratory are done, or one of them: a summary of the network with its parameters
and FLOPs (as the package thop counts: 60,554 and 5,840,896 of the first network), a line an epoch,
the weights of the best epoch reloaded for the test, and in ``--output`` the curves of loss and
accuracy, both confusion matrices and ``report.html``. The laboratory's experiments are a ``--set``
away; ``fastresnet compare`` puts the runs beside each other:

    python examples/cifar10.py --quick
    python examples/cifar10.py --data DIR
    python examples/cifar10.py --task 2 --output runs/step --set schedule.kind=step \
        --set schedule.milestones=30,45
    python examples/cifar10.py --task 2 --output runs/plain --set augment.hflip=0 \
        --set augment.crop=none
    fastresnet compare runs/cifar10/task2 runs/step/task2 runs/plain/task2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from stand_ins import stand_in

from fastresnet.data import load_cifar10
from fastresnet.models import build_model, summarize
from fastresnet.runs import train_recipe
from fastresnet.train import RECIPES, apply_overrides
from fastresnet.train.run_directory import is_resumable

TASKS = {1: "cifar10-simplecnn", 2: "cifar10-resnet18"}
QUICK = ("schedule.epochs=1", "data.batch_size=32", "timed_steps=0", "tensorboard=false")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", type=int, choices=TASKS, action="append", help="default: both")
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: a stand-in")
    parser.add_argument("--output", type=Path, default=Path("runs", "cifar10"), metavar="DIR")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    arguments = parser.parse_args(argv)

    settings = [*(QUICK if arguments.quick else ()), *arguments.settings]
    dataset = load_cifar10(arguments.data or stand_in("cifar10", small=arguments.quick))
    for task in arguments.task or TASKS:
        recipe = apply_overrides(RECIPES[TASKS[task]](), settings)
        print(f"task {task}: {recipe.model.name}")
        print(summarize(build_model(recipe.model.name), (3, 32, 32)))
        folder = arguments.output / f"task{task}"
        result = train_recipe(recipe, dataset, folder=folder, resume=is_resumable(folder))
        print(f"task {task}: {result.evaluation.accuracy:.2%} of the test images\n")


if __name__ == "__main__":
    main()
