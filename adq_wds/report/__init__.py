"""What plans and codebooks say, for people."""
