"""The parts of tools/make_shards.py: packing folders, and looking at shards that are there."""
