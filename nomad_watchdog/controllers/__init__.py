"""Control loops: each watches something and brings the world closer to it."""
