# SPDX-License-Identifier: Apache-2.0
"""``fastresnet summary``."""

from __future__ import annotations

import pytest

from fastresnet import cli


def test_simple_cnn_has_the_reports_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["summary", "simple_cnn", "--input", "3x32x32"]) == 0
    out = capsys.readouterr().out
    (total,) = (line for line in out.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "60,554", "5,644,288", "5,840,896"]
    assert "thop 0.1.1" in out


def test_classes_and_channels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["summary", "resnet18", "--input", "1x64x64", "--classes", "5"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert rows["conv1"][2:4] == ["64x32x32", f"{64 * 49:,}"]
    assert rows["fc"][2:4] == ["5", f"{5 * 513:,}"]
    assert rows["layer1.0.conv2"][1] == "Conv2d"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alexnet", "--input", "3x32x32"], "model: expected one of resnet18, "),
        (["simple_cnn"], "required: --input"),
        (["simple_cnn", "--input", "3x32"], "expected CxHxW as in 3x32x32, got '3x32'"),
        (["simple_cnn", "--input", "0x32x32"], "expected CxHxW as in 3x32x32, got '0x32x32'"),
        (["simple_cnn", "--input", "3x64x64"], "an image that Sequential takes, got 3x64x64"),
        (["simple_cnn", "--input", "3x32x32", "--classes", "0"], "expected at least 1, got 0"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["summary", *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err
