"""What a compilation did, for people and programs."""
