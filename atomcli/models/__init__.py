"""What atom knows about model families: which linears read which input, and where every tensor lies on disk."""
