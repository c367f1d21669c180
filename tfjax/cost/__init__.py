"""What a config will cost: FLOPs, and the budget that follows from it."""
