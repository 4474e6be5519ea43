"""The contents of a sample: fields, labels, images, stored patches."""
