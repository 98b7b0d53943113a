"""`python -m selfsup.cli` is the command `ssl`."""

from .main import main

if __name__ == "__main__":
    main()
