"""Training a YOCO beside the Transformer that it was made of: distillation, and transfer of its attention.

The teacher is frozen, in the dtype of training, on the same mesh: each rank holds its part of the same layers. It is in
no optimizer, checkpoint or gradient buffer.
"""
