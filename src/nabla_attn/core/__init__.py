"""Pure tensor maths of block-sparse attention: grid, order, scores, select, window, block map."""
