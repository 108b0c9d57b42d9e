"""Models, and softmax layers to build models from.

Importing this package, or `mpilm.models.configs`, imports no torch.
"""
