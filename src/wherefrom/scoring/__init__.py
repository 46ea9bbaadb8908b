"""Query gradients against training gradients, and the results of that. It does not know which methods there are."""
