"""Products with weights of 4 bits in tiles that a warp reads as it multiplies them."""
