"""transformers models on many ranks: torch shards the parameters of any decoder (`fully_shard`, FSDP2)."""
