"""What a low-bit number is: grids, groups, packing, schemes. Pure torch; knows no model and no file."""
