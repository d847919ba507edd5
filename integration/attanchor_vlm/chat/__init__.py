"""A conversation becomes token ids, the mask of the words that take part, and labels."""
