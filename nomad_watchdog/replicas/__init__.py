"""Several control planes: who holds which shard, and what they tell each other."""
