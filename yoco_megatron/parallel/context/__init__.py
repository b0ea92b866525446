"""Sequences over context-parallel ranks, zig-zag: halos, states, and the shared K,V."""
