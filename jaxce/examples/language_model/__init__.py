"""Train a small GPT with jaxce's loss that never holds the logits."""
