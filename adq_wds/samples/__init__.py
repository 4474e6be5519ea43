"""What one sample holds: fields, labels, images, stored patches."""
