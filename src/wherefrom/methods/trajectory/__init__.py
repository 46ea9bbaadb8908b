"""Training unrolled backwards in the space of drawn gradients. It does not know how a training is repeated."""
