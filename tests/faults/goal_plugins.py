"""R15, R16: whatever a stranger's plugin does, it is named with its distribution and version, and the rest works.

Broken plugins of every sort are installed as distributions. With all of them there, and with each alone, lists, help,
completion, a check and a run of something else must work; asked for, each must be refused before anything is trained.
What a plugin does wrong in a step or a hook must end the run with its name, FAILED, exit code 1 and a whole checkpoint.

pluggy's own `load_setuptools_entrypoints` meets the same distributions in the same run.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import distributions
import runs
import strangers
from result import Result
from strangers import Stranger

from selfsup.kernel import state

LAUNCHER = Path(strangers.__file__)
STOCK = "import pluggy; pluggy.PluginManager('selfsup').load_setuptools_entrypoints('selfsup.{}'); print('LOADED')"


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int | None  # None: it did not
    text: str
    seconds: float


def measure(work: Path, full: bool) -> Iterator[Result]:
    if not full:  # what commands do in a process of the tests is tested beside them
        yield lists(work / "lists", [*strangers.at_import("services"), *strangers.misfits()[::4]], stock=False)
        yield in_a_run(work / "runs", wrongs()[:1])
        return
    broken = [s for kind in strangers.SOUND for s in strangers.at_import(kind)]
    yield lists(work / "lists", [*broken, *strangers.misfits(), *map(strangers.hanging, strangers.SOUND)])
    yield unreadable(work / "unreadable")
    yield others(work / "others", strangers.at_import("services"))
    yield hangs(work / "hangs", 10, 60)
    yield refused(work / "refused", [*broken, *strangers.misfits()])
    yield from clashes(work / "claims", strangers.claims())
    yield in_a_run(work / "runs", wrongs())


def ssl(path: Path, *words: str, start: Sequence[str] = runs.CLI, limit: float = 300, **environment: str) -> Said:
    """A command with what is installed in a folder."""
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path), **environment}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *start, *words], env=known, cwd=path, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return Said(None, "", time.monotonic() - began)
    return Said(done.returncode, done.stdout + done.stderr, time.monotonic() - began)


def processor(path: Path, *words: str) -> float:
    """The seconds of a processor that a command takes, which a busy machine does not lengthen as it does a clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ssl(path, *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(path: Path, folder: Path, *more: str, plugin: str = "bert", **options: object) -> Said:
    """A run of some steps, with what is installed in a folder."""
    return ssl(path, *runs.words(folder, *more, steps=6, sets=runs.SMALL, plugin=plugin), **options)  # type: ignore[arg-type]


def installed(path: Path, found: Sequence[Stranger]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for stranger in found:
        distributions.install(path, stranger.owner, stranger.entry_points, "1.5", **stranger.modules)
    return path


def lists(path: Path, every: Sequence[Stranger], stock: bool = True) -> Result:
    """All are there at once: what only lists plugins imports none, and a check tells each from ours."""
    installed(path, every)
    complete = {"_SSL_COMPLETE": "bash_complete", "COMP_WORDS": "ssl train --plugin be", "COMP_CWORD": "3"}
    commands = [["--help"], ["plugins"], ["plugins", "bert"], ["runs"], ["train", "--help"]]
    said = [ssl(path, *words) for words in commands] + [ssl(path, **complete)]
    quickest = min(processor(path, "--help") for _ in range(3))
    checked = ssl(path, "plugins", "--check", "--json")
    verdicts = {(v["name"], v["distribution"]): v for v in json.loads(checked.text)}
    told = [not verdicts[s.plugin, f"{s.owner} 1.5"]["good"] for s in every]
    ours = [v["good"] for (_, owner), v in verdicts.items() if owner.startswith("selfsup ")]
    works = sum(one.code == 0 for one in said) + sum(ours) + (checked.code == 1)
    figure = (
        f"{sum(one.code == 0 for one in said)}/{len(said)} commands work with {len(every)} broken ones installed, "
        f"help in {quickest:.2f} s of a processor; --check names {sum(told)}/{len(every)} "
        f"and passes {sum(ours)}/{len(ours)} of ours in {checked.seconds:.0f} s"
    )
    count = len(said) + len(ours) + 1 + len(every)
    return Result(
        "R15",
        "broken plugins of every sort are installed",
        count,
        works + sum(told),
        figure,
        usual(path, every) if stock else "",
    )


def unreadable(path: Path) -> Result:
    """A distribution whose entry points no tool can read: torch cannot be imported either, and it is said why."""
    installed(path, [damaged := Stranger("unreadable", "services", "X = 1")])
    next(path.glob("*/entry_points.txt")).write_bytes(b"[a]\nno equals\n\xff")
    said = [ssl(path, *words) for words in (["--help"], ["plugins"], ["train", "--plugin", "bert"])]
    right = [said[0].code == 0, said[1].code == 0 and damaged.owner in said[1].text]
    right.append(said[2].code == 1 and f"the distribution {damaged.owner}" in said[2].text)
    usual = ssl(path, "-c", STOCK.format("services"), start=())
    figure = f"help, the list, and the message of a run that cannot be name it: {sum(right)}/3"
    stock = (
        "pluggy: loaded" if "LOADED" in usual.text else "pluggy: ends the command by a traceback that does not name it"
    )
    return Result("R15", "a distribution whose entry points cannot be read", 3, sum(right), figure, stock)


def usual(path: Path, every: Sequence[Stranger]) -> str:
    """What pluggy's own loading makes of each, alone."""
    folders = [(str(installed(path.with_name("stock") / s.word, [s])), s.kind) for s in every]
    said = ssl(path, "usual", *(word for pair in folders for word in pair), start=[str(LAUNCHER)], PYTHONPATH="")
    found = json.loads(said.text)
    return "pluggy: " + ", ".join(f"{found.count(kind)} {kind}" for kind in sorted(set(found))) + f", of {len(found)}"


def others(path: Path, every: Sequence[Stranger]) -> Result:
    """A service takes part in every run: one that cannot be used is left out, by name, and the run does its steps."""
    every = [*every, *(s for s in strangers.misfits() if s.kind == "services")]
    installed(path, every)
    together = train(path, path / "run")
    named = sum(stranger.named(together.text) for stranger in every)
    done = together.code == 0 and (path / "run" / "status").read_text() == "DONE\n"
    figure = f"a run of something else {'is done' if done else 'fails'}; {named}/{len(every)} left out by name"
    return Result("R15", "services that cannot be used, in a run of something else", len(every), named * done, figure)


def hangs(path: Path, note: float, give_up: float) -> Result:
    """A service that hangs at its import: a line after 10 s, given up after 60, and the run goes on."""
    stranger = strangers.hanging("services")
    said = train(installed(path, [stranger]), path / "run", start=[str(LAUNCHER), str(note), str(give_up)])
    line = f"still importing the service {stranger.plugin!r} of {stranger.owner} 1.5"
    ok = said.code == 0 and stranger.named(said.text) and line in said.text
    figure = f"named after {note:g} s, given up after {give_up:g} s, the run done after {said.seconds:.0f} s"
    return Result("R15", "a service hangs at its import", 1, int(ok), figure)


def refused(path: Path, every: Sequence[Stranger]) -> Result:
    """Asked for, each is refused before anything is trained."""

    def asked(stranger: Stranger) -> bool:
        folder = installed(path / stranger.word, [stranger])
        flag = {"objectives": "--plugin", "modalities": "--modality", "backbones": "--backbone"}.get(stranger.kind)
        chosen = [flag, stranger.plugin] if flag else ["--set", f"{stranger.plugin}.a=1"]
        if stranger.title in (
            "cannot be made",
            "needs an option",
        ):  # asked for without options
            (folder / "run.toml").write_text(f"[{stranger.plugin}]\n")
            chosen = [str(folder / "run.toml")]
        said = train(folder, folder / "run", *chosen)
        return said.code == 1 and stranger.named(said.text) and not (folder / "run" / "checkpoints").exists()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(asked, every))
    wrong = ", ".join(s.word for s, ok in zip(every, found, strict=True) if not ok)
    figure = f"refused by name {sum(found)}/{len(every)}, silent loads {len(every) - sum(found)} {wrong}".rstrip()
    return Result("R16", "what does not fit, asked for", len(every), sum(found), figure)


def clashes(path: Path, cases: Sequence[Sequence[Stranger]]) -> Iterator[Result]:
    """A name that two have is refused, naming both, or ours keeps it; distribution:name is one of them."""
    right, chosen, asked = 0, 0, 0
    for number, case in enumerate(cases):
        folder = installed(path / str(number), case)
        first = case[0]
        flag = {"objectives": "--plugin", "modalities": "--modality", "backbones": "--backbone"}.get(first.kind)
        said = train(folder, folder / "run", *([flag, first.plugin] if flag else []))
        both = all(f"{s.owner} 1.5" in said.text for s in case) and (len(case) > 1 or "selfsup 0." in said.text)
        right += both and said.code == (1 if flag else 0)
        if flag:
            asked += 1
            full_name = f"{first.owner}:{first.plugin}"
            said = train(folder, folder / "one", flag, full_name)
            again = ssl(folder, "train", "--resume", "--out", str(folder / "one"))
            kept = f'name = "{full_name}"' in (folder / "one" / "run.toml").read_text() if said.code == 0 else False
            chosen += said.code == again.code == 0 and kept
    figure = f"both distributions named {right}/{len(cases)}, silent loads {len(cases) - right}"
    yield Result("R16", "two distributions with one name", len(cases), right, figure)
    figure = f"trained, recorded and resumed {chosen}/{asked}"
    yield Result("R16", "one of two with one name, in full", asked, chosen, figure)


def wrongs() -> list[tuple[Stranger, str]]:
    """What goes wrong in a run, and the option that brings it."""
    sound, out = strangers.SOUND, []
    for title, then in (("raises", "raise OSError('boo')"), ("exits", "import sys; sys.exit(0)")):
        body = f"    def forward(self, batch, step):\n        if step.number == 3:\n            {then}\n"
        body += "        return super().forward(batch, step)\n"
        out.append((Stranger(f"{title} at a step", "objectives", sound["objectives"] + body), "--plugin"))
    for hook, done in HOOKS.items():
        body = f"    def {hook}(self, run):\n        if run.done >= {done}:\n            raise OSError('boo')\n"
        source = f"from selfsup.kernel import hookimpl\nclass X:\n    @hookimpl\n{body}"
        out.append((Stranger(f"raises in {hook}", "services", source, said="OSError: boo"), ""))
    for kind, flag, method, kept in (
        ("objectives", "--plugin", "forward", "not a Loss"),
        ("backbones", "--backbone", "at", "not a Tensor"),
        ("modalities", "--modality", "collate", "not a Signal"),
    ):
        body = f"    def {method}(self, *args, **options):\n        return 3\n"
        out.append((Stranger(f"wrong {method}", kind, sound[kind] + body, said=kept), flag))
    optimizer = "    @hookimpl(tryfirst=True)\n    def build_optimizer(self):\n        return {}\n"
    out.append((Stranger("wrong optimizer", "services", sound["services"] + optimizer, said="not a Optimizer"), ""))
    return out


HOOKS = {"run_composed": 0, "run_started": 0, "step_started": 3, "step_finished": 4, "checkpoint_saved": 4}
HOOKS["run_finished"] = 6


def in_a_run(path: Path, cases: Sequence[tuple[Stranger, str]]) -> Result:
    """The run ends with the plugin's name, FAILED, 1, and whatever was saved is whole."""

    def tried(case: tuple[Stranger, str]) -> bool:
        stranger, flag = case
        folder = installed(path / stranger.word, [stranger])
        out = folder / "run"
        said = train(folder, out, *([flag, stranger.plugin] if flag else []))
        status = (out / "status").read_text() if (out / "status").exists() else "FAILED"
        kept = state.folders(out / "checkpoints")
        whole = all(state.verify(one) is None for one in kept)
        late = any(word in stranger.title for word in ("at a step", "step_", "_saved", "_finished"))
        ended = said.code == 1 and stranger.named(said.text) and status.startswith("FAILED")
        return ended and whole and (bool(kept) or not late)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(tried, cases))
    wrong = ", ".join(case[0].word for case, ok in zip(cases, found, strict=True) if not ok)
    figure = f"named, FAILED, exit code 1, checkpoints whole {sum(found)}/{len(cases)} {wrong}".rstrip()
    return Result("R15", "a plugin raises, exits or returns the wrong thing in a run", len(cases), sum(found), figure)
