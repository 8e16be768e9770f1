"""The model file: round trip, refusals, interrupted writes, description, ONNX."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from darefine_qupath.checkpoint import environment as environment_module
from darefine_qupath.checkpoint import model_file as checkpoint_module
from darefine_qupath.checkpoint.describe import describe
from darefine_qupath.checkpoint.environment import environment
from darefine_qupath.checkpoint.export_onnx import export_onnx
from darefine_qupath.checkpoint.header import FORMAT, VERSION
from darefine_qupath.checkpoint.model_file import Checkpoint, load_checkpoint, read_header, save_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import CheckpointError, ModelError
from darefine_qupath.models import ModelConfig, Normalization, build_model
from darefine_qupath.tiles.spec import TileSpec
from tests.conftest import Run
from tests.stored_logits import BOX_B4, image, seeded_state

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
TINY = ModelConfig(network="unet", width=4, num_classes=2)
TILES = TileSpec(input_px=64, context_input_px=48, slice_um=100, context_um=400, stride_um=50)
PROVENANCE = {
    "data": "sha256:12ab",
    "split": {"train": ["a"], "test": ["b"]},
    "metrics": {"miou": 0.75},
    "note": "trial",
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def a_checkpoint(config: ModelConfig = TINY, **fields: Any) -> Checkpoint:  # noqa: ANN401
    names = tuple("abcdefgh"[: config.num_classes])
    with torch.device("meta"):
        template = build_model(config).state_dict()
    state = {name: tensor.clone() for name, tensor in seeded_state_of(template).items()}
    given: dict[str, Any] = {
        "state": state,
        "model": config,
        "tiles": TILES,
        "classes": ClassMap(names=names, sources={"old a": "a"}),
        "normalization": Normalization(mean=(0.7, 0.5, 0.6), std=(0.1, 0.2, 0.3)),
        "provenance": PROVENANCE,
    }
    return Checkpoint(**{**given, **fields})


def seeded_state_of(template: dict[str, Tensor]) -> dict[str, Tensor]:
    return seeded_state({name: torch.empty_like(tensor, device="cpu") for name, tensor in template.items()})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, a_checkpoint())
    return path


# Round trip


def test_a_model_file_gives_back_what_was_saved(file: Path) -> None:
    saved, loaded = a_checkpoint(), load_checkpoint(file)
    assert loaded.state.keys() == saved.state.keys()
    assert all(torch.equal(loaded.state[name], tensor) for name, tensor in saved.state.items())
    for name in ("model", "tiles", "classes", "normalization", "provenance"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert loaded.header == saved.header


def test_the_network_is_built_with_its_weights_ready_to_predict(file: Path) -> None:
    network = build_model(TINY).eval()
    network.load_state_dict(dict(a_checkpoint().state))
    built = load_checkpoint(file).build()
    assert not built.training
    with torch.inference_mode():
        assert torch.equal(built(image(0), image(1)), network(image(0), image(1)))


def test_a_built_network_is_apart_from_its_checkpoint() -> None:
    checkpoint = a_checkpoint()
    with torch.no_grad():
        for parameter in checkpoint.build().parameters():
            parameter.zero_()
    assert checkpoint.model_id == a_checkpoint().model_id
    assert all(torch.equal(tensor, a_checkpoint().state[name]) for name, tensor in checkpoint.state.items())


def test_channels_last_and_half_precision_weights_survive(tmp_path: Path) -> None:
    state = {
        name: tensor.to(torch.bfloat16).to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in a_checkpoint().state.items()
    }
    save_checkpoint(tmp_path / "m.safetensors", a_checkpoint(state=state))
    loaded = load_checkpoint(tmp_path / "m.safetensors").state
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in state.items()
    )


def test_the_header_is_read_without_the_weights(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_digest", lambda _: pytest.fail("weights were read"))
    header = read_header(file)
    assert header.model == TINY
    assert header.provenance["metrics"] == {"miou": 0.75}


def test_the_header_is_json_in_the_safetensors_header(file: Path) -> None:
    data = json.loads(raw_header(file)["__metadata__"]["darefine"])
    assert (data["format"], data["version"]) == (FORMAT, VERSION) == ("darefine-model", 2)
    assert data["model"]["network"] == "unet"
    assert data["classes"]["names"] == ["a", "b"]
    assert data["tiles"]["slice_um"] == 100


def raw_header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    parsed: dict[str, Any] = json.loads(content[8 : 8 + length])
    return parsed


# Identity


def test_model_id_is_that_of_the_predictions_not_of_the_file(file: Path) -> None:
    base = a_checkpoint()
    assert read_header(file).model_id == read_header(str(file)).model_id == base.model_id == base.header.model_id
    assert len(base.model_id) == 12
    assert a_checkpoint(provenance={}).model_id == base.model_id


@pytest.mark.parametrize(
    "fields",
    [
        {"tiles": TileSpec.paper()},
        {"normalization": Normalization()},
        {"classes": ClassMap(names=("b", "a"))},
        {"state": {name: tensor + 1 for name, tensor in a_checkpoint().state.items()}},
    ],
    ids=["tiles", "normalization", "classes", "weights"],
)
def test_model_id_changes_with_whatever_changes_predictions(fields: dict[str, Any]) -> None:
    assert a_checkpoint(**fields).model_id != a_checkpoint().model_id


# Refusals


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write the file anew with another darefine header."""
    loaded = load_checkpoint(path)
    data = loaded.header.to_json()
    change(data)
    save_file(dict(loaded.state), path, metadata={"darefine": json.dumps(data)})
    return path


SIDES = {"slice_px": 100, "context_px": 500, "stride_px": 100}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "is darefine-model version 3; expected darefine-model version 2; a newer darefine wrote it"),
        ({"version": 0}, "is darefine-model version 0; expected darefine-model version 2$"),
        ({"format": "darefine-dataset"}, "is darefine-dataset version 2; expected darefine-model version 2"),
        ({"model": {"network": "segnet"}}, "damaged header: network = 'segnet' is not one of"),
        ({"model": {"depth": 1}}, r"damaged header: Unknown network setting \['depth'\]"),
        ({"model": []}, "damaged header"),
        ({"model": TINY.to_json() | {"width": 10**7}}, "damaged header: width = 10000000 must be .* at most 1024"),
        ({"tiles": SIDES | {"input_px": 10**7}}, r"damaged header: input_px = 1e\+07 is too large; .* at most 8,192"),
        ({"tiles": SIDES | {"context_px": 10**7}}, r"damaged header: context_px = 1e\+07 is too large"),
        ({"tiles": SIDES | {"context_input_px": float("inf")}}, "damaged header: .*finite"),
        ({"tiles": {"input_px": 5}}, "damaged header: Give slice, context and stride"),
        ({"classes": {}}, "damaged header: Not a class map"),
        ({"normalization": {}}, "damaged header: Not a normalisation"),
        ({"classes": ClassMap(names=("a", "b", "c")).to_json()}, "2 classes cannot stand for the 3 classes"),
        ({"weights_sha256": "0" * 64}, "is damaged: its weights are not those that were saved"),
        ({"model": TINY.to_json() | {"width": 8}}, r"do not fit U-Net, width 8: downs.0.0.weight is \(1, 3, 3, 3\)"),
    ],
)
def test_a_file_with_another_header_is_refused(file: Path, change: dict[str, Any], message: str) -> None:
    rewritten(file, lambda data: data.update(change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "key", ["model", "tiles", "classes", "normalization", "provenance", "weights_sha256", "model_id", "version"]
)
def test_a_header_without_a_part_is_refused(file: Path, key: str) -> None:
    rewritten(file, lambda data: data.pop(key) and None)
    with pytest.raises(CheckpointError, match="damaged header"):
        read_header(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is a text", "is no .safetensors at all"),
        (b"PK\x03\x04" + bytes(60), "is a zip or pickle file, which is never opened as a model"),
        (b"\x80\x02}q\x00." + bytes(60), "is a zip or pickle file"),
    ],
    ids=["empty", "text", "zip", "pickle"],
)
def test_another_kind_of_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for reader in (load_checkpoint, read_header):
        with pytest.raises(
            CheckpointError, match=rf"model\.safetensors {message}.*expected a darefine-model version 2"
        ):
            reader(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no model file .*none\.safetensors"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="There is no model file"):
        read_header(tmp_path)


def test_weights_of_another_program_are_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "timm.safetensors")
    with pytest.raises(CheckpointError, match=r"timm\.safetensors holds weights of another program.*--encoder-weights"):
        load_checkpoint(tmp_path / "timm.safetensors")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    for reader in (load_checkpoint, read_header):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is .*expected a darefine-model"):
            reader(file)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_one_flipped_bit_in_the_weights_is_noticed(file: Path, place: float) -> None:
    content = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    content[start + int((len(content) - start) * place)] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its weights are not those that were saved"):
        load_checkpoint(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    state = dict(a_checkpoint().state)
    name = next(name for name, tensor in state.items() if tensor.ndim == 4)
    state[name] = state[name].to(dtype)
    state[name][0, 0, 0, 0] = value
    save_checkpoint(tmp_path / "m.safetensors", a_checkpoint(state=state))
    with pytest.raises(CheckpointError, match=rf"m\.safetensors has weights that are not finite .* in {name}: "):
        load_checkpoint(tmp_path / "m.safetensors")


def test_a_checkpoint_that_contradicts_itself_is_not_made() -> None:
    with pytest.raises(CheckpointError, match=r"network of 2 classes cannot stand for the 1 classes \['a'\]"):
        a_checkpoint(classes=ClassMap(names=("a",)))
    state = dict(a_checkpoint().state)
    del state["classifier.bias"]
    with pytest.raises(CheckpointError, match=r"do not fit U-Net, width 4: classifier.bias is missing"):
        a_checkpoint(state=state)
    with pytest.raises(CheckpointError, match="extra is unknown"):
        a_checkpoint(state={**a_checkpoint().state, "extra": torch.zeros(1)})


# Writing


def test_only_safetensors_names_are_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a \.safetensors, not 'model\.pth'"):
        save_checkpoint(tmp_path / "model.pth", a_checkpoint())


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}], ids=["object", "nan", "set"])
def test_a_provenance_that_is_not_json_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"provenance of .*m\.safetensors is not plain JSON"):
        save_checkpoint(tmp_path / "m.safetensors", a_checkpoint(provenance={"x": value}))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be written: there is no folder .*nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "m.safetensors", a_checkpoint())


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_a_write_that_fails_leaves_the_former_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = file.read_bytes()

    def half(_: object, path: Path, **__: object) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(checkpoint_module, "save_file", half)
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        save_checkpoint(file, a_checkpoint(provenance={}))
    assert isinstance(caught.value, KeyboardInterrupt) or "No space left on device" in str(caught.value)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_place(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), move(*paths))[1])
    save_checkpoint(file, a_checkpoint())
    assert steps[:2] == ["fsync", "replace"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_the_file_is_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_checkpoint(tmp_path / "m.safetensors", a_checkpoint())
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "m.safetensors")]
    assert modes[0] == modes[1]


# For people


def test_a_description_names_what_the_model_is(file: Path) -> None:
    text = describe(file)
    assert text == describe(load_checkpoint(file)) == describe(read_header(file))
    for part in ("U-Net, width 4", "0 a, 1 b", "slice 100, context 400, stride 50 um", "64 and 48 px", "12ab", "0.75"):
        assert part in text
    assert read_header(file).model_id in text.splitlines()[0]


def test_a_description_of_pixel_tiles_says_so() -> None:
    assert "slice 1000, context 5000, stride 500 level-0 px" in describe(a_checkpoint(tiles=TileSpec.paper()))


def test_environment_names_the_versions() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found
    assert {"darefine", "python", "numpy", "git"} <= found.keys()


def test_a_source_tree_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment_module, "__file__", str(tmp_path / "package" / "checkpoint" / "environment.py"))
    assert environment()["git"] is None
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] is None


# ONNX


@pytest.mark.skipif(not ONNX, reason="needs the extra 'onnx' (onnx, onnxruntime, onnxscript)")
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        pytest.param(
            ModelConfig(
                slice_encoder="efficientnet-lite0", context_encoder="resnet18", width=8, num_classes=2, fusion="aligned"
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["unet", "aligned"],
)
def test_onnx_logits_match(config: ModelConfig, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    checkpoint = a_checkpoint(config)
    export_onnx(checkpoint, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["darefine"]) == checkpoint.header.to_json()
    slices, contexts = image(0), image(1, 48)
    inputs = {"slice": slices, "context": contexts, "box": BOX_B4}
    names = [each.name for each in session.get_inputs()]
    assert names == ["slice", "context", "box"][: 1 + config.uses_context + config.uses_box]
    for count in (1, 2):
        found = session.run(["logits"], {name: inputs[name][:count].numpy() for name in names})[0]
        with torch.inference_mode():
            expected = checkpoint.build()(slices[:count], contexts[:count], BOX_B4[:count])
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not ONNX, reason="needs the extra 'onnx' (onnx, onnxruntime, onnxscript)")
def test_onnx_is_a_command(file: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("onnx", file, "-o", tmp_path / "m.onnx", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"onnx": str(tmp_path / "m.onnx"), "model_id": read_header(file).model_id}
    code, out, err = run("onnx", file, "-o", tmp_path / "nowhere" / "m.onnx")
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert "there is no folder" in err


def test_onnx_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ModelError, match=r"pip install 'darefine-qupath\[onnx\]'"):
        export_onnx(a_checkpoint(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_replaced_fields_are_checked_again() -> None:
    with pytest.raises(CheckpointError, match="3 classes cannot stand for the 2"):
        replace(a_checkpoint(), model=replace(TINY, num_classes=3))
