# SPDX-License-Identifier: Apache-2.0
"""What torchrun runs: a ResNet-18 on CIFAR-10, trained by several processes as by one.

Each process takes its share of every step's images; gradients are averaged and the statistics of
batch norm are those of all. The batch size is that of one process: two processes with 64 images
each train as one with 128. The first process writes and prints. ``fastresnet train`` does the same
under torchrun.

Data and output: as in ``cifar10.py``, also the stand-in. On GPUs each process takes one (NCCL), on
CPUs they share the machine (gloo): set OMP_NUM_THREADS to the processors that each is to have.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 examples/several_processes.py --quick
    torchrun --nproc-per-node=8 examples/several_processes.py --data DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from stand_ins import stand_in

from fastresnet.data import load_cifar10
from fastresnet.runs import train_recipe
from fastresnet.train import RECIPES, apply_overrides
from fastresnet.train.distributed import process_group
from fastresnet.train.precision import resolve_device
from fastresnet.train.run_directory import is_resumable

QUICK = ("schedule.epochs=1", "schedule.sizes=16", "tensorboard=false")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: a stand-in")
    parser.add_argument("--output", type=Path, default=Path("runs", "processes"), metavar="DIR")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    arguments = parser.parse_args(argv)

    settings = ["data.batch_size=64", *(QUICK if arguments.quick else ()), *arguments.settings]
    recipe = apply_overrides(RECIPES["cifar10-resnet18"](), settings)
    with process_group(resolve_device(recipe.device)) as world:
        resume = is_resumable(arguments.output)
        if world.writes and arguments.data is None:
            stand_in("cifar10", small=arguments.quick)
        world.barrier()  # the others wait until the files are there
        dataset = load_cifar10(arguments.data or stand_in("cifar10", small=arguments.quick))
        result = train_recipe(recipe, dataset, folder=arguments.output, resume=resume, world=world)
        if world.writes:
            accuracy = result.evaluation.accuracy
            print(f"{world.size} processes: {accuracy:.2%} of the test images")


if __name__ == "__main__":
    main()
