"""The official MicroDiT code's MDS layout, to and from column groups."""
