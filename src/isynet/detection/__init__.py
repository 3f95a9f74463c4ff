"""Detection with ISyNet: a pyramid of maps, an anchor-free head, training and average precision."""
