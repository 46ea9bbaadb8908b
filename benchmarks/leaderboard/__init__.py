"""The leaderboard: one model, its retrainings, and every method of attribution that is held against them."""
