"""``python -m manyhats``: the same as the ``manyhats`` command."""

from manyhats.cli import main

if __name__ == "__main__":
    main()
