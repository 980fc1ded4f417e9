"""`fxq eval`: what a model makes of a text, as engines would serve it."""
