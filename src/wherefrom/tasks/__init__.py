"""What a model is trained on and measured by: losses, masks, columns of batches. It knows no layers and no sweeps."""
