"""An error is laid at the door of the plugin whose code it came from."""

from __future__ import annotations

import pytest
import torch

from selfsup.cli.blame import culprit, raise_named
from selfsup.kernel import Signal, Tower
from selfsup.kernel.discovery import Plugins
from selfsup.kernel.errors import ContractError, DataError, PluginError

ENTRIES = "[selfsup.backbones]\nodd = odd.parts:Odd\n"
PARTS = """
from selfsup.kernel import Backbone
from . import deep
class Odd(Backbone):
    width = 4
    def __init__(self, *, how: str = "deep"):
        super().__init__()
        self.how = how
    def forward(self, tokens, *, causal=False, context=None):
        if self.how == "type":
            return 3
        return deep.down() if self.how == "deep" else tokens.x.view(-1, 7)
"""


@pytest.fixture
def odd(toys):
    (toys.path / "odd").mkdir()
    (toys.path / "odd" / "__init__.py").touch()
    (toys.path / "odd" / "deep.py").write_text("def down():\n    raise OSError('deep')\n")
    (toys.path / "odd" / "parts.py").write_text(PARTS)
    toys.distribution("odd", ENTRIES)
    plugins = Plugins()
    plugins.load("backbones", "mixer")
    plugins.load("backbones", "odd")
    return plugins


def failing(plugins, how):
    tower = Tower(torch.nn.Identity(), plugins.load("backbones", "odd")(how=how))
    try:
        tower(Signal(torch.zeros(1, 2, 4)))
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("how", ["deep", "torch", "type"])
def test_the_plugin_that_raised_or_broke_its_promise(odd, how):
    error = failing(odd, how)
    assert str(culprit(odd, error)) == "the backbone 'odd' of odd 1.0"
    with pytest.raises(PluginError, match=r"the backbone 'odd' of odd 1\.0 failed before the first step: "):
        raise_named(odd, error)


def test_a_type_that_was_not_promised_is_said():
    class Wrong(torch.nn.Module):
        width = 4

        def forward(self, tokens, *, causal=False, context=None):
            return tokens.x

    with pytest.raises(ContractError, match=r"Wrong\.forward returned a Tensor, not a Signal"):
        Tower(torch.nn.Identity(), Wrong())(Signal(torch.zeros(1, 2, 4)))


def test_what_no_plugin_did_is_raised_as_it_is(odd):
    with pytest.raises(ZeroDivisionError):
        raise_named(odd, ZeroDivisionError("x"))
    error = failing(odd, "deep")
    known = DataError("nothing there").with_traceback(error.__traceback__)
    with pytest.raises(DataError, match="nothing there"):
        raise_named(odd, known)


def test_a_traceback_that_a_worker_sent_as_text(odd, toys):
    text = (
        f'Caught OSError in DataLoader worker process 0.\n  File "{toys.path}/odd/parts.py", line 3, in x\nOSError: b'
    )
    assert culprit(odd, OSError(text)).name == "odd"
    assert culprit(odd, OSError("no file")) is None
