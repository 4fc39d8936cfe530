"""``python -m segsvc``: the same as the command ``segsvc``."""

from segsvc.cli import main

main()
