"""One rank's model and gradient as flat vectors: with torch, and a quadratic without.

Importing this package, `mpilm.learner.flat` or `mpilm.learner.quadratic` imports no
torch. `mpilm.Learner` is the learner with torch.
"""
