"""One reader a format, each giving a `data.shards.Shard`."""
