"""One reader a format, each giving `data.shards.ShardIndex`."""
