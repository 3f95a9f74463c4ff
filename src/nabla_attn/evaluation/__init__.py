"""How close a video is to another, to its prompt, and what that cost."""
