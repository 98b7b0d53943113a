"""Every hook is documented, typed and called; every service implements hooks that exist."""

from __future__ import annotations

import ast
import inspect

from selfsup.kernel import hookspecs

HOOKS = {name: f for name, f in vars(hookspecs).items() if hasattr(f, "selfsup_spec")}


def test_there_are_few_hooks_and_few_that_take_the_first_answer():
    assert 5 <= len(HOOKS) <= 11
    assert sum(bool(f.selfsup_spec["firstresult"]) for f in HOOKS.values()) <= 4


def test_every_hook_is_documented_and_typed():
    for name, hook in HOOKS.items():
        assert (hook.__doc__ or "").strip().endswith("."), name
        signature = inspect.signature(hook)
        assert all(p.annotation is not p.empty for p in signature.parameters.values()), name
        assert signature.return_annotation is not signature.empty, name


def test_every_hook_is_called_with_its_arguments_by_name(sources):
    called = {}
    for source in sources["kernel"]:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in HOOKS:
                called[node.func.attr] = {keyword.arg for keyword in node.keywords}
            if isinstance(node, ast.For) and "plugins.apart(" in ast.unparse(node.iter):  # one service after the other
                call = next(inner for inner in ast.walk(node) if isinstance(inner, ast.Call) and inner.keywords)
                called[ast.literal_eval(node.iter.args[0])] = {keyword.arg for keyword in call.keywords}
    assert called == {name: set(inspect.signature(hook).parameters) for name, hook in HOOKS.items()}


def test_hooks_are_declared_in_the_order_of_a_run():
    assert list(HOOKS) == [
        "open_data",
        "build_optimizer",
        "run_composed",
        "calibrating",
        "calibrated",
        "run_started",
        "step_started",
        "step_finished",
        "measured",
        "checkpoint_saved",
        "run_finished",
    ]
