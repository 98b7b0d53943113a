"""Code is text in other files."""

from __future__ import annotations

from selfsup.kernel.config import schema
from selfsup.plugins.modalities.code import Code
from selfsup.plugins.modalities.text import Text
from selfsup.plugins.services.data import Data


def test_it_differs_from_text_in_its_field_and_files():
    assert (Code.field, Code.unit) == ("code", "tokens")
    assert not set(Code.suffixes) & set(Text.suffixes)
    assert schema(Code).model_fields.keys() == schema(Text).model_fields.keys()


def test_source_files_are_documents(tmp_path):
    (tmp_path / "a.py").write_text("def f(x):\n    return x\n" * 20)
    (tmp_path / "b.rs").write_text("fn f() {}\n" * 20)
    (tmp_path / "c.md").write_text("# no code\n")
    code = Code(tokenizer="bpe", vocabulary=300, length=64)
    source = Data().open_data([str(tmp_path)], {"code": code})
    assert [source[i]["code"].name for i in range(len(source))] == ["a.py", "b.rs"]
    code.learn(source)
    rows = code.rows(source, 0, None, 0.01)
    shown = [text for i in range(len(rows)) for text in code.show(code.collate([rows[i]["code"]]))]
    parts = [part for one in shown for part in ([one] if isinstance(one, str) else [text for text, _ in one])]
    assert any("    return x\ndef" in part for part in parts), "indentation and line breaks are kept"


def test_its_sample_is_source_code():
    assert all("code" in sample for sample in Code().sample())
