"""Images with labels and boxes: idx files, folders by class, generated scenes."""
