"""Reading shards: manifest, index, reader, cache of remote shards."""
