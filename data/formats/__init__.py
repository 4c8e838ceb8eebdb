"""What one file holds, read and checked: images, texts, labels."""
