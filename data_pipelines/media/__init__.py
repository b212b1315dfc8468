"""Video and image files as people have them: containers, timestamps, orientation, how they are stored."""
