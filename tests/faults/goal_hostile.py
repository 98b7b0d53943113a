"""R7, R17: nothing that is read can run code, and nothing is written outside of the run and the caches.

Each attack has the product read a file that would leave a canary on the disk if anything in it were run; the same files
are given to the usual loaders. Tars are read where they lie, so what their members are called leads nowhere.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import resource
import shutil
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import runs
import spoiled
import torch
from pyarrow import parquet
from result import Result
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from selfsup.kernel import compose, saving, state
from selfsup.kernel.config import parse_set, read_toml
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import SelfsupError
from selfsup.plugins.common.corpus import Corpus
from selfsup.plugins.common.vocabulary import Vocabulary
from selfsup.plugins.modalities.audio import Audio
from selfsup.plugins.modalities.image import Image
from selfsup.plugins.modalities.text import Text

YAML = "!!python/object/apply:os.mkdir ['{}']"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def measure(work: Path, full: bool) -> Iterator[Result]:
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name as on the hub is asked for once, not for half a minute
    yield executed(work / "code")
    yield from elsewhere(work / "tars")
    yield members(work / "many", 1_000_000 if full else 20_000)
    yield loops(work / "loops")
    yield odd_names(work / "odd")


def executed(work: Path) -> Result:
    """Every loader of the product, given what would run in a loader that trusts its files."""
    work.mkdir()
    canary, ran, refused = work / "canary", [], 0
    attacks = dict(attacks_on(work, canary))
    for name, attack in attacks.items():
        try:
            attack()
        except SelfsupError:
            refused += 1
        except Exception as cause:
            ran.append(f"{name}: {type(cause).__name__}: {cause}")
        if canary.exists():
            ran.append(f"{name} ran")
            canary.rmdir()
    usual = dict(usual_loaders(work, canary))
    wrong = 0
    logging.disable(logging.CRITICAL)  # dcp logs what it raises, with a traceback
    for load in usual.values():
        with suppress(Exception, CheckpointException), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process loads alone
            load()
        wrong += canary.exists()
        with suppress(FileNotFoundError):
            canary.rmdir()
    logging.disable(logging.NOTSET)
    figure = f"canary in 0 of {len(attacks)}, {refused} refused with a reason, the rest read as plain data"
    stock = f"canary in {wrong} of {len(usual)}: {', '.join(usual)}"
    return Result("R7", "code in what is read", len(attacks), len(attacks) - len(ran), "; ".join(ran) or figure, stock)


def attacks_on(work: Path, canary: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    code = pickle.dumps(Payload(canary))
    saved = io.BytesIO()
    torch.save({"w": Payload(canary)}, saved)
    yield from attacks_by_checkpoint(work / "runs", code, saved.getvalue())
    tokens = work / "tokens"
    tokens.mkdir()
    np.save(tokens / "documents.npy", np.array([Payload(canary)], object), allow_pickle=True)
    facts = {"tokenizer": "", "samples": 1, "max_bytes": 1, "tokens": 8}
    (tokens / "corpus.json").write_text(json.dumps(facts))
    (tokens / "tokens.bin").write_bytes(code)
    yield "object array among the tokens", lambda: Corpus(tokens)
    objects = work / "objects"
    shutil.copytree(tokens, objects)
    (objects / "corpus.json").write_text(json.dumps({**facts, "dtype": "O"}))
    np.save(objects / "documents.npy", np.array([[8], [0]]))
    yield "tokens that say they are objects", lambda: Corpus(objects)
    tar = work / "a.tar"
    kinds = {"pkl": code, "pyd": code, "pickle": code, "pt": saved.getvalue(), "npy": code, "py": b"import os"}
    spoiled.shard(tar, {**{f"a.{kind}": data for kind, data in kinds.items()}, "a.txt": code, "a.json": code})
    yield "pickles in a tar", lambda: read_all(tar, work, Text)
    loose = work / "loose"
    loose.mkdir()
    for kind, data in {**kinds, "yaml": YAML.format(canary).encode(), "txt": code}.items():
        (loose / f"loose.{kind}").write_bytes(data)
    (loose / "loose.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    yield "pickles and a loading script in a folder", lambda: read_all(loose, work, Text)
    (loose / "data.jsonl").write_text('{"text": "a"}\n')
    (loose / "loose.txt").unlink()
    yield "a loading script beside a table", lambda: read_all(loose, work, Text)
    yield "a loading script by a name as on the hub", lambda: read_all(Path("nobody-here/loose"), work, Text)
    for kind in (Text, Image, Audio):
        path = work / f"{kind.field}.parquet"
        parquet.write_table(pa.table({kind.field: [code]}), path)
        yield f"pickles as {kind.field} in parquet", lambda path=path, kind=kind: read_all(path, work, kind)
    yield from attacks_by_schema(work, code)
    yield "a tokenizer.json", lambda: Vocabulary(YAML.format(canary))
    yield from attacks_by_settings(work, canary)
    eps = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({canary}) (w) file closefile\n%%EOF\n"
    yield "a program in place of a photo", lambda: Image().read(eps.encode())


def attacks_by_checkpoint(work: Path, code: bytes, saved: bytes) -> Iterator[tuple[str, Callable[[], Any]]]:
    for number, (name, file) in enumerate((("a pickle", code), ("torch.save", saved))):
        folder = saving.save(work / str(number), 1, {"model": {"w": torch.ones(2)}, "optimizer": {}}, {"settings": {}})
        for beside in (".metadata", "model.pt", "optimizer.bin"):
            (folder / beside).write_bytes(file)
        yield f"{name} beside a checkpoint", lambda folder=folder: state.load(folder)
        forged = work / f"{number}-forged" / folder.name
        shutil.copytree(folder, forged)
        for part in ("model.safetensors", "state.json"):
            forge(forged, part, file)
        yield f"{name} as a checkpoint with right digests", lambda forged=forged: state.load(forged)
        (forged.parents[1] / "run.toml").write_text("")
        yield f"{name} by --from", lambda forged=forged: compose.newest_checkpoint(forged.parents[1])


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, with digests that are right."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("digest")
    manifest["files"][name] = {"size": len(content), "xxh3_128": state.digest(folder / name)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": state.digest_of(manifest)}))


def attacks_by_schema(work: Path, code: bytes) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a schema says of its columns."""
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": code}
    field = pa.field("text", pa.string(), metadata=extension)
    path = work / "extension.parquet"
    parquet.write_table(pa.table([pa.array(["a"])], schema=pa.schema([field])), path)
    yield "an extension type of Python in parquet", lambda: read_all(path, work, Text)
    for number, kind in enumerate(("exec", "os.system", "partial", "reduce", "dataclass", "generate_from_dict")):
        features = {"info": {"features": {"text": {"_type": kind, "dtype": "string", "obj": "1"}}}}
        schema = pa.schema([pa.field("text", pa.string())], metadata={b"huggingface": json.dumps(features).encode()})
        named = work / f"features{number}.parquet"
        parquet.write_table(pa.table([pa.array(["a"])], schema=schema), named)
        yield f"features of the type {kind}", lambda named=named: read_all(named, work, Text)


def attacks_by_settings(work: Path, canary: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    call = f"__import__('os').mkdir('{canary}')"
    for number, text in enumerate(
        (
            '[objective]\nname = "os:mkdir"\n',
            f'[objective]\nname = "simclr"\n_target_ = "os.mkdir"\npath = "{canary}"\n',
            f'[objective]\nname = "bert"\n_instantiator = "os.mkdir"\n[optimizer]\nlr = "{call}"\n',
            f'[objective]\nname = "bert"\n[modality]\nname = "text"\ntokenizer = "{YAML.format(canary)}"\n',
        )
    ):
        path = work / f"{number}.toml"
        path.write_text(text)
        yield f"run file {number}", lambda path=path: compose.resolve(Plugins(), read_toml(path))
    given = parse_set([f"optimizer.lr={call}", f"train.steps={YAML.format(canary)}"])
    yield "--set", lambda: compose.resolve(Plugins(), {"objective": {"name": "bert"}}, given)


def read_all(path: Path, work: Path, kind: Any) -> None:
    """Open data as a run does and read every sample; one that cannot be used is skipped there."""
    source = spoiled.opened(path, work / "cache", kind)
    for index in range(len(source)):
        with suppress(SelfsupError):
            reader = Audio() if kind is Audio else Image() if kind is Image else None
            stored = source[index][kind.field]
            reader.read(stored) if reader else bytes(str(stored), "utf-8", "replace")


def usual_loaders(work: Path, canary: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What runs the code in a file if it is asked to trust it, or without being asked."""
    torch.save({"w": Payload(canary)}, work / "usual.pt")
    yield "torch.load(weights_only=False)", lambda: torch.load(work / "usual.pt", weights_only=False)
    folder = work / "usual-dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(canary)))
    yield "dcp.load", lambda: dcp.load({"w": torch.ones(2)}, checkpoint_id=str(folder), no_dist=True)
    np.save(work / "usual.npy", np.array([Payload(canary)], object), allow_pickle=True)
    yield "np.load(allow_pickle=True)", lambda: np.load(work / "usual.npy", allow_pickle=True)


def elsewhere(work: Path) -> Iterator[Result]:
    """Tars whose members lead out of the folder: what is on the disk before and after is compared."""
    work.mkdir()
    path = work / "in" / "deep" / "a.tar"
    path.parent.mkdir(parents=True)
    hostile = write_hostile(path, work)
    before = tree(work)
    wrote = 0
    source = spoiled.opened(path, work.parent / "tar-cache")
    for index in range(len(source)):
        assert isinstance(source[index]["text"]["bytes"], bytes)
        source.name(index)
    wrote = len(tree(work) ^ before)
    figure = f"escapes 0 of {hostile}, {len(source)} plain members read, nothing written"
    good = hostile if not wrote else 0
    yield Result("R17", "members of tars that lead elsewhere", hostile, good, figure, escapes(path, work))


def write_hostile(path: Path, work: Path) -> int:
    plain = [
        "../x.txt",
        "../../y.txt",
        str(work / "absolute.txt"),
        "a/../../../z.txt",
        "same.txt",
        "same.txt",
        "a\0b.txt",
    ]
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in plain:
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"link{number}.txt")
            info.type, info.linkname = kind, "../../outside.txt"
            tar.addfile(info)
        through = tarfile.TarInfo("link0.txt/through.txt")
        through.size = 4
        tar.addfile(through, io.BytesIO(b"text"))
    return len(plain) + len(kinds) + 1


def escapes(path: Path, work: Path) -> str:
    """What `tarfile` leaves outside of the folder when it is to extract all and trusts the file."""
    target = work / "in" / "deep" / "target"
    target.mkdir()
    before = tree(work)
    with tarfile.open(path) as tar:
        for member in tar:
            with suppress(Exception):
                tar.extract(member, target, filter="fully_trusted")
    outside = {name for name in tree(work) - before if not name.startswith(str(target))}
    return f"tarfile.extract, trusting: {len(outside)} files outside"


def tree(folder: Path) -> set[str]:
    return {os.path.join(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files)}


def members(work: Path, count: int) -> Result:
    """Very many members: how long opening takes, and how much memory."""
    work.mkdir()
    path = work / "a.tar"
    info = tarfile.TarInfo("0.txt")
    info.size = 1
    with path.open("wb") as file:
        for number in range(count):
            info.name = f"{number}.txt"
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + b"x" + bytes(511))
        file.write(bytes(1024))
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = spoiled.opened(path, work / "cache")
    took = time.perf_counter() - began
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    right = len(source) == count and source[count - 1]["text"]["bytes"] == b"x"
    return Result(
        "R17", f"{count:,} members", 1, int(right), f"opened in {took:.1f} s, at most {more:.0f} MB more memory"
    )


def loops(work: Path) -> Result:
    """Links to folders that lead back up, by two names, as a folder and as patterns."""
    (work / "a" / "b").mkdir(parents=True)
    for number in range(5):
        (work / "a" / "b" / f"{number}.txt").write_text("text")
    for name in ("a/up", "a/again", "a/b/up", "a/b/again"):
        (work / name).symlink_to(work)
    found = []
    for where in (work, work / "**", work / "**" / "*.txt", work / "a" / "**" / "*.txt"):
        began = time.perf_counter()
        found.append((len(spoiled.opened(where, work.parent / "cache")), time.perf_counter() - began))
    right = sum(count == 5 for count, _ in found)
    slowest = max(seconds for _, seconds in found)
    return Result("R17", "links that lead in circles", 4, right, f"5 files found each time, within {slowest:.2f} s")


def odd_names(work: Path) -> Result:
    """Folders of data and of a run whose names hold what shells, terminals, patterns and markup give a meaning."""
    data, run = work / "a [b] *?'\" $(x) \x1b[31m\n;&@", work / "r [/red] %s {0} \n'\""
    data.mkdir(parents=True)
    for number in range(12):
        (data / f"{number} [i]\n\u202e \udce9.txt").write_text("the sea is calm tonight " * 40)
    runs.train(run, "--data", str(data), steps=2).finish()
    right = (run / "status").read_text() == "DONE\n" and len(list(data.iterdir())) == 12
    return Result("R17", "odd characters in --data and --out", 1, int(right), "the run ends as any other")
