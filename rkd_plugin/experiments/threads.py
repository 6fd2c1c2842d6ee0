"""How many threads PyTorch's operators use."""


def limit_spinning() -> None:
    """Later."""
