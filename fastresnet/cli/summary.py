# SPDX-License-Identifier: Apache-2.0
"""``fastresnet summary``: a network's layers, output shapes, parameters and operations."""

from __future__ import annotations

import argparse

import torch

from fastresnet.models import build_model, summarize

_CONVENTIONS = """
Of one image. Multiply-adds: of convolutions and linear layers; torch.utils.flop_counter calls twice
as many FLOPs. FLOPs (thop): as the package thop 0.1.1 counts: a multiply-add is 1, a batch norm 4 a
value of its input, an average pool 1 a value of its output, an adaptive one its window and 1;
biases, activations and max-pools are nothing."""


def run(arguments: argparse.Namespace) -> int:
    """Prints the table and what its columns count."""
    with torch.device("meta"):  # shapes are enough: no memory, no initial values
        model = build_model(
            arguments.model, num_classes=arguments.classes, in_channels=arguments.input[0]
        )
    print(summarize(model, arguments.input))
    print(_CONVENTIONS)
    return 0
