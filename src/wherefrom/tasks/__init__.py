"""What a model is asked: losses, measurements, masks and columns of batches. It knows nothing of layers or sweeps."""
