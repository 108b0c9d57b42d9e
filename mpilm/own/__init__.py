"""Your own torch model, trained and kept as the models of this package are."""
