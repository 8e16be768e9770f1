#!/usr/bin/env python3
"""Draw projects/tiny anew: a QuPath project under 1 MB with every class, for the README and the tests."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from darefine_qupath.demo import make_project

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1_000_000

SETTINGS = """\
# Settings of darefine for this project. It is tiny: enough to see every command work, not to learn much from.

[classes]
names = ["Normal", "Benign", "In situ", "Invasive"]
# Everything outside the annotations is Normal here. In a sparsely annotated project leave this at "ignore".
unlabelled = "Normal"

[tiles]
# A slice of 128 um inside a context of 640 um, both seen at 64 x 64 pixels.
input_px = 64
slice_um = 128
context_um = 640
stride_um = 64

[model]
slice_encoder = "resnet18"
context_encoder = "resnet18"
# Decoder channels; 256 in the paper.
width = 16

[train]
preset = "modern"
epochs = 4
batch_size = 8
samples_per_epoch = 96
"""


def main() -> None:
    """Make the project, and refuse to leave one that is too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "projects" / "tiny")
    target = parser.parse_args().folder
    # QuPath's files hold absolute paths: made elsewhere and then moved, it names nobody's home folder, and shows that
    # a moved project opens.
    folder = Path(tempfile.gettempdir()) / "darefine-projects" / "tiny"
    for each in (folder, target):
        shutil.rmtree(each, ignore_errors=True)
    made = make_project(folder, num_train=2, num_test=1, size=(1664, 1664), seed=7, quality=30)
    (folder / "darefine.toml").write_text(SETTINGS, encoding="utf-8")
    shutil.rmtree(folder / "darefine", ignore_errors=True)  # locks and backups of its making
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.move(folder, target)
    print(f"{target / made.path.name}: {size / 1000:.0f} kB")
    if size >= LIMIT:
        raise SystemExit(f"That is over {LIMIT / 1000:.0f} kB; lower the quality or the size of the slides")


if __name__ == "__main__":
    main()
