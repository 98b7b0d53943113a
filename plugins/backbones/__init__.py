"""Networks that mix tokens."""
