"""Whether scores can be trusted: measures that look at scores and at something else that is known."""
