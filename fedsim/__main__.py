"""`python -m fedsim`: the command line."""

from __future__ import annotations

from fedsim.cli.main import cli

if __name__ == "__main__":
    cli()
