"""Built-in plugins; each is an ordinary entry point and has no back door."""
