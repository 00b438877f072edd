# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning a ResNet from pretrained weights: the new last layer alone, then everything.

Weights: torchvision's, by the name of a member of its enums, which are downloaded; or a file of a
``state_dict``, of ``torch.save`` or safetensors, such as the ``best.safetensors`` of a run. The
last layer is left as it was initialised where the number of classes is another.

Data: any layout that ``fastresnet.data.open_dataset`` recognises, with a test part or without.
Without ``--data``: ten kinds of clothes, a stand-in (``stand_ins.py``). Prints which weights were
left out and a line an epoch, and writes the ``state_dict`` to ``--output``.

    python examples/fine_tune.py --data DIR
    python examples/fine_tune.py --data DIR --network resnet50 --weights resnet50.pt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from stand_ins import stand_in
from torch import nn

from fastresnet.data import Augment, Loader, make_loader, open_dataset
from fastresnet.models import build_model, load_pretrained

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--network", default="resnet18", metavar="RESNET")
    parser.add_argument("--weights", default="ResNet18_Weights.IMAGENET1K_V1", metavar="NAME|FILE")
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: a stand-in")
    parser.add_argument("--epochs", type=int, nargs=2, default=(1, 4), metavar=("HEAD", "ALL"))
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--output", type=Path, default=Path("fine-tuned.pt"), metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.epochs, arguments.size = (1, 1), 64

    dataset = open_dataset(arguments.data or stand_in("butterflies", small=arguments.quick))
    augment = Augment(size=arguments.size, hflip=0.5, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = make_loader(dataset.train, augment, 32, training=True, drop_last=True, device=device)
    test_loader = make_loader(dataset.test, augment, 32, training=False, device=device)

    torch.manual_seed(0)
    model = build_model(arguments.network, num_classes=len(dataset.classes))
    left_out = load_pretrained(model, arguments.weights)
    print(f"not loaded from {arguments.weights}: {', '.join(left_out) or 'nothing'}")
    model.to(device, memory_format=torch.channels_last)

    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    for epoch in range(arguments.epochs[0]):
        model.eval()  # batch norm keeps the statistics that the weights were trained with
        loss = train(model, loader, lr=1e-2)
        print(f"last layer, epoch {epoch + 1}: {report(model, loss, test_loader)}")

    model.requires_grad_(True)
    for epoch in range(arguments.epochs[1]):
        model.train()
        loss = train(model, loader, lr=1e-3)
        print(f"everything, epoch {epoch + 1}: {report(model, loss, test_loader)}")

    torch.save(model.state_dict(), arguments.output)
    print(f"weights in {arguments.output}")


def train(model: nn.Module, loader: Loader, *, lr: float) -> float:
    """One epoch of what is to be trained; returns the mean loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
    total = 0.0
    for images, labels in loader:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


@torch.inference_mode()
def report(model: nn.Module, loss: float, loader: Loader) -> str:
    """The line of an epoch."""
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return f"train loss {loss:.4f}  test acc {right / loader.images_per_epoch:.2%}"


if __name__ == "__main__":
    main()
