"""From positions in the endless sequence of examples to batches."""
