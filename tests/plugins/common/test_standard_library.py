"""The built-in samples of text and code."""

from __future__ import annotations

from collections import Counter

import pytest

from selfsup.plugins.common import standard_library
from selfsup.plugins.common.plain_text import decode

SAMPLES = {"text": standard_library.documentation, "code": standard_library.source_code}


@pytest.mark.parametrize("field", SAMPLES)
def test_some_hundred_documents_of_some_megabytes(field):
    samples = SAMPLES[field]()
    assert 100 <= len(samples) <= 1000
    texts = [decode(sample[field], 1 << 20) for sample in samples]
    assert 1e6 < sum(map(len, texts)) < 4e6
    assert len(set(texts)) > 0.99 * len(texts)
    labels = Counter(sample["label"] for sample in samples if "label" in sample)
    assert len(labels) >= 8
    assert sorted(labels) == list(range(len(labels)))
    assert min(labels.values()) >= standard_library.CLASS


def test_it_is_made_once_and_alike_every_time():
    for make in SAMPLES.values():
        first = make()
        assert make() is first
        make.cache_clear()
        assert make() == first


def test_documentation_is_prose_and_code_compiles():
    texts = [sample["text"] for sample in standard_library.documentation()]
    assert sum('"""' in text for text in texts) < 0.05 * len(texts)
    assert sum("import" in text for text in texts) > 50
    for sample in standard_library.source_code()[::20]:
        compile(sample["code"], "sample", "exec")


def test_neither_holds_tests_or_what_the_build_of_python_says():
    code = "\n".join(sample["code"] for sample in standard_library.source_code())
    assert "build_time_vars" not in code
    assert "class TestCase(object):" in code  # unittest itself is there
