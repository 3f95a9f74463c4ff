"""What computation costs: work, rates of machines, and the exact choice within a budget."""
