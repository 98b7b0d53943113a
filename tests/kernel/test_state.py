"""A damaged checkpoint is never used."""

import json
import os
import random
import struct

import pytest
import torch
from small_state import tensors

from selfsup.kernel import saving, state
from selfsup.kernel.errors import StateError


def test_round_trip(root):
    folder = saving.save(root, 7, tensors(), {"settings": {"x": 1}})
    loaded, facts = state.load(folder)
    assert facts == {"step": 7, "settings": {"x": 1}}
    assert torch.equal(loaded["model"]["a.weight"], tensors()["model"]["a.weight"])
    assert folder.name == "step-00000007"
    assert sorted(p.name for p in root.iterdir()) == ["step-00000007"]


def test_every_flipped_bit_is_found(root):
    folder = saving.save(root, 1, tensors(), {"settings": {"lr": 0.1}})
    chosen = random.Random(0)
    for path in sorted(folder.iterdir()):
        clean = path.read_bytes()
        for _ in range(50):
            bit = chosen.randrange(len(clean) * 8)
            damaged = bytearray(clean)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert state.verify(folder) is not None, (path.name, bit)
        path.write_bytes(clean)
    assert state.verify(folder) is None


def test_truncated_missing_and_swapped_files_are_found(root):
    first, second = (saving.save(root, step, tensors(step), {}) for step in (1, 2))
    model = first / "model.safetensors"
    clean = model.read_bytes()
    model.write_bytes(clean[:-1])
    assert "bytes instead of" in state.verify(first)
    model.write_bytes((second / "model.safetensors").read_bytes())
    assert "does not match its digest" in state.verify(first)
    model.unlink()
    assert state.verify(first) == "model.safetensors is missing"
    (second / "manifest.json").write_text("[]")
    assert "cannot be read" in state.verify(second)


def made(folder, name, content):
    """Replace a file of a checkpoint, with digests that are right."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("digest")
    manifest["files"][name] = {"size": len(content), "xxh3_128": state.digest(folder / name)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": state.digest_of(manifest)}))


def header(facts, length=None):
    text = json.dumps(facts).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        header({}, 1 << 40),
        header({"a.weight": {"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 4]}}) + bytes(4),
        header(
            {"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
            | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        )
        + bytes(4),
        header(
            {
                "a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "__metadata__": {"DCP_SHARDING_INFO": json.dumps({"a.weight": {"saved_offsets": [1 << 40]}})},
            }
        )
        + bytes(4),
        header(
            {
                "a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "__metadata__": {"DCP_SHARDING_INFO": "[" * 100_000},
            }
        )
        + bytes(4),
        b"",
    ],
    ids=["header of a terabyte", "2^62 values", "overlap", "a part of 2^40", "nested metadata", "nothing"],
)
def test_files_that_lie_behind_right_digests_are_refused(root, content):
    folder = saving.save(root, 1, tensors(), {})
    made(folder, "model.safetensors", content)
    assert state.verify(folder) is None
    with pytest.raises(StateError, match="step-00000001 cannot be read: "):
        state.load(folder)


def test_facts_that_are_none_are_refused(root):
    folder = saving.save(root, 1, tensors(), {})
    made(folder, "state.json", b"[" * 100_000)
    with pytest.raises(StateError, match="cannot be read"):
        state.facts(folder)
    (folder / "manifest.json").write_text("[" * 100_000)
    assert "cannot be read" in state.verify(folder)


@pytest.mark.parametrize("name", ["../../outside", "/dev/zero", "sub/file", "pipe"])
def test_a_manifest_names_files_of_its_own_alone(root, name):
    folder = saving.save(root, 1, tensors(), {})
    os.mkfifo(folder / "pipe")
    manifest = {**json.loads((folder / "manifest.json").read_text()), "files": {name: {"size": 0, "xxh3_128": ""}}}
    manifest.pop("digest")
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": state.digest_of(manifest)}))
    assert state.verify(folder) == f"manifest.json names {name!r}, which is no file of it"


def test_the_newest_that_verifies_is_used_and_the_damaged_named(root):
    for step in (1, 2, 3):
        saving.save(root, step, tensors(step), {})
    path = root / "step-00000003" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found, damaged = state.newest(root)
    assert found.name == "step-00000002"
    assert len(damaged) == 1
    assert "step-00000003 is damaged" in damaged[0]
    with pytest.raises(StateError, match=r"damaged: model\.safetensors does not match"):
        state.load(root / "step-00000003")


def test_retention_counts_verified_checkpoints_only(root):
    for step in (1, 2, 3):
        saving.save(root, step, tensors(step), {})
    (root / "step-00000003" / "state.json").unlink()
    state.retain(root, 1)
    assert sorted(p.name for p in root.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_holds_no_pickle(root):
    folder = saving.save(root, 1, tensors(), {"settings": {}})
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / "manifest.json").read_text())["schema"] == state.SCHEMA


def forged(folder, name, content):
    """The checkpoint with another file, and with digests that fit."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("digest")
    manifest["files"][name] = {"size": len(content), "xxh3_128": state.digest(folder / name)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": state.digest_of(manifest)}))
    assert state.verify(folder) is None


def header(**tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


LIES = {
    "longer than the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "no JSON": header()[:8] + b"[[",
    "a shape beyond memory": header(w={"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}),
    "an overlap": header(
        a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    )
    + bytes(12),
    "parts that are not there": header(
        __metadata__={saving.SPLIT: json.dumps({"w": {"saved_offsets": [1 << 40]}})},
        w={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    )
    + bytes(8),
    "parts without a place": header(
        __metadata__={saving.SPLIT: "{}"}, w={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    )
    + bytes(8),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_though_its_digest_fits(root, lie):
    folder = saving.save(root, 1, tensors(), {})
    forged(folder, "model.safetensors", LIES[lie])
    with pytest.raises(StateError, match="cannot be read"):
        state.load(folder)
