"""Where each encoded frame lies in the files of TFDS, and how it is read."""
