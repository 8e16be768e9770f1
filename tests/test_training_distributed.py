"""Two processes against one; each test starts real processes that talk over gloo."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from darefine_qupath.cli import main
from darefine_qupath.devices import choose_device
from darefine_qupath.errors import TileError, TrainingError, TrainingStoppedError
from darefine_qupath.models import ModelConfig
from darefine_qupath.training import RunFolder
from darefine_qupath.training import distributed as distributed_module
from darefine_qupath.training.distributed import ProcessGroup, join_process_group
from tests.training_toy import toy_config, toy_data, toy_train

ROOT = Path(__file__).parent.parent

CONFIG = toy_config(epochs=1, batch_size=4, loss="ce-dice", freeze_batch_norm="yes", class_weights="inverse")
MODEL = ModelConfig(network="refinenet", slice_encoder="resnet18", width=8, num_classes=3, dropout=0.0)

WORKER = """
import os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
from darefine_qupath.devices import choose_device
from darefine_qupath.errors import TileError, TrainingStoppedError
from darefine_qupath.training.distributed import join_process_group
from tests.test_training_distributed import run
out = Path(sys.argv[1])
run(out / "two")
try:
    run(out / "stopped", progress=lambda progress: progress.step == 1 and os.kill(os.getpid(), 15))
except TrainingStoppedError as error:
    print("STOPPED", error)
run(out / "stopped", resume=True)
unsynchronised, no_sync = [], DistributedDataParallel.no_sync
DistributedDataParallel.no_sync = lambda self: unsynchronised.append(1) or no_sync(self)
run(out / "parts", grad_accum_steps=2)
print("PARTS", len(unsynchronised))
group = join_process_group("cpu")
try:
    with group.fail_together():
        if group.rank == 1:
            raise TileError("tile 3 is damaged")
except Exception as error:
    print(type(error).__name__, error)
print("MAIN", group.value_of_main(7.5 + group.rank))
"""

# Clocks that stand still (a state is never due) and that leap (always due), on one process or the other.
CLOCKS = """
import faulthandler, itertools, os, sys, torch
faulthandler.dump_traceback_later(100, exit=True)
torch.set_num_threads(1)
from pathlib import Path
from types import SimpleNamespace
from darefine_qupath.devices import choose_device
from darefine_qupath.errors import TrainingStoppedError
from darefine_qupath.training import trainer
from tests.training_toy import toy_config, toy_train
rank, taken_step, ended = int(os.environ["RANK"]), trainer.Stepper.train_on, {}
stopped, leaping = {"rank": None, "step": None}, {"rank": None}
ticks = itertools.count()
trainer.time = SimpleNamespace(monotonic=lambda: 3600.0 * next(ticks) if rank == leaping["rank"] else 0.0)
def train_on(self, *given, **named):
    if (rank, self.step) == (stopped["rank"], stopped["step"]):
        os.kill(os.getpid(), 15)
    outcome = taken_step(self, *given, **named)
    ended["step"] = self.step
    return outcome
trainer.Stepper.train_on = train_on
for leaping["rank"] in (0, 1):
    for stopped["rank"], stopped["step"] in itertools.product((0, 1), range(6)):
        out = Path(sys.argv[1]) / "{}-{}-{}".format(leaping["rank"], stopped["rank"], stopped["step"])
        try:
            toy_train(out, toy_config(), val_data=None)
        except TrainingStoppedError:
            pass
        print(stopped["step"], ended["step"], sep="-")
"""


# Batch norm and dropout are those of each process; without them the processes are one.
SETTINGS = """
[classes]
names = ["Normal", "Benign", "In situ", "Invasive"]
unlabelled = "Normal"
[tiles]
input_px = 32
slice_um = 128
context_um = 640
stride_um = 128
[model]
network = "refinenet"
slice_encoder = "resnet18"
width = 8
dropout = 0.0
[train]
preset = "modern"
epochs = 1
batch_size = 4
samples_per_epoch = 12
freeze_batch_norm = "yes"
workers = 0
"""


def run(out: Path, *, grad_accum_steps: int = 1, **changes: object) -> None:
    toy_train(out, replace(CONFIG, grad_accum_steps=grad_accum_steps), model=MODEL, train_data=toy_data(17), **changes)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_two(*command: str) -> list[str]:
    """Start two Python processes as torchrun would; return what each printed."""
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **common, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [printed for printed, _ in outputs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folder with the runs ``one``, ``two``, ``stopped`` and ``parts``, and what the two processes printed."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "one")
    return folder, start_two("-c", WORKER, str(folder))


Runs = tuple[Path, list[str]]


def test_two_processes_have_the_loss_of_one(runs: Runs) -> None:
    one, two = (RunFolder(runs[0] / name).records()[0] for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert sum(map(sum, two["confusion"])) == sum(map(sum, one["confusion"]))


def test_two_processes_have_the_weights_of_one(runs: Runs) -> None:
    one, two = (load_file(runs[0] / name / "last.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(runs: Runs) -> None:
    assert all(text.startswith("STOPPED") for text in runs[1])
    whole, parts = (load_file(runs[0] / name / "last.safetensors") for name in ("two", "stopped"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_two_processes_that_accumulate_have_the_weights_of_one_and_exchange_gradients_once(runs: Runs) -> None:
    one, parts = (load_file(runs[0] / name / "last.safetensors") for name in ("one", "parts"))
    for name, tensor in one.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-5)
    # Five steps of two parts; the gradients of the first part stay where they are.
    assert all("PARTS 5\n" in text for text in runs[1])


def test_what_fails_in_one_process_ends_all(runs: Runs) -> None:
    assert "TrainingError Another process could not go on; its own message says why\n" in runs[1][0]
    assert "TileError tile 3 is damaged\n" in runs[1][1]


def test_the_first_process_decides(runs: Runs) -> None:
    assert all(text.endswith("MAIN 7.5\n") for text in runs[1])


def test_processes_whose_clocks_disagree_stop_at_the_same_step(tmp_path: Path) -> None:
    first, second = (text.split() for text in start_two("-c", CLOCKS, str(tmp_path)))
    assert first == second
    for word in first:
        asked, ended = map(int, word.split("-"))
        # Asked for while a step is under way: the next one tells the others, and one more may be under way by then.
        assert min(asked + 1, 6) <= ended <= min(asked + 3, 6)
    assert len(first) == 24


def test_two_processes_of_the_command_line_have_the_loss_of_one(tmp_path: Path) -> None:
    (tmp_path / "darefine.toml").write_text(SETTINGS)
    project = shutil.copytree(ROOT / "projects" / "tiny", tmp_path / "project")
    command = ["train", str(project), "--settings", str(tmp_path / "darefine.toml"), "-o"]
    with pytest.raises(SystemExit) as ended:
        main([*command, str(tmp_path / "one")])
    printed = start_two("-c", "from darefine_qupath.cli import main; main()", *command, str(tmp_path / "two"))
    one, two = (RunFolder(tmp_path / name).records()[0] for name in ("one", "two"))
    assert ended.value.code == 0
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert [bool(text) for text in printed] == [True, False]


def test_one_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    group = join_process_group("cpu")
    assert (group.rank, group.size, group.is_main) == (0, 1, True)
    assert group.sum(torch.tensor(3)).item() == 3


def test_broken_environments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(TrainingError, match="not a number"):
        join_process_group("cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TrainingError, match="could not join the others"):
        join_process_group("cpu")


PEER = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")


def test_a_lost_process_is_told_in_one_line(tmp_path: Path) -> None:
    two = ProcessGroup(rank=0, size=2)
    with (
        pytest.raises(TrainingError, match=r"Process 0 of 2 has lost another one.*--resume .*run$"),
        two.report_lost_peers(tmp_path / "run"),
    ):
        raise PEER
    with pytest.raises(RuntimeError, match="something else"), two.report_lost_peers(tmp_path):
        raise RuntimeError("something else")
    with pytest.raises(RuntimeError, match="Connection reset"), ProcessGroup().report_lost_peers(tmp_path):
        raise PEER


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (TrainingError("no memory"), []),
        (TileError("damaged"), []),
        (KeyboardInterrupt(), []),
        (TrainingStoppedError("stop"), [1]),
    ],
)
def test_a_process_that_fails_on_a_gpu_does_not_wait_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, parts: list[int]
) -> None:
    farewells = [1]
    monkeypatch.setattr(distributed_module.atexit, "unregister", lambda _: farewells.clear())
    with pytest.raises(type(error)), ProcessGroup(size=2, device=torch.device("cuda", 0)).report_lost_peers(tmp_path):
        raise error
    assert farewells == parts


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"cannot share cuda:0; with --device cuda each takes its own"):
        join_process_group("cuda:0")


def test_devices_by_name() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
