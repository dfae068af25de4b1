"""The parts of dist-deeplab shards: packing folders, and looking at shards that are there."""
