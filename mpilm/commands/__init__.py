"""The functions behind the subcommands of `mpilm`: arguments in, exit code out."""
