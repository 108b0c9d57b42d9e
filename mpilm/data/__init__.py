"""Data: corpora in HDF5, and the minibatches that learners draw from them."""
