"""Many runs from one command: what they are, who runs them, what became of them. Reads run directories and knows nothing of training."""
