"""Sequences spread over context-parallel ranks, zig-zag: halos of windows, retention states, the gathered shared K,V;
and the calls of attention over packed documents, on one rank as on many.

"Chunk" in this room always means one of the 2 C equal parts of a sequence over C ranks (sequence_shard.py).
"""
