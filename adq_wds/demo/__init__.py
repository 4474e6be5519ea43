"""`adq demo`: the main job on scikit-learn's digits, with a table of trained classifiers."""
