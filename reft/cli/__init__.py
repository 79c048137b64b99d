"""The ``reft`` command: each subcommand parses, checks, calls the library and prints."""
