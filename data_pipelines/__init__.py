"""TensorFlow, tf.data and TFDS live in this package and only here."""
