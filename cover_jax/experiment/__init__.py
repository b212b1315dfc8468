"""What a run is made of: its settings, its parts, its state, its optimizer."""
