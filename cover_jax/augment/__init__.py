"""What changes the pixels of a batch on the device, inside the jitted step."""
