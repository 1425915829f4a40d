"""Gradients in fewer bytes: codecs, the two hops of a reduction, and the memory of what was rounded away."""
