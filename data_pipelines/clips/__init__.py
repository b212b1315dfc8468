"""What a clip shows of its video: settings, frames, box, flip, and how it is decoded."""
