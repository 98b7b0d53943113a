"""Plugins by entry point: listed without import, and clear when they clash or fail."""

from __future__ import annotations

import sys

import distributions
import pytest

from selfsup.kernel import Plugins, hookimpl
from selfsup.kernel.errors import ContractError, PluginError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed("dist", "group:name=module:attribute", source) puts a distribution on the path."""

    def install(dist, entry, source, module):
        group, _, target = entry.partition(":")
        distributions.install(tmp_path / dist, dist, f"[selfsup.{group}]\n{target}\n", **{module: source})
        monkeypatch.syspath_prepend(str(tmp_path / dist))

    yield install
    for name in [n for n in sys.modules if n.startswith("stranger_")]:
        del sys.modules[name]


def test_a_plugin_is_listed_without_import_and_loaded_by_name(installed):
    installed("dist-a", "commands:mine=stranger_a:Mine", "class Mine: pass", "stranger_a")
    plugins = Plugins()
    found = plugins.find("commands", "mine")
    assert "mine" in plugins.names("commands")
    assert found.distribution == "dist-a 1.0"
    assert "stranger_a" not in sys.modules
    assert plugins.load("commands", "mine").__name__ == "Mine"


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


SERVICE = "from selfsup.kernel import hookimpl\nclass X:\n    @hookimpl\n    def run_started(self): {}"


def test_a_full_name_selects_and_hides_one_of_two(installed, monkeypatch):
    for dist in ("dist-c", "dist_D"):
        installed(dist, "services:twice=stranger_c:X", SERVICE.format("pass"), "stranger_c")
    assert Plugins().find("services", "dist_c:twice").distribution == "dist-c 1.0"
    assert Plugins().find("services", "Dist.d:twice").distribution == "dist_D 1.0"
    assert Plugins().load("services", "dist-c:twice").__name__ == "X"
    with pytest.raises(PluginError, match="there is no service called 'dist-e:twice'; did you mean 'twice'"):
        Plugins().find("services", "dist-e:twice")
    for hidden in ("dist-c:twice", "services.Dist_c:twice"):
        monkeypatch.setenv("SELFSUP_DISABLE", hidden)
        assert Plugins().find("services", "twice").distribution == "dist_D 1.0"


@pytest.mark.parametrize(("kind", "name"), [("services", "metrics"), ("commands", "train")])
def test_what_is_in_use_unasked_keeps_its_name(installed, capsys, kind, name):
    installed("dist-h", f"{kind}:{name}=stranger_h:X", "X = 1", "stranger_h")
    plugins = Plugins()
    plugins.load(kind, name)
    plugins.load(kind, name)
    said = f"warning: the {kind[:-1]} '{name}' of dist-h 1.0 is left out: selfsup"
    assert capsys.readouterr().err.count(said) == 1
    assert plugins.find(kind, name).owner == "selfsup"
    assert plugins.find(kind, f"dist-h:{name}").owner == "dist-h"


def test_what_is_chosen_by_name_is_never_guessed(installed):
    installed("dist-i", "objectives:simclr=stranger_i:X", "X = 1", "stranger_i")
    with pytest.raises(PluginError, match=r"claimed by dist-i 1\.0 and by selfsup .*; say which, as in dist-i:simclr"):
        Plugins().load("objectives", "simclr")
    assert Plugins().load("objectives", "selfsup:simclr").__name__ == "SimCLR"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[selfsup.services]\nno equals sign\n", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[selfsup.services]\nselfsup:metrics = a:b\n", "is not of the form name = module:attribute"),
        (b"[selfsup.services]\nodd = a.b\n", "is not of the form name = module:attribute"),
    ],
)
def test_damaged_entry_points_harm_their_distribution_alone(installed, tmp_path, text, said):
    installed("dist-j", "services:fine=stranger_j:X", "X = 1", "stranger_j")
    installed("dist-k", "services:other=stranger_j:X", "X = 1", "stranger_j")
    next((tmp_path / "dist-k").glob("*/entry_points.txt")).write_bytes(text)
    plugins = Plugins()
    assert {"fine", "metrics"} <= set(plugins.names("services"))
    assert len(plugins.names("objectives")) == len(Plugins().names("objectives")) >= 5
    ((owner, why),) = plugins.damaged.items()
    assert owner.startswith("dist-k")
    assert said in why


def test_a_service_that_fails_is_left_out_unless_it_was_asked_for(installed, capsys):
    broken = SERVICE.format("pass").replace("    @hook", "    def __init__(self): 1 / 0\n    @hook")
    installed("dist-l", "services:frail=stranger_l:X", broken, "stranger_l")
    plugins, settings = Plugins(), {"frail": {}, "metrics": {"every": 10}}
    plugins.serve(settings)
    plugins.serve(settings)
    assert set(settings) == {"metrics"}
    assert plugins.manager.has_plugin("metrics")
    said = "the service 'frail' of dist-l 1.0 cannot be made: ZeroDivisionError: division by zero"
    assert capsys.readouterr().err == f"warning: a service is left out of this run: {said}\n"
    plugins = Plugins()
    plugins.asked = {"frail"}
    with pytest.raises(PluginError, match=said):
        plugins.serve({"frail": {}})


def test_our_own_services_are_never_left_out(monkeypatch):
    plugins = Plugins()
    with pytest.raises(TypeError):
        plugins.serve({"metrics": {"evry": 10}})


def test_a_service_that_was_refused_harms_no_later_one():
    class Typo:
        @hookimpl
        def open_dta(self):
            """A hook that does not exist."""

    plugins = Plugins()
    with pytest.raises(PluginError):
        plugins.register(Typo(), "typo")
    plugins.register(Service(), "fine")


def test_apart_reaches_each_service_in_the_order_of_a_call():
    plugins, heard = Plugins(), []

    class Ends:
        def __init__(self, name, fails=False):
            self.name, self.fails = name, fails

        @hookimpl
        def run_finished(self, error):
            heard.append((self.name, error))
            if self.fails:
                raise OSError("full")

    for service in (Ends("first"), Ends("second", fails=True), Ends("third")):
        plugins.register(service, service.name)
    for tell in plugins.apart("run_finished"):
        try:
            tell(run=None, error=None)
        except OSError:
            heard.append("raised")
    assert heard == [("third", None), ("second", None), "raised", ("first", None)]


def test_an_answer_of_another_kind_names_who_may_have_given_it(installed):
    installed(
        "dist-m", "services:odd=stranger_m:X", SERVICE.format("pass").replace("run_started", "open_data"), "stranger_m"
    )
    plugins = Plugins()
    plugins.serve({"odd": {}})
    with pytest.raises(ContractError, match=r"open_data of the service 'odd' of dist-m 1\.0 returned a int, not a str"):
        plugins.answered("open_data", 3, str)


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
