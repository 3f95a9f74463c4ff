"""Block-sparse video attention that adapts to each input (NABLA), on stock PyTorch."""
