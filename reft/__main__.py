"""``python -m reft`` is the ``reft`` command."""

from reft.cli.app import main

if __name__ == "__main__":
    main()
