"""MAGIC: the exact gradient through a training that can be replayed."""
