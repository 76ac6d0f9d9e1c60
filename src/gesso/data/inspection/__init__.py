"""What a person should know about a data set before training on it."""
