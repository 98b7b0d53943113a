"""Plugins by entry point: listed without import, and clear when they clash or fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from selfsup.kernel import Plugins, hookimpl
from selfsup.kernel.discovery import KINDS, source_of
from selfsup.kernel.errors import PluginError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed("dist", "group:name=module:attribute", source) puts a distribution on the path."""

    def install(dist, entry, source, module):
        folder = tmp_path / dist
        info = folder / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        group, _, target = entry.partition(":")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[selfsup.{group}]\n{target}\n")
        (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))

    yield install
    for name in [n for n in sys.modules if n.startswith("stranger_")]:
        del sys.modules[name]


def test_a_plugin_is_listed_without_import_and_loaded_by_name(installed):
    installed(
        "dist-a", "objectives:mine=stranger_a:Mine", '"""Guess the rest.\n\nLong."""\nclass Mine: pass', "stranger_a"
    )
    plugins = Plugins()
    found = plugins.find("objectives", "mine")
    assert "mine" in plugins.names("objectives")
    assert (found.distribution, found.summary()) == ("dist-a 1.0", "Guess the rest.")
    assert "stranger_a" not in sys.modules
    assert plugins.load("objectives", "mine").__name__ == "Mine"


def test_an_unknown_name_says_what_exists(installed):
    installed("dist-b", "backbones:stranger=stranger_b:X", "X = 1", "stranger_b")
    with pytest.raises(PluginError, match=r"there is no backbone called 'strager'; did you mean 'stranger'\?"):
        Plugins().load("backbones", "strager")


def test_a_name_claimed_twice_is_an_error_naming_both(installed):
    for dist in ("dist-c", "dist-d"):
        installed(dist, "objectives:twice=stranger_c:X", "X = 1", "stranger_c")
    plugins = Plugins()
    with pytest.raises(PluginError, match=r"the objective 'twice' is claimed by dist-c 1\.0 and by dist-d 1\.0"):
        plugins.load("objectives", "twice")
    assert "twice" in plugins.names("objectives")  # the rest of the list is not harmed


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError: "),
        ("import surely_missing", "ModuleNotFoundError: No module named 'surely_missing'"),
        ("", "AttributeError: "),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
    ],
)
def test_a_plugin_that_fails_to_import_harms_itself_alone(installed, monkeypatch, source, cause):
    installed("dist-e", "objectives:broken=stranger_e:X", source, "stranger_e")
    with pytest.raises(PluginError) as caught:
        Plugins().load("objectives", "broken")
    said = str(caught.value)
    assert said.startswith("the objective 'broken' of dist-e 1.0 could not be imported: " + cause)
    assert said.endswith("Go on without it: SELFSUP_DISABLE=objectives.broken")
    monkeypatch.setenv("SELFSUP_DISABLE", "objectives.broken")
    with pytest.raises(PluginError, match="there is no objective called 'broken'"):
        Plugins().load("objectives", "broken")


def test_disable_hides_by_name_and_by_kind(installed, monkeypatch):
    installed("dist-f", "objectives:shy=stranger_f:X", "X = 1", "stranger_f")
    installed("dist-g", "backbones:shy=stranger_f:X", "X = 1", "stranger_f")
    monkeypatch.setenv("SELFSUP_DISABLE", "objectives.shy, other")
    assert "shy" not in Plugins().names("objectives")
    assert "shy" in Plugins().names("backbones")
    monkeypatch.setenv("SELFSUP_DISABLE", "shy")
    assert "shy" not in Plugins().names("backbones")


def test_every_builtin_has_a_summary():
    plugins = Plugins()
    for kind in KINDS:
        for name in plugins.names(kind):
            assert len(plugins.find(kind, name).summary()) > 10, (kind, name)


def test_a_source_that_is_not_there():
    assert source_of("surely_missing.module") is None
    assert source_of("selfsup.kernel.surely_missing") is None
    assert source_of("math") is None


class Service:
    def __init__(self):
        self.seen = []

    @hookimpl
    def open_data(self, paths):
        self.seen.append(paths)
        return "mine"


class Late(Service):
    @hookimpl(trylast=True)
    def open_data(self, paths):
        return "late"


@pytest.mark.parametrize("order", [(Service, Late), (Late, Service)])
def test_the_first_service_to_answer_decides_whatever_the_order(order):
    plugins = Plugins()
    for number, service in enumerate(order):
        plugins.register(service(), f"service {number}")
    assert plugins.hook.open_data(paths=["x"], modalities={}) == "mine"


def test_a_service_that_does_not_fit_the_hooks_is_refused():
    class Typo:
        @hookimpl
        def open_dta(self, paths):
            """A hook that does not exist."""

    class Argument:
        @hookimpl
        def open_data(self, path):
            """An argument that the hook does not have."""

    for service, said in ((Typo(), "open_dta"), (Argument(), "path")):
        with pytest.raises(PluginError, match=rf"(?s)the service 'wrong' does not fit the hooks: .*{said}"):
            Plugins().register(service, "wrong")


def test_trace_prints_hook_calls(monkeypatch, capsys):
    monkeypatch.setenv("SELFSUP_TRACE", "1")
    plugins = Plugins()
    plugins.register(Service(), "service")
    plugins.hook.open_data(paths=["x"], modalities={})
    assert "open_data" in capsys.readouterr().err
    monkeypatch.delenv("SELFSUP_TRACE")
    plugins = Plugins()
    plugins.register(Service(), "service")
    plugins.hook.open_data(paths=["x"], modalities={})
    assert capsys.readouterr().err == ""


def test_listing_imports_neither_torch_nor_a_plugin():
    source = (
        "import sys; from selfsup.kernel.discovery import KINDS, Plugins\n"
        "p = Plugins(); [p.find(k, n).summary() for k in KINDS for n in p.names(k)]\n"
        "print([m for m in ('torch', 'numpy', 'selfsup.plugins.objectives') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
