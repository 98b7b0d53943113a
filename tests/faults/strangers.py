"""Distributions of plugins that are broken in every way, installed as pip leaves them: metadata and a module."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

BACKBONE = """
from selfsup.plugins.backbones.transformer import Transformer
class X(Transformer):
    pass
"""
OBJECTIVE = """
from selfsup.plugins.objectives.bert import Bert
class X(Bert):
    pass
"""
MODALITY = """
from selfsup.plugins.modalities.text import Text
class X(Text):
    pass
"""
SERVICE = """
from selfsup.kernel import hookimpl
class X:
    @hookimpl
    def run_started(self, run):
        pass
"""
SOUND = {"objectives": OBJECTIVE, "modalities": MODALITY, "backbones": BACKBONE, "services": SERVICE}
HANG = "import time\ntime.sleep(3600)\n"


@dataclass(frozen=True)
class Stranger:
    """A distribution of one plugin."""

    title: str  # what is wrong with it
    kind: str
    source: str
    name: str = ""  # of the plugin; by default one of its own
    distribution: str = ""  # by default likewise
    said: str = ""  # what a refusal says beside the plugin, its distribution and its version

    @property
    def word(self) -> str:
        """For names: what is wrong, without what names cannot hold."""
        return "".join(c if c.isalnum() else "_" for c in f"{self.kind}_{self.title}")

    @property
    def plugin(self) -> str:
        return self.name or self.word

    @property
    def owner(self) -> str:
        return self.distribution or f"dist-{self.word}"

    @property
    def entry_points(self) -> str:
        return f"[selfsup.{self.kind}]\n{self.plugin} = {self.owner_module}:X\n"

    @property
    def owner_module(self) -> str:
        return f"of_{self.owner}".replace("-", "_")

    @property
    def modules(self) -> dict[str, str]:
        return {self.owner_module: f'"""A stranger: {self.title}."""\n{self.source}'}

    def named(self, text: str) -> bool:
        """Whether a text names it in full, and says why."""
        words = " ".join(text.split())
        return f"{self.plugin!r} of {self.owner} 1.5" in words and self.said in words


def at_import(kind: str) -> list[Stranger]:
    """Whose module is broken."""
    return [
        Stranger("raises", kind, "raise OSError('boo')", said="OSError: boo"),
        Stranger("lacks a dependency", kind, "import surely_missing", said="No module named 'surely_missing'"),
        Stranger("does not parse", kind, "def broken(:", said="SyntaxError"),
        Stranger("has not what is named", kind, "Y = 1", said="AttributeError"),
        Stranger("calls sys exit", kind, "import sys; sys.exit(0)", said="SystemExit: 0"),
        Stranger("calls os exit", kind, "import os; os._exit(0)", said="os._exit(0)"),
        Stranger("raises no Exception", kind, "class E(BaseException): pass\nraise E('odd')", said="E: odd"),
    ]


def hanging(kind: str) -> Stranger:
    return Stranger("hangs", kind, HANG, said="the import was given up after")


def misfits() -> list[Stranger]:
    """Whose class is not what its kind promises."""
    sound = SOUND
    return [
        *(
            Stranger("too old", k, f"{s}    contract = 0\n", said="has contract 1; upgrade it")
            for k, s in sound.items()
        ),
        *(Stranger("too new", k, f"{s}    contract = 99\n", said="contract 99 of plugins") for k, s in sound.items()),
        *(Stranger("no class", kind, "X = 3\n", said="is no class but a int") for kind in sound),
        *(Stranger("another kind", k, "class X: pass\n") for k in sound),
        Stranger(
            "lacks methods", "modalities", "from selfsup.kernel import Modality\nclass X(Modality): field = 'x'\n"
        ),
        Stranger("lacks presets", "objectives", f"{OBJECTIVE}    presets = {{}}\n", said='no preset "base"'),
        Stranger("odd towers", "objectives", f"{OBJECTIVE}    towers = 'encoder'\n", said="no tuple of names"),
        Stranger("wants arguments", "backbones", f"{BACKBONE}    def __init__(self, width): pass\n"),
        Stranger("unknown types", "services", f"{SERVICE}    def __init__(self, *, a: 'Nowhere' = 1): pass\n"),
        Stranger("renamed hook", "services", SERVICE.replace("run_started", "run_strted"), said="'run_started'"),
        Stranger("unknown argument", "services", SERVICE.replace("run)", "rum)"), said="does not fit the hooks"),
        Stranger("needs an option", "services", f"{SERVICE}    def __init__(self, *, a: int): pass\n"),
        Stranger("cannot be made", "services", f"{SERVICE}    def __init__(self): 1 / 0\n", said="ZeroDivisionError"),
    ]


def claims() -> list[Sequence[Stranger]]:
    """Names that another has: one of ours, or both strangers'."""
    return [
        [Stranger("ours", "objectives", OBJECTIVE, name="bert")],
        [Stranger("ours", "modalities", MODALITY, name="text")],
        [Stranger("ours", "backbones", BACKBONE, name="transformer")],
        [Stranger("ours", "services", SERVICE, name="metrics")],
        [Stranger("ours", "commands", "import click\nX = click.Command('train')\n", name="train")],
        [Stranger(f"{n} of two", "backbones", BACKBONE, name="twice") for n in ("one", "other")],
        [Stranger(f"{n} of two", "services", SERVICE, name="twice") for n in ("one", "other")],
    ]


def quick(note: float, give_up: float) -> None:
    """Do not wait so long for a stranger's import that hangs."""
    from selfsup.kernel import discovery, importing

    own = discovery.watched

    def watched(what: str, without: str, ours: bool = False) -> Any:
        importing.NOTE, importing.GIVE_UP = (10.0, 60.0) if ours else (note, give_up)
        return own(what, without, ours)

    discovery.watched = watched


def usual(folder: Path, kind: str) -> str:
    """What pluggy's own loading makes of the plugins of a kind on the path, in a process of its own."""
    sys.path.insert(0, str(folder))
    if not (pid := os.fork()):
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        signal.alarm(5)
        code = 1
        try:
            pluggy.PluginManager("selfsup").load_setuptools_entrypoints(f"selfsup.{kind}")
            code = 2
        except Exception:
            code = 3
        finally:
            os._exit(code)
    sys.path.pop(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    words = {2: "loaded", 3: "end the command by a traceback", -signal.SIGALRM: "hang it"}
    return words.get(code, "end it without a word")


if __name__ == "__main__" and sys.argv[1] == "usual":  # python strangers.py usual FOLDER KIND FOLDER KIND ...
    import pluggy

    import_module("torch._dynamo")
    import_module("selfsup.kernel.compose")
    pairs = zip(sys.argv[2::2], sys.argv[3::2], strict=True)
    print(json.dumps([usual(Path(folder), kind) for folder, kind in pairs]))
elif __name__ == "__main__":  # python strangers.py NOTE GIVE_UP train --plugin ...
    quick(float(sys.argv[1]), float(sys.argv[2]))
    from selfsup.cli.main import main

    main(sys.argv[3:])
