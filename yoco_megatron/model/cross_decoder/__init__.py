"""The shared K,V, and the cross-decoder's attention over them."""
