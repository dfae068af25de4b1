"""Readers of weight files, one format a module; none runs code from a file."""
