"""Local optimisers and learning rate schedules.

Importing this package, `mpilm.optim.configs` or `mpilm.optim.schedules` imports no
torch.
"""
