"""Output formats: what one quantized linear becomes on disk, and the config files that declare it."""
