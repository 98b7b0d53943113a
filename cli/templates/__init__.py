"""Texts of a new plugin package; `$name` and the like stand for what its author asked for (`plugins_new.py`)."""
