"""The ways of scoring, a file each over the engine. They do not know the study that calls them, nor pages."""
