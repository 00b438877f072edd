# SPDX-License-Identifier: Apache-2.0
"""Inference engines besides torch: each takes torch's model and runs it on the CPU.

Their packages are the extra `runtimes` of pyproject.toml. They are imported where an engine is
loaded, so that a missing one is a row that failed by that name, and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

Infer = Callable[[], Tensor]


@dataclass(frozen=True)
class Runtime:
    """load: compiles a model in evaluation mode for a batch and a dtype, on as many threads as
    torch has, and returns what infers that batch. The model and the images are float32 in NCHW.
    dtypes: those that it computes in."""

    name: str
    load: Callable[[nn.Module, Tensor, str], Infer]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def load_openvino(model: nn.Module, images: Tensor, dtype: str) -> Infer:
    import openvino

    converted = openvino.convert_model(model, example_input=images)
    converted.reshape(list(images.shape))
    settings = {
        # A processor without bfloat16 is given float32 all the same: the faster of the two there.
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    inputs = [images.numpy()]
    # Shared: images and logits are not copied on their way in and out.
    return lambda: torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])


def load_onnx_runtime(model: nn.Module, images: Tensor, dtype: str) -> Infer:
    import onnx  # noqa: F401  what torch's export is done with
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images,), path, dynamo=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


RUNTIMES = (
    Runtime("OpenVINO", load_openvino),
    # It has no bfloat16 on the CPU.
    Runtime("ONNX Runtime", load_onnx_runtime, dtypes=("float32",)),
)


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in ("onnx", "onnxruntime", "openvino"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
