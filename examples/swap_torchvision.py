# SPDX-License-Identifier: Apache-2.0
"""A training script of the usual shape, written for torchvision, with the one line that changes.

Everything else is torch and torchvision: the data set, the transforms, the loader, the loop.
``channels_last`` and autocast are as worth having with torchvision's networks as with these.

Data: a folder for torchvision's ImageFolder, with ``train`` and ``test`` in it. Without ``--data``:
ten kinds of clothes, a stand-in (``stand_ins.py``). Prints a line an epoch.

    python examples/swap_torchvision.py --quick
    python examples/swap_torchvision.py --data DIR --epochs 10
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from stand_ins import stand_in
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastresnet.models import resnet18  # was: from torchvision.models import resnet18


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: a stand-in")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.epochs, arguments.size, arguments.workers = 1, 64, 0

    data = arguments.data or stand_in("butterflies", small=arguments.quick)
    pixels = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    augment = v2.Compose([*pixels, v2.RandomResizedCrop(arguments.size), v2.RandomHorizontalFlip()])
    whole = v2.Compose([*pixels, v2.Resize((arguments.size, arguments.size))])
    train_set = ImageFolder(str(data / "train"), transform=augment)
    test_set = ImageFolder(str(data / "test"), transform=whole)
    loader = DataLoader(train_set, 32, shuffle=True, num_workers=arguments.workers)
    test_loader = DataLoader(test_set, 32, num_workers=arguments.workers)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = resnet18(num_classes=len(train_set.classes))
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.05, total_steps=arguments.epochs * len(loader)
    )
    criterion = nn.CrossEntropyLoss()

    for epoch in range(1, arguments.epochs + 1):
        begin, total = time.perf_counter(), 0.0
        model.train()
        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = criterion(model(images), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(labels)
        seconds = time.perf_counter() - begin

        model.eval()
        right = 0
        with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16):
            for images, labels in test_loader:
                images = images.to(device, memory_format=torch.channels_last)
                right += int((model(images).argmax(1).cpu() == labels).sum())
        print(
            f"epoch {epoch}/{arguments.epochs}  train loss {total / len(train_set):.4f}  "
            f"test acc {right / len(test_set):.2%}  {len(train_set) / seconds:.0f} images/s"
        )


if __name__ == "__main__":
    main()
