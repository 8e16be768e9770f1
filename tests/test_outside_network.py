"""A network of another package: registered by its entry point, it goes through every command like our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

NETWORK = '''
"""One 1x1 convolution over the pixels of the slice."""

from torch import nn

from darefine_qupath.models import SegmentationNetwork, register_network


class PixelNet(SegmentationNetwork):
    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Conv2d(3, config.num_classes, 1)

    @property
    def encoders(self):
        return {}

    def decode(self, slice_B3HW, context, index_B=None, box_B4=None):
        return self.layer(slice_B3HW)


register_network("pixelnet", PixelNet, title="PixelNet", encoders=())
'''

COMMANDS = """
import contextlib, sys
from darefine_qupath.cli import main

project, run = sys.argv[1:]
tiles = ["--input-px", "32", "--slice-um", "256", "--context-um", "512", "--stride-um", "256", "--on-the-fly"]
short = ["--epochs", "1", "--batch-size", "2", "--set", "samples_per_epoch=4", "--device", "cpu"]
for command in (
    ["train", project, "-o", run, "--network", "pixelnet", "--input", "single", *tiles, *short],
    ["show", run + "/model.safetensors"],
    ["predict", project, "--model", run + "/model.safetensors", "--device", "cpu", "--engine", "embedded", "--json"],
):
    try:
        main(command)
    except SystemExit as end:
        if end.code:
            raise
"""


def test_a_network_from_outside_is_trained_shown_and_predicts(tmp_path: Path) -> None:
    package = tmp_path / "site"
    (package / "pixelnet-1.0.dist-info").mkdir(parents=True)
    (package / "pixelnet.py").write_text(NETWORK)
    (package / "pixelnet-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pixelnet\nVersion: 1.0\n"
    )
    (package / "pixelnet-1.0.dist-info" / "entry_points.txt").write_text("[darefine.models]\npixelnet = pixelnet\n")
    project = shutil.copytree(ROOT / "projects" / "tiny", tmp_path / "project")
    path = os.pathsep.join([str(package), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(project), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "PixelNet" in done.stdout
    said = json.loads(done.stdout[done.stdout.index("\n{") :])
    assert len(said["images"]) == 3
