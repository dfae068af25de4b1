"""The sub-commands of tools/benchmark.py, a module each, and the harness they share.

A sub-command has `SUMMARY`, `add_arguments(parser)` and `run(arguments) -> Report`.
"""
