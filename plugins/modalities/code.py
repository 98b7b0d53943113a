"""Source code as tokens: the modality `text` for the files of programs, one file a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from selfsup.kernel.contracts import Sample
from selfsup.plugins.common import standard_library

from .text import Text


class Code(Text):
    """Programs in any language."""

    field: ClassVar[str] = "code"
    suffixes: ClassVar[tuple[str, ...]] = (
        *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".cs", ".java", ".kt", ".scala"),
        *(".js", ".mjs", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".swift"),
        *(".m", ".mm", ".hs", ".ml", ".ex", ".exs", ".erl", ".clj", ".lisp", ".el", ".f90", ".sql", ".sh", ".ps1"),
    )

    def sample(self) -> Sequence[Sample]:
        """The source of Python's standard library, without its tests."""
        return standard_library.source_code()
