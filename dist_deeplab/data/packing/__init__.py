"""Making data sets: sources, label maps and statistics, shard writing and verification. Training imports none of it."""
