"""Models with adapters: what stands in for parts of them while gradients are taken. It knows no layers and no tasks."""
