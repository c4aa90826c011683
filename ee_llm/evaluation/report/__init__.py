"""Write what is known about a model's exits as one HTML page."""
