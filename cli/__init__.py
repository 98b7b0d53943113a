"""The command `ssl`; one command per file."""
