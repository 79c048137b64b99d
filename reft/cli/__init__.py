"""The ``reft`` command, one file a subcommand: parse, check, call the library, report."""
