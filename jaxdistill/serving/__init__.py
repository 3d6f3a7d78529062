"""The embedded teacher's server: the SGLang scoring subset over this package's decoder."""
