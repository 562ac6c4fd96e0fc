"""The server: pure cores (shard, session, downlink, core) under thin shells (kernel pool, checkpoint, daemon)."""
